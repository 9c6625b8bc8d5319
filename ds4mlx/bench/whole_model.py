"""How fast a model prefills and decodes, at which depth, with what memory and how many launches."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from ds4mlx.bench.costs import Target, cost, rows_read, weights_read
from ds4mlx.bench.drafting import Drafting
from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.graph import kinds
from ds4mlx.engine import room
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.room import PREFILL_STEP
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.layer import LayerState
from ds4mlx.state.row_forms import RowForm
from ds4mlx.state.step import Step, commit

Fill = Literal["real", "synthetic", "mixed"]
DEEPEST = 65_536  # tokens that "mixed" still prefills
WARM = 3  # decoded tokens before the clock runs


@dataclass(frozen=True)
class Row:
    """Of some sequences at one depth: tokens a second, and what one step, a token of each, costs.

    fill: "real" or "synthetic", as of `Asked`. prefill_tokens: those that prefill_tokens_per_s is of.
    decode_tokens_per_s: of all sequences together; decode_ms, host_ms: of a step, the host's share
    being what it takes to build and submit it. operations: of MLX's graph as it ran here, launches by
    kernel and others by kind as counted for `counted_for` (see `costs`). weights_gb and rows_gb: what a
    step reads by arithmetic; moved_gb: what it reads and writes as it is launched. bandwidth_share: of
    reading what arithmetic says in the time that reading it alone would take here. draft_*: with
    drafts, of a text of code; how many are accepted, and how many tokens a round of them gives.
    """

    depth: int
    batch: int
    fill: str
    prefill_tokens: int
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float
    decode_ms: float
    host_ms: float
    operations: int
    counted_for: str
    launches_per_layer: float
    kernels: dict[str, int]
    others: dict[str, int]
    weights_gb: float
    rows_gb: float
    moved_gb: float | None
    largest_output_mb: float | None
    bandwidth_share: float | None
    peak_gb: float
    draft_tokens_per_s: float | None = None
    draft_acceptance: float | None = None
    draft_tokens_per_round: float | None = None


@dataclass(frozen=True)
class Asked:
    """What is measured. gen: steps that are timed. batch: sequences that are decoded at once.

    fill: "real" prefills the depth, "synthetic" only a chunk that ends there, after random rows of the
    right shapes, "mixed" is the former up to DEEPEST tokens. target: for which launches are counted;
    None: no kernels. bandwidth: bytes a second that the device reads. drafting: how drafts are
    measured, if they are, at depths that are prefilled.
    """

    gen: int
    fill: Fill = "real"
    batch: int = 1
    target: Target | None = "metal"
    bandwidth: float | None = None
    drafting: Drafting | None = None


def bench(
    model: Model,
    depths: Sequence[int],
    asked: Asked,
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for each depth: `depth` tokens of prompt of each sequence, then decoded ones."""
    rows = []
    for depth in depths:
        note(f"depth {depth}")
        rows.append(_at(model, depth, asked))
        mx.clear_cache()
    return rows


def check_room(
    config: ModelConfig, depth: int, gen: int, ctx: int | None, weights: int, batch: int = 1
) -> None:
    """Raises DataError if the context or the memory cannot take what is to be measured.

    depth, gen: of the deepest row. ctx: a bound below the model's own. weights: their bytes. batch:
    sequences at once.
    """
    limit = min(ctx or config.max_position_embeddings, config.max_position_embeddings)
    total = depth + WARM + gen
    if total > limit:
        raise DataError(
            f"a depth of {depth} tokens, {WARM} decoded to warm up and {gen} measured exceed the "
            f"context of {limit} tokens"
        )
    room.plan(config, weights, total, sequences=batch).check()


