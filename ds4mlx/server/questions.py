"""From the body of a chat or completions request to what is asked of the model."""

from typing import Any

from ds4mlx.engine.penalties import Penalties
from ds4mlx.engine.sampling import Sampler
from ds4mlx.server.constraints import Allowed, Choice, rule_of
from ds4mlx.server.efforts import USUAL, level
from ds4mlx.server.errors import Refusal
from ds4mlx.server.messages_in import known_messages
from ds4mlx.server.offered import Offered, name_of
from ds4mlx.server.schemas_openai import ChatRequest, Common
from ds4mlx.server.service import Question


def question_of(body: ChatRequest, offered: Offered) -> Question:
    """The question. Raises Refusal, naming the field, for what this server does not do."""
    check_choices(body)
    tools = offered.functions
    longest = body.max_completion_tokens
    return Question(
        messages=known_messages(body.messages),
        tools=tools,
        thinking=_thinking(body),
        thinking_budget=_budget(body),
        max_tokens=body.max_tokens if longest is None else longest,
        sampler=sampler_of(body),
        stop=body.stops,
        rule=rule_of(tools, _choice(body.tool_choice), body.parallel_tool_calls, _schema(body)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def check_choices(body: Common) -> None:
    """Raises Refusal for several answers to one request, and for biases of single tokens."""
    if body.n not in (None, 1):
        raise Refusal(400, f"n must be 1, not {body.n}", param="n")
    if body.logit_bias:
        raise Refusal(400, "logit_bias is not supported", param="logit_bias")


def sampler_of(body: Common) -> Sampler:
    """How tokens are drawn; what the request does not say is as the model's makers advise."""
    usual, plain = Sampler(), Penalties()
    penalties = Penalties(
        frequency=_or(body.frequency_penalty, plain.frequency),
        presence=_or(body.presence_penalty, plain.presence),
        repetition=_or(body.repetition_penalty, plain.repetition),
    )
    return Sampler(
        temperature=_or(body.temperature, usual.temperature),
        top_p=_or(body.top_p, usual.top_p),
        top_k=max(_or(body.top_k, usual.top_k), 0),
        min_p=_or(body.min_p, usual.min_p),
        seed=None if body.seed is None else body.seed % (1 << 64),
        penalties=None if penalties == plain else penalties,
    )


def _or(given: Any, usual: Any) -> Any:
    return usual if given is None else given


def _thinking(body: ChatRequest) -> str:
    """The effort, by whatever knob: what turns thinking off wins over how much there would be."""
    reasoning, thinking = body.reasoning, body.thinking
    if (thinking and thinking.type == "disabled") or (reasoning and reasoning.enabled is False):
        return "none"
    template = body.chat_template_kwargs or {}
    switches = [template.get("thinking"), template.get("enable_thinking")]
    if False in switches:
        return "none"
    words = [
        body.reasoning_effort,
        reasoning and reasoning.effort,
        template.get("reasoning_effort"),
    ]
    word = next((word for word in words if isinstance(word, str)), USUAL)
    return level(word)


def _budget(body: ChatRequest) -> int | None:
    given = [
        body.thinking_budget,
        body.thinking and body.thinking.budget_tokens,
        body.reasoning and body.reasoning.max_tokens,
    ]
    return next((budget for budget in given if budget is not None), None)


def _choice(choice: str | dict[str, Any] | None) -> Choice:
    if choice is None or isinstance(choice, str):
        return _mode(choice)
    if choice.get("type") == "allowed_tools":
        return Allowed.of(choice.get("allowed_tools"))
    name = name_of(choice)
    if name is None:
        raise Refusal(400, "tool_choice needs the name of a tool", param="tool_choice")
    return (name,)


def _mode(word: str | None) -> str:
    if word not in (None, "auto", "none", "required", "any"):
        raise Refusal(400, f"tool_choice cannot be {word!r:.80}", param="tool_choice")
    return "required" if word == "any" else word or "auto"


def _schema(body: ChatRequest) -> dict[str, Any] | bool | None:
    """The schema that the answer must obey; True for any JSON object, None for any text."""
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return True
    if form.type != "json_schema":
        raise Refusal(400, f"unknown response_format {form.type[:80]!r}", param="response_format")
    schema = (form.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        message = "response_format.json_schema.schema must be an object"
        raise Refusal(400, message, param="response_format")
    return schema
