"""What a client of OpenAI's Responses may send. Fields that are not named here are ignored.

Items and tools stay as they come: `ds4mlx.server.responses_request` reads them.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from ds4mlx.server.safety import MOST_MESSAGES, MOST_TOOLS
from ds4mlx.server.schemas_openai import Common, Count, Name, Object, Strict


class Reasoning(Strict):
    """How hard to think, and for how many tokens at most."""

    effort: str | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    summary: str | None = None


class TextFormat(Strict):
    """text, json_object, or json_schema with its schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None
    description: str | None = None


class Text(Strict):
    """The form of the answer."""

    format: TextFormat | None = None
    verbosity: str | None = None


class InputTokensRequest(Strict):
    """`POST /v1/responses/input_tokens`: everything that becomes a part of the prompt."""

    model: Name = ""
    input: str | Annotated[list[Object], Field(max_length=MOST_MESSAGES)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[Object], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    conversation: Any = None
    prompt: Any = None


class ResponsesRequest(InputTokensRequest, Common):
    """`POST /v1/responses`. `store` is on unless refused."""

    store: bool | None = None
    background: bool | None = None
    include: list[str] | None = None
    max_output_tokens: Count | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def tells_logprobs(self) -> bool:
        asked = "message.output_text.logprobs" in (self.include or ())
        return asked or bool(self.top_logprobs)
