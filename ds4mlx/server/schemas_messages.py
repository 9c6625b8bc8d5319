"""What a client of Anthropic's Messages may send. Fields that are not named here are ignored.

Messages and blocks stay as they come: `ds4mlx.server.messages_request` reads them, and says by name
what cannot be read.
"""

from typing import Annotated, Literal

from pydantic import Field

from ds4mlx.server.safety import MOST_MESSAGES, MOST_STOPS, MOST_TOOLS
from ds4mlx.server.schemas_openai import Common, Count, Name, Object, Stop, Strict


class Thinking(Strict):
    """Whether to think, for how many tokens at most, and whether to show it."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class ToolChoice(Strict):
    """Whether tools are called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class JsonFormat(Strict):
    """A JSON schema that the answer obeys."""

    type: Literal["json_schema"]
    schema_: Object = Field(alias="schema")


class OutputConfig(Strict):
    """How hard to think, and the form of the answer."""

    effort: str | None = None
    format: JsonFormat | None = None


class CountRequest(Strict):
    """`POST /v1/messages/count_tokens`: everything that becomes a part of the prompt."""

    model: Name = ""
    messages: Annotated[list[Object], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: str | list[Object] | None = None
    tools: Annotated[list[Object], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None


class MessagesRequest(CountRequest, Common):
    """`POST /v1/messages`. With `max_tokens` 0 the prompt is only read, for requests to come."""

    max_tokens: Count  # type: ignore[assignment]
    stop_sequences: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
