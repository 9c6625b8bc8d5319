"""Texts that the official encoding adds to a prompt, and which release adds them when.

The wording is the protocol the model was trained on: every character counts.
"""

from collections.abc import Collection

from ds4mlx.chat.segments import Segment, markup, outside
from ds4mlx.chat.tokens import DSML, THINK, THINK_END
from ds4mlx.errors import DataError

_ABSOLUTE_MAXIMUM = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to"
    " resolve the root cause, rigorously stress-testing your logic against all potential paths,"
    " edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step,"
    " considered alternative, and rejected hypothesis to ensure absolutely no assumption is left"
    " unchecked.\n\n"
)
_BEYOND_MAXIMUM = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance:"
    " exhaustively decompose the problem into its most fundamental components, trace every causal"
    " chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles"
    " and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
# The same text belongs to another effort in each release.
_EFFORTS = {
    "april": {"none": "", "low": "", "high": "", "max": _ABSOLUTE_MAXIMUM},
    "0731": {"none": "", "low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM},
}
_TOOLS_HEAD = f"""## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), pass the value in JSON format \
and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning \
inside {THINK}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_TAIL = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
_RESPONSE_FORMAT = """## Response Format:

You MUST strictly adhere to the following schema to reply:
"""


def check_thinking(thinking: str) -> None:
    """Raises DataError unless `thinking` is none, low, high or max."""
    _check("thinking", thinking, _EFFORTS["april"])


def effort_prefix(thinking: str, release: str) -> str:
    """The text between BOS and the first message; DataError for an unknown effort or release."""
    check_thinking(thinking)
    _check("release", release, _EFFORTS)
    return _EFFORTS[release][thinking]


def tools_section(schemas: tuple[str, ...]) -> list[Segment]:
    """What announces the tools; one schema is one line of JSON."""
    return [markup(_TOOLS_HEAD), outside("\n".join(schemas)), markup(_TOOLS_TAIL)]


def response_format_section(schema: str) -> list[Segment]:
    """What announces the wanted form of the answer; `schema` is JSON."""
    return [markup(_RESPONSE_FORMAT), outside(schema)]


def _check(option: str, value: str, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise DataError(f"{option} must be one of {', '.join(choices)}, not {value!r:.80}")
