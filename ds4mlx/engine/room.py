"""Whether a model and what is asked of it fit into the memory of this machine, before it is loaded.

A `Plan` adds up weights, decode states, the scratch of one chunk of a prompt, and what a KV store
holds while it writes, and compares the sum with `machine.usable`. What other programs or other
models of this process take is not known to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.engine.machine import usable
from ds4mlx.errors import DataError
from ds4mlx.formats.dense import WIDEN_ROWS
from ds4mlx.model.attention import SCRATCH
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import state_bytes
from ds4mlx.state.rounding import Rounding
from ds4mlx.store.policy import Policy
from ds4mlx.weights.directory import ModelDirectory

FLOAT = mx.float32.size
# Tokens of a chunk of a prompt. Twice as many are read an eighth faster on an H200, and take more scratch
# than a machine should need.
PREFILL_STEP = 2048
SAVES = 2  # saves that wait for the disk


class Alive(NamedTuple):
    """Arrays of a chunk that are alive together at worst, 4 bytes an element: of a block of queries, of
    SCRATCH elements at most, and of a token's streams, heads, and pairs with experts."""

    blocks: int
    streams: int
    heads: int
    pairs: int


# With 2,048 tokens of Flash an H200 takes 6.8 GB by plain operations, which this just covers; a CPU,
# which frees arrays at once, takes a third.
PLAIN = Alive(12, 6, 16, 3)
# What is alive where memory is given back 200 operations later than it could be.
KERNELS = Alive(6, 3, 4, 2)


