"""Saved logits: a safetensors file of token ids and what some model made of them.

`tokens` is an integer array (T,), or (B, T) for sequences that stand alone. Logits (..., vocab) at
every token, float32, float16 or bfloat16, are called `logits`, or `NAME.logits` where a file holds
those of several models. Read and written a block at a time.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ds4mlx.durable import put_in_place
from ds4mlx.errors import DataError
from ds4mlx.formats import TAGS
from ds4mlx.weights.tensor_file import TensorFile, header

TOKENS, LOGITS = "tokens", "logits"
INTEGERS = {"I32": np.int32, "I64": np.int64, "U32": np.uint32, "U16": np.uint16}
FLOATS = ("F32", "F16", "BF16")


class LogitsFile:
    """A file of saved logits. Raises DataError naming the file and tensor for any other."""

    def __init__(self, path: Path):
        self.path, self.file = path, TensorFile(path)
        self.tokens = self._tokens()
        self.names = [n for n in self.file.tensors if n == LOGITS or n.endswith(f".{LOGITS}")]
        if not self.names:
            raise DataError(f"{path}: holds no tensor called {LOGITS} or NAME.{LOGITS}")
        for name in self.names:
            self._check(name)

    def vocabulary(self, name: str) -> int:
        """Logits a token."""
        return self.file.info(name).shape[-1]

    def rows(self, name: str, sequence: int, first: int, count: int) -> mx.array:
        """Logits (count, vocab) of a sequence from token `first` on, float32."""
        info, width = self.file.info(name), self.vocabulary(name)
        tag = TAGS[info.dtype]
        row = width * tag.nbytes
        place = sequence * self.tokens.shape[1] + first
        values = np.frombuffer(self.file.read(name, place * row, count * row), np.uint8)
        array = mx.array(values).view(tag.mlx or mx.float32)
        return array.reshape(count, width).astype(mx.float32)

    def _tokens(self) -> np.ndarray:
        """Token ids (B, T)."""
        info = self.file.info(TOKENS)
        if info.dtype not in INTEGERS or len(info.shape) not in (1, 2) or not info.nbytes:
            raise DataError(
                f"{self.path}: tensor {TOKENS} is {info.dtype} {list(info.shape)}, expected integers "
                "(T,) or (B, T)"
            )
        raw = self.file.read(TOKENS, 0, info.nbytes)
        return np.frombuffer(raw, INTEGERS[info.dtype]).reshape(-1, info.shape[-1]).astype(np.int64)

    def _check(self, name: str) -> None:
        info = self.file.info(name)
        tokens = self.file.info(TOKENS).shape
        if info.dtype not in FLOATS or info.shape[:-1] != tokens or not info.nbytes:
            raise DataError(
                f"{self.path}: tensor {name} is {info.dtype} {list(info.shape)}, expected floats "
                f"{[*tokens, 'vocabulary']}"
            )


def write_logits(
    path: Path,
    sequences: Sequence[Sequence[int]],
    vocabulary: int,
    blocks: Iterable[mx.array],
) -> None:
    """Write sequences of one length and, as they come, their logits: blocks (n, vocab) in order.

    The file is written whole or not at all. Raises DataError saying what the system refused.
    """
    tokens = np.array(sequences, np.int32)
    shapes = {
        TOKENS: ("I32", tokens.shape),
        LOGITS: ("F32", (*tokens.shape, vocabulary)),
    }
    try:
        with put_in_place(path) as temporary, temporary.open("wb") as file:
            file.write(header(shapes))
            file.write(tokens.tobytes())
            for block in blocks:
                file.write(np.array(block.astype(mx.float32)).tobytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
