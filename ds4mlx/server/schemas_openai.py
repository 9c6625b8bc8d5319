"""What chat.completions and completions take. Unknown fields are ignored, wrong types refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ds4mlx.server.safety import LONGEST_STOP, MOST_MESSAGES, MOST_STOPS, MOST_TOOLS

Object = dict[str, Any]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
Name = Annotated[str, Field(max_length=1024)]


class Strict(BaseModel):
    """An object of which unknown keys say nothing, and in which "5" is no number."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None


class Thinking(Strict):
    """DeepSeek's and Anthropic's way to say whether to think."""

    type: str | None = None
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class Reasoning(Strict):
    """OpenRouter's way."""

    effort: str | None = None
    enabled: bool | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None


class ResponseFormat(Strict):
    """text, json_object, or json_schema with its schema."""

    type: str
    json_schema: Object | None = None


class Common(Strict):
    """How tokens are drawn, when the answer ends, and how it is told."""

    model: Name = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Fraction | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: int | None = None
    logit_bias: Object | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Common):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Object], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Object], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: str | Object | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    reasoning: Reasoning | None = None
    thinking: Thinking | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    chat_template_kwargs: Object | None = None


class CompletionRequest(Common):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
