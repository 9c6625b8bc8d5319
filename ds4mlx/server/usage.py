"""What an answer took, as OpenAI's clients read it, and the server's own figures beside it."""

from typing import Any

from ds4mlx.engine.request import Ended
from ds4mlx.server.answering import Turn


def usage_of(turn: Turn, ended: Ended) -> dict[str, Any]:
    """OpenAI's usage: the prompt's tokens include those that were cached."""
    prompt, cached = turn.answer.prompt_tokens, turn.answer.cached_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": ended.completion_tokens,
        "total_tokens": prompt + ended.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "completion_tokens_details": {"reasoning_tokens": ended.reasoning_tokens},
    }


def figures_of(turn: Turn, ended: Ended) -> dict[str, Any]:
    """Where the prompt's prefix came from, and tokens per second."""
    return {
        "source": turn.answer.source,
        "prompt_tps": ended.prompt_tps,
        "generation_tps": ended.generation_tps,
    }


def finish_of(ended: Ended, calls: bool) -> str:
    """OpenAI's finish_reason. An answer that was cut is never said to have come to its end."""
    if ended.reason in ("length", "context", "repetition"):
        return "length"
    return "tool_calls" if calls else "stop"


def cause_of(ended: Ended) -> str | None:
    """What finish_reason does not tell: the stop string, or `repetition`, or `context`."""
    if ended.reason == "stop_sequence":
        return ended.stop
    return ended.reason if ended.reason in ("context", "repetition") else None
