"""DeepSeek-V4: embedding, blocks joined by hyper-connections, head, and the MTP blocks.

The module tree carries the official tensor names, so a weight is found by its name in the
checkpoint and a computation by its name in the paper.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, overload

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dispatch
from ds4mlx.errors import DataError
from ds4mlx.model.batch import Batch
from ds4mlx.model.block import Block
from ds4mlx.model.call import Call, Layers
from ds4mlx.model.compressed_attention import SparseAttention
from ds4mlx.model.draft import MTP
from ds4mlx.model.fused.choice import MOST_STEPPED
from ds4mlx.model.fused.step import step_outputs
from ds4mlx.model.fused.traced import Traces
from ds4mlx.model.hyper import HyperHead
from ds4mlx.model.inputs import Cache, Inputs, Tokens, read_states, read_tokens
from ds4mlx.model.linear import Embedding, Linear, RMSNorm, digest_of_adapters
from ds4mlx.model.pace import Pace
from ds4mlx.model.researched import Researched
from ds4mlx.model.rope import rotary_tables
from ds4mlx.model.taps import begin, end, tap
from ds4mlx.precision import keep_float32
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.drafts import Drafts
from ds4mlx.state.kind import StateKind, digest
from ds4mlx.state.layer import LayerState
from ds4mlx.state.rounding import Rounding
from ds4mlx.state.row_forms import StateForm
from ds4mlx.state.step import commit


class Model(Researched):
    """The whole model. Activations have type `dtype`; logits are float32.

    `rounding="official"` rounds KV rows to FP8 and the indexer's queries and rows to FP4, as in the
    forward pass the weights were trained with; "none" leaves them as computed.

    Tokens are int (B, L), an mx.array or NumPy's, or a list of sequences of any lengths; a cache is
    one decode state, or a list of one for each sequence, each at its own depth. A call that raises
    leaves every state as it was. A call that returns has moved the states on, though nothing has
    been computed yet: where evaluating its result fails, as for want of memory, go back with
    `rewind`; the engine's prefill and step do. DataError: a wrong rank or type, no tokens, ids outside the
    vocabulary (see `inputs` for the one kind of call whose ids are not read), a wrong number of
    states, a state of another model, or one state given twice.
    """

    def __init__(
        self,
        args: ModelConfig,
        dtype: mx.Dtype = mx.bfloat16,
        rounding: Rounding = "official",
    ):
        keep_float32()
        super().__init__()
        self.args, self.dtype = args, dtype
        self.rounding: Rounding = rounding
        self.model_type = args.model_type
        self.identity: str | None = None  # of the directory it was loaded from
        self._rotary = rotary_tables(args)
        self._traced = Traces()
        layers, drafts = args.num_hidden_layers, args.num_nextn_predict_layers
        self.embed = Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, i, rounding) for i in range(layers)]
        self.hc_head = HyperHead(args)
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.head = Linear(args.vocab_size, args.hidden_size)
        self.mtp = [MTP(args, i, rounding) for i in range(layers, layers + drafts)]
        self.eval()  # MLX's modules begin in training, in which weights are decoded for gradients

    @overload
    def __call__(self, tokens: mx.array | np.ndarray, cache: Cache = None) -> mx.array: ...
    @overload
    def __call__(self, tokens: Sequence, cache: Cache = None) -> list[mx.array]: ...
    def __call__(self, tokens: Tokens, cache: Cache = None) -> mx.array | list[mx.array]:
        """Logits float32 of every token: (B, L, vocab), or for a list of sequences a list of (L, vocab).

        Each state moves on by its sequence's tokens; L may be 1 or any chunk, at any depth.
        Without a cache the sequences stand alone.
        """
        call = Call(self, tokens, cache)
        return call.done(self._logits(call))

    def last_logits(self, tokens: Tokens, cache: Cache) -> mx.array:
        """Like calling the model, but the head runs for the last tokens only: (B, vocab)."""
        return self.last(tokens, cache)[0]

    def last(self, tokens: Tokens, cache: Cache) -> tuple[mx.array, mx.array]:
        """`last_logits` (B, vocab), and the streams (B, n, D) after the last layer they are made of."""
        call = Call(self, tokens, cache)
        if call.steps:
            begin(call.batch)
            return call.moved(*step_outputs(self, call.batch, call.states))
        streams = self._run(call.batch, call.layers)[call.inputs.last]
        return call.moved(self.logits(streams), streams)

    def step(self, tokens: mx.array | Sequence[int], states: Sequence[DecodeState]) -> mx.array:
        """One more token of up to 8 sequences: int (B,) and B states -> logits (B, vocab)."""
        if len(states) > MOST_STEPPED:
            raise DataError(f"{len(states)} sequences at once: a step takes {MOST_STEPPED} at most")
        column = tokens if isinstance(tokens, mx.array) else np.asarray(tokens)
        if column.ndim != 1:
            raise DataError(f"the tokens of a step must be (B,), not {tuple(column.shape)}")
        return self.last_logits(column[:, None], states)

    @overload
    def streams(self, tokens: mx.array | np.ndarray, cache: Cache = None) -> mx.array: ...
    @overload
    def streams(self, tokens: Sequence, cache: Cache = None) -> list[mx.array]: ...
    def streams(self, tokens: Tokens, cache: Cache = None) -> mx.array | list[mx.array]:
        """Residual streams after the last layer, (B, L, n, D) or a list, in the activation type.

        Evaluating them evaluates the states, so that no graph outlives a token.
        """
        call = Call(self, tokens, cache)
        return call.done(self._run(call.batch, call.layers))

    def read(
        self,
        tokens: Tokens,
        state: DecodeState,
        last: bool,
        on_streams: Callable[[mx.array], None] | None = None,
    ) -> mx.array | None:
        """Feed a chunk (1, L) of a prompt to a state.

        Each half of a layer is evaluated while the next one is built.
        Logits (1, vocab) after it if it is the `last`, else None. Unlike a call it evaluates, and one
        that raises leaves some layers ahead of others, which `load` of an earlier record mends.
        on_streams: told the streams (1, L, n, D) after the last layer, when the state has moved on.
        """
        call = Call(self, tokens, state)
        if last and call.steps:
            begin(call.batch)
            logits, streams = step_outputs(self, call.batch, call.states)
        else:
            streams = self._run(call.batch, call.layers, Pace(call.batch))
            ends = streams[call.inputs.last]
            logits = self.logits(ends) if last else ends
        out, streams = call.moved(logits, streams)
        mx.eval(out)
        if on_streams is not None:
            on_streams(streams[None])
        return out if last else None

    def _logits(self, call: Call) -> mx.array:
        """Logits (N, vocab): by launches in a step, or by modules."""
        if not call.steps:
            return self.logits(self._run(call.batch, call.layers))
        begin(call.batch)
        return step_outputs(self, call.batch, call.states)[0]

    def _run(self, batch: Batch, states: Sequence[Layers], pace: Pace | None = None) -> mx.array:
        """Streams (N, n, D) after the last layer; the changes of the states go into the batch.

        In training without states no kernel is used but to decode weights, since none has a gradient.
        """
        with self._operations(batch):
            return self._through(batch, states, pace)

    def _operations(self, batch: Batch) -> AbstractContextManager[None]:
        """The operations that a call may use."""
        alone = self.training and not batch.kept
        return dispatch.training() if alone else nullcontext()

    def _through(self, batch: Batch, states: Sequence[Layers], pace: Pace | None) -> mx.array:
        """The streams after the layers, one after the other."""
        begin(batch)
        streams = mx.repeat(self.embedded(batch.ids)[:, None], self.args.hc_mult, axis=1)
        for number, layer in enumerate(self.layers):
            held = [state[number] for state in states]
            if pace is None:
                streams = layer(streams, batch, held)
            else:
                streams = pace.through(layer, streams, held)
        return streams

    def embedded(self, ids: mx.array, site: str = "") -> mx.array:
        """ids (...,) -> (..., D); `site`: how the name of this quantity begins."""
        return tap(site, "embed", self.embed(ids).astype(self.dtype))

    def logits(self, streams: mx.array) -> mx.array:
        """Head: collapse (..., n, D), norm, float32 product with the vocabulary."""
        hidden = tap("", "head.in", self.norm(self.hc_head(streams)))
        return tap("", "logits", self.unembedded(hidden))

    def unembedded(self, hidden: mx.array) -> mx.array:
        """hidden (..., D), normed -> logits float32 (..., vocab)."""
        return self.head(hidden.astype(mx.float32))

    def draft(
        self,
        streams: mx.array,
        tokens: Tokens,
        state: DecodeState | Drafts | None = None,
        depth: int = 0,
    ) -> tuple[mx.array, mx.array]:
        """Logits of draft block `depth` and its streams.

        streams: (1, L, n, D) at positions t; tokens: int (1, L), those at t + 1; the logits
        (1, L, vocab) are for t + 2. `state.drafts[depth]` moves on by L positions, at its end as a
        call does; t is its length, which may lag behind `state.offset` but never exceeds it.
        `Drafts` may stand alone, without main layers. Without a state, t begins at 0 and nothing is
        kept. Raises DataError.
        """
        inputs = read_tokens(tokens, self.args.vocab_size, True)
        self._check_draft(streams, inputs, state, depth)
        if isinstance(state, Drafts):
            drafts, records = state, {}
        else:
            drafts = state.drafts if state else Drafts(self.args, self._passing_form)
            records = state.records if state else {}
        step = drafts.step(depth, inputs.lengths[0], records)
        block, site = self.mtp[depth], f"mtp.{depth}."
        batch = Batch.of(inputs.ids, [step], self._rotary, kept=state is not None)
        begin(batch)
        flat = block.joined(streams.flatten(0, 1), self.embedded(inputs.ids, site))
        with self._operations(batch):
            flat = block(flat, batch, [drafts[depth]])
        hidden = tap(site, "head.in", block.norm(block.hc_head(flat, site)))
        logits = tap(site, "logits", self.unembedded(hidden))
        out = mx.depends([logits, flat], drafts.finish(depth, step, records))
        commit([step])
        end()
        return out[0][None], out[1][None]

    def _check_draft(
        self, streams: mx.array, inputs: Inputs, state: DecodeState | Drafts | None, depth: int
    ) -> None:
        """Raises DataError for what `draft` cannot be called with."""
        if not 0 <= depth < len(self.mtp):
            raise DataError(f"the model has {len(self.mtp)} draft blocks, and no number {depth}")
        wanted = (1, inputs.lengths[0], self.args.hc_mult, self.args.hidden_size)
        if len(inputs.lengths) != 1 or streams.shape != wanted:
            raise DataError(f"streams for these tokens must be {wanted}, not {streams.shape}")
        if state is None or isinstance(state, Drafts):
            return
        (state,) = read_states(state, 1, self.state_form, len(self.layers))
        end = state.drafts[depth].offset + inputs.lengths[0]
        if end > state.offset:
            raise DataError(
                f"a draft of {end} tokens is beyond the state, which has {state.offset}"
            )

    @property
    def kind(self) -> StateKind:
        """What its decode states are states of; weights without an identity are read for a name, and
        so are adapters."""
        parameters: Any = tree_flatten(self.parameters())
        weights = self.identity or digest(parameters)
        if adapters := digest_of_adapters(self):
            weights += f" {adapters}"
        return StateKind(self.args, self.dtype, self.rounding, weights)

    @property
    def state_form(self) -> StateForm:
        """How this model's decode states lay out their rows."""
        return StateForm.of(self.args, self.dtype, self.rounding)

    @property
    def _passing_form(self) -> StateForm:
        """How rows lie in calls without states: as values, which have gradients, or where kernels are
        used as in states."""
        as_values = self.training or not dispatch.in_use()
        return self.state_form.of_values(self.dtype) if as_values else self.state_form

    def _passing(self) -> list[LayerState]:
        """The layers' states of a sequence that stands alone."""
        form = self._passing_form
        return [LayerState(self.args, number, form) for number in range(len(self.layers))]

    def make_cache(self) -> DecodeState:
        """An empty decode state."""
        return DecodeState(self.args, self.dtype, self.rounding)

    def settle_ties(self) -> None:
        """Have equal index scores settled on the CPU as llama.cpp does, to compare logits: see `ties`."""
        for layer in self.layers:
            if isinstance(layer.attn, SparseAttention):
                layer.attn.indexer.heap_ties = True

    def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The weights of a converted directory as they are: names and shapes are the model's own."""
        return weights
