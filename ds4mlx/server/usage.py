"""What an answer took, as OpenAI's clients read it, and the server's own figures beside it."""

from typing import Any

from ds4mlx.engine.request import Ended, Started
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


def responses_usage(started: Started | None, ended: Ended) -> dict[str, Any]:
    """The same by the names of Responses."""
    prompt, cached = _prompt(started)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "output_tokens": ended.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": ended.reasoning_tokens},
        "total_tokens": prompt + ended.completion_tokens,
    }


def messages_usage(started: Started | None, ended: Ended | None) -> dict[str, Any]:
    """Anthropic's usage: what was cached is no part of `input_tokens`; so far, or at the end."""
    prompt, cached = _prompt(started)
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": ended.completion_tokens if ended else 0,
        "output_tokens_details": {"thinking_tokens": ended.reasoning_tokens if ended else 0},
    }


def _prompt(started: Started | None) -> tuple[int, int]:
    return (started.prompt_tokens, started.cached_tokens) if started else (0, 0)
