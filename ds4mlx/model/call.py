"""One call of a model, from its tokens and states to the states' moving on."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.model.batch import Batch
from ds4mlx.model.block import Block
from ds4mlx.model.fused.choice import takes
from ds4mlx.model.inputs import Cache, Inputs, Tokens, read_states, read_tokens
from ds4mlx.model.rope import Rotary
from ds4mlx.model.taps import end
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.layer import LayerState
from ds4mlx.state.row_forms import StateForm
from ds4mlx.state.step import Step, commit

Out = TypeVar("Out")
# The layers' states of one sequence, which outlive a call or do not.
Layers = DecodeState | list[LayerState]


class Called(Protocol):
    """What a call needs of a model."""

    args: ModelConfig
    layers: list[Block]
    _rotary: dict[int, Rotary]

    @property
    def state_form(self) -> StateForm: ...
    def _passing(self) -> list[LayerState]: ...


class Call:
    """One call of a model: its checked inputs, its states, the batch, and its end."""

    def __init__(self, model: Called, tokens: Tokens, cache: Cache):
        self.kept = cache is not None
        self.inputs: Inputs = read_tokens(tokens, model.args.vocab_size, self.kept)
        lengths = self.inputs.lengths
        self.states: list[DecodeState] = []
        if self.kept:
            self.states = read_states(cache, len(lengths), model.state_form, len(model.layers))
            steps = [s.step(n) for s, n in zip(self.states, lengths, strict=True)]
        else:
            steps = [Step(0, length) for length in lengths]
        self.layers: list[Layers] = [*self.states] or [model._passing() for _ in lengths]
        self.batch = Batch.of(self.inputs.ids, steps, model._rotary, kept=self.kept)

    @property
    def steps(self) -> bool:
        """Whether it goes through launches: a token of each of a few sequences with states."""
        return self.kept and takes(self.batch)

    def done(self, flat: mx.array) -> mx.array | list[mx.array]:
        """What was made of each token, (N, ...), shaped as the tokens; the states move on."""
        return self._ended([flat], lambda outs: self.inputs.shaped(outs[0]))

    def moved(self, logits: mx.array, streams: mx.array) -> tuple[mx.array, mx.array]:
        """Logits (B, vocab), and streams; the states move on."""
        return self._ended([logits, streams], lambda outs: (outs[0], outs[1]))

    def _ended(self, outs: list[mx.array], shaped: Callable[[list[mx.array]], Out]) -> Out:
        """`outs`, shaped, after whose evaluation the states are evaluated; commits them last."""
        if not self.kept:
            end()
            return shaped(outs)
        steps = [span.step for span in self.batch.spans]
        for state, step in zip(self.states, steps, strict=True):
            outs = mx.depends(outs, state.finish(step))
        out = shaped(outs)
        commit(steps)
        end()
        return out
