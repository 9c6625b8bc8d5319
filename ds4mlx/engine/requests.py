"""What is checked of a request before anything runs: token ids, lengths, counts."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError


def check_ids(config: ModelConfig, ids: Sequence[int], before: int = 0) -> None:
    """Raises DataError unless the model can read the ids, `before` tokens being read already."""
    size, limit = config.vocab_size, config.max_position_embeddings
    wrong = next((int(i) for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise DataError(f"token id {wrong} is outside the vocabulary of {size}")
    if before + len(ids) > limit:
        raise DataError(f"a sequence of {before + len(ids)} tokens exceeds the context of {limit}")


def check_prompt(config: ModelConfig, ids: Sequence[int], before: int, max_tokens: int) -> None:
    """Raises DataError unless `max_tokens` can follow a prompt, itself after `before` tokens."""
    if not ids:
        raise DataError("the prompt is empty")
    check_count("max_tokens", max_tokens)
    total, limit = before + len(ids) + max_tokens, config.max_position_embeddings
    if total > limit:
        raise DataError(
            f"{before + len(ids)} tokens of prompt and {max_tokens} to generate exceed the "
            f"context of {limit}"
        )
    try:
        check_ids(config, ids)
    except DataError as error:
        raise DataError(f"prompt: {error}") from None


def check_count(option: str, value: Any, least: int = 0, end: float = math.inf) -> None:
    """Raises DataError, naming the option, unless `value` is a whole number, least <= value < end."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) < end:
        bounds = f"at least {least}" if end == math.inf else f"from {least} to {int(end) - 1}"
        raise DataError(f"{option} must be a whole number {bounds}, not {value!r:.80}")