def _at(model: Model, depth: int, asked: Asked) -> Row:
    mx.reset_peak_memory()
    real = asked.fill == "real" or (asked.fill == "mixed" and depth <= DEEPEST)
    read, rate, states = (prefilled if real else continued)(model, depth, asked.batch)
    times, hosts, operations = decode(model, states, asked.gen)
    peak, seconds = mx.get_peak_memory(), statistics.median(times)
    spent = cost(model, states, asked.target)
    weights, rows = weights_read(model, asked.batch), asked.batch * rows_read(model, depth)
    states.clear()
    drafted = asked.drafting.measure(depth, asked.gen) if asked.drafting and real else None
    least = None if asked.bandwidth is None else (weights + rows) / asked.bandwidth
    return Row(
        depth=depth,
        batch=asked.batch,
        fill="real" if real else "synthetic",
        prefill_tokens=read,
        prefill_tokens_per_s=None if rate is None else round(rate, 2),
        decode_tokens_per_s=round(asked.batch / seconds, 3),
        decode_ms=round(1000 * seconds, 3),
        host_ms=round(1000 * statistics.median(hosts), 3),
        operations=operations,
        counted_for=asked.target or "no kernels",
        launches_per_layer=round(spent.launches_per_layer, 2),
        kernels=spent.kernels,
        others=spent.others,
        weights_gb=_scaled(weights, 1e9),
        rows_gb=_scaled(rows, 1e9),
        moved_gb=None if spent.moved is None else _scaled(spent.moved, 1e9),
        largest_output_mb=None if spent.largest is None else _scaled(spent.largest, 1e6),
        bandwidth_share=None if least is None else round(least / seconds, 4),
        peak_gb=_scaled(peak, 1e9),
        draft_tokens_per_s=drafted and drafted.tokens_per_s,
        draft_acceptance=drafted and drafted.acceptance,
        draft_tokens_per_round=drafted and drafted.per_round,
    )


def _scaled(count: int, unit: float) -> float:
    """With four digits after the first."""
    return float(f"{count / unit:.5g}")


def prefilled(model: Model, depth: int, batch: int) -> tuple[int, float, list[DecodeState]]:
    """Tokens prefilled of each sequence, tokens a second, and the states; before, two chunks compile."""
    seconds, states = 0.0, []
    for turn in range(-1, batch):
        count = depth if turn >= 0 else min(depth, 2 * PREFILL_STEP)
        state = model.make_cache()
        spent = _read(model, count, state, depth + turn)
        if turn >= 0:
            seconds += spent
            states.append(state)
    return depth, batch * depth / seconds, states


def continued(model: Model, depth: int, batch: int) -> tuple[int, float | None, list[DecodeState]]:
    """The same of one chunk of the first sequence, which ends at the depth, after random rows.

    Another chunk before it compiles. No rate where the depth has no room for two.
    """
    chunk, rate = min(PREFILL_STEP, depth // 2), None
    state = synthetic_state(model, depth - 2 * chunk)
    for seed in range(2 if chunk else 0):
        rate = chunk / _read(model, chunk, state, depth + seed)
    return chunk, rate, [state, *(synthetic_state(model, depth) for _ in range(1, batch))]


def _read(model: Model, count: int, state: DecodeState, seed: int) -> float:
    """Seconds of prefilling so many random tokens."""
    ids = mx.random.randint(0, model.args.vocab_size, (count,), key=mx.random.key(seed)).tolist()
    begun = time.perf_counter()
    prefill(model, ids, state)  # type: ignore[arg-type]
    return time.perf_counter() - begun


def decode(
    model: Model, states: Sequence[DecodeState], gen: int
) -> tuple[list[float], list[float], int]:
    """Greedy decoding: seconds of each step, the host's share of them, and a step's operations.

    A step is submitted before the tokens of the one before have come, as `generate` does it.
    """
    token, times, hosts, operations = mx.ones((len(states),), mx.int32), [], [], 0
    done = time.perf_counter()
    for step in range(WARM + gen):
        begun, before = time.perf_counter(), token
        token = mx.argmax(model.step(token, states), axis=-1)
        if step == 0:
            operations = sum(kinds(token).values())
        mx.async_eval(token)
        submitted = time.perf_counter()
        mx.eval(before)
        before_done, done = done, time.perf_counter()
        if step >= WARM:
            times.append(done - before_done)
            hosts.append(submitted - begun)
    mx.eval(token)
    return times, hosts, operations


def synthetic_state(model: Model, tokens: int) -> DecodeState:
    """A state as after `tokens` tokens, of random rows."""
    cache = model.make_cache()
    for state in cache:
        _fill(state, model, tokens)
        mx.eval(state.state)
    return cache


def _fill(state: LayerState, model: Model, tokens: int) -> None:
    dtype, step = model.dtype, Step(0, tokens)
    kept = min(tokens, state.before)
    state.window.load(_random_rows(state.form, kept, dtype), tokens)
    for part in state.compressors:
        recent = tokens - part.needed(tokens)
        part.recent.load(mx.random.normal((recent, 2, part.channels)), tokens)
        part.rows.extend(_random_rows(part.form, tokens // part.ratio, dtype), step)
    commit([step])


def _random_rows(form: RowForm, count: int, dtype: mx.Dtype) -> mx.array:
    return form.pack(mx.random.normal((count, form.width)).astype(dtype))