@dataclass(frozen=True)
class Plan:
    """What a model takes with `sequences` states of `context` tokens each, in bytes.

    weights: of all of them. room: what may be taken here. saving: whether a KV store writes. chunk:
    the most tokens of a prompt that are read at a time. kernels: whether they are used. The type of
    activations and the rounding are those of `load`.
    """

    config: ModelConfig
    weights: int
    room: int
    context: int
    dtype: mx.Dtype = mx.bfloat16
    rounding: Rounding = "official"
    sequences: int = 1
    saving: bool = False
    name: str = "the model"
    chunk: int = PREFILL_STEP
    kernels: bool = field(default_factory=lambda: dispatch.in_use())

    @property
    def state(self) -> int:
        """Bytes of all states, room for growth included."""
        return self.sequences * state_bytes(self.config, self.context, self.dtype, self.rounding)

    @property
    def scratch(self) -> int:
        """Bytes that are there only while a chunk of a prompt is read, at most; at any depth."""
        config, tokens = self.config, min(self.context, self.chunk)
        alive = KERNELS if self.kernels else PLAIN
        width, inner = config.hidden_size, config.moe_intermediate_size
        of_token = alive.streams * config.hc_mult * width
        of_token += alive.heads * config.num_attention_heads * config.head_dim
        of_token += alive.pairs * config.num_experts_per_tok * (inner + width)
        blocks = alive.blocks * min(SCRATCH, self._block(tokens))
        return FLOAT * (tokens * of_token + blocks + self._decoded())

    @property
    def buffers(self) -> int:
        """Bytes of rows that wait to be written to a KV store."""
        if not self.saving:
            return 0
        tokens = min(self.context, Policy.interval)
        return SAVES * state_bytes(self.config, tokens, self.dtype, self.rounding)

    @property
    def needed(self) -> int:
        """Bytes of everything together."""
        return self.weights + self.state + self.scratch + self.buffers

    @property
    def fits(self) -> bool:
        """Whether the machine has room for it."""
        return self.needed <= self.room

    @property
    def beyond(self) -> bool:
        """Whether the context is longer than the model's own, for which no memory makes room."""
        return self.context > self.config.max_position_embeddings

    @property
    def verdict(self) -> str:
        """Whether it fits, in words."""
        if self.beyond:
            return f"is beyond the model's own {self.config.max_position_embeddings:,} tokens"
        return "fits" if self.fits else "does not fit"

    def at(self, context: int) -> "Plan":
        """The same for another context."""
        return replace(self, context=context)

    def largest_context(self) -> int:
        """The most tokens that each state can have here, up to the model's own limit; 0 if none."""
        low, high = 0, self.config.max_position_embeddings + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle).fits else (low, middle)
        return low

    def refusal(self) -> str | None:
        """Why it is refused, with the figures and the context that fits; None where it fits."""
        if self.fits:
            return None
        largest = self.largest_context()
        instead = f"a context of {largest:,} tokens fits" if largest else "no context fits"
        return (
            f"{self.name} with {self._asked()} needs {_gigabytes(self.needed)} of memory "
            f"({self._parts()}), and this machine lets {_gigabytes(self.room)} be used, in which "
            f"{instead}"
        )

    def check(self) -> None:
        """Raises DataError where it does not fit."""
        refusal = self.refusal()
        if refusal is not None:
            raise DataError(refusal)

    def as_dict(self, contexts: Sequence[int]) -> dict[str, Any]:
        """The figures at several contexts, ready for JSON."""
        figures = ("context", "weights", "state", "scratch", "buffers", "needed")
        plans = [self.at(tokens) for tokens in contexts]
        rows = [{name: getattr(plan, name) for name in figures} for plan in plans]
        for row, plan in zip(rows, plans, strict=True):
            row["fits"] = plan.fits and not plan.beyond
        return {"room": self.room, "largest_context": self.largest_context(), "contexts": rows}

    def text(self, contexts: Sequence[int]) -> str:
        """The same for people."""
        lines = [f"this machine lets {self.room:,} bytes be used; a model as above takes of them"]
        lines.append(f"{'context':>10} {'scratch':>18} {'store':>14} {'all together':>18}")
        for tokens in contexts:
            plan = self.at(tokens)
            figures = f"{plan.scratch:>18,} {plan.buffers:>14,} {plan.needed:>18,}"
            lines.append(f"{tokens:>10,} {figures}  {plan.verdict}")
        lines.append(f"the largest context that fits: {self.largest_context():,} tokens")
        return "\n".join(lines)

    def _asked(self) -> str:
        states = f"{self.sequences} contexts" if self.sequences > 1 else "a context"
        return f"{states} of {self.context:,} tokens"

    def _parts(self) -> str:
        parts = {"weights": self.weights, "state": self.state, "scratch": self.scratch}
        parts |= {"saving": self.buffers} if self.saving else {}
        return ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())

    def _block(self, tokens: int) -> int:
        """Elements of scores, or of chosen rows, that a block of a chunk's queries has at most."""
        config = self.config
        queries, rows = min(tokens, config.sliding_window), self.context + config.sliding_window
        chosen = min(rows, config.index_topk) * (config.head_dim + config.num_attention_heads)
        dense = config.num_attention_heads * (rows // 128 + 3 * config.sliding_window)
        return queries * max(chosen, dense, rows // 4 + config.index_n_heads * 64)

    def _decoded(self) -> int:
        """Elements of the largest matrices that a product may decode at a time."""
        config = self.config
        heads = config.num_attention_heads * config.head_dim
        low, width = config.o_groups * config.o_lora_rank, config.hidden_size
        sides = [heads * config.q_lora_rank, low * heads // config.o_groups, width * low]
        sides.append(3 * width * config.moe_intermediate_size)
        return max(3 * max(sides), min(config.vocab_size, WIDEN_ROWS) * width)


def plan(
    config: ModelConfig,
    weights: ModelDirectory | int,
    context: int | None = None,
    dtype: mx.Dtype = mx.bfloat16,
    rounding: Rounding = "official",
    **more: Any,
) -> Plan:
    """The plan of a model that is not loaded: of a directory, or of so many bytes of weights.

    context: tokens of each state; without one, a chunk of a prompt. more: other fields of a `Plan`.
    """
    if isinstance(weights, ModelDirectory):
        more = {"name": str(weights.path), **more}
        weights = sum(file.stat().st_size for file in weights.files)
    tokens = min(PREFILL_STEP, config.max_position_embeddings) if context is None else context
    return Plan(config, weights, usable(), tokens, dtype, rounding, **more)


def of_model(model: Model, context: int, **more: Any) -> Plan:
    """The plan of a loaded model."""
    arrays = dict(tree_flatten(model.parameters())).values()
    weights = sum(array.nbytes for array in arrays)
    return plan(model.args, weights, context, model.dtype, model.rounding, **more)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
