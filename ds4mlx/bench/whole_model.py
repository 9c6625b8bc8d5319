"""How fast a model prefills and decodes, at which depth, with what memory and how many launches."""

import csv
import io
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels.graph import kinds
from ds4mlx.engine.machine import check_fits
from ds4mlx.engine.prefill import prefill
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState, state_bytes
from ds4mlx.state.layer import LayerState
from ds4mlx.state.row_forms import RowForm
from ds4mlx.state.step import Step, commit

Fill = Literal["real", "synthetic"]
WARM = 3  # decoded tokens before the clock runs


@dataclass
class Row:
    """At one depth: tokens a second, gigabytes, and what one decoded token costs the host."""

    depth: int
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float
    decode_ms: float
    host_ms: float
    operations: int
    peak_gb: float


def bench(
    model: Model,
    depths: Sequence[int],
    gen: int,
    fill: Fill = "real",
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for each depth: `depth` tokens of prompt, then `gen` decoded ones.

    fill: "real" prefills the depth (twice, as the first time compiles), "synthetic" starts from random
    rows of the right shapes.
    """
    rows = []
    for depth in depths:
        note(f"depth {depth}")
        rows.append(_at(model, depth, gen, fill))
        mx.clear_cache()
    return rows


def check_room(config: ModelConfig, depth: int, gen: int, ctx: int | None, weights: int) -> None:
    """Raises DataError if the context or the memory cannot take what is to be measured.

    depth, gen: of the deepest row. ctx: a bound below the model's own. weights: their bytes.
    """
    limit = min(ctx or config.max_position_embeddings, config.max_position_embeddings)
    total = depth + WARM + gen
    if total > limit:
        raise DataError(
            f"a depth of {depth} tokens, {WARM} decoded to warm up and {gen} measured exceed the "
            f"context of {limit} tokens"
        )
    check_fits(f"the model with a state of {total} tokens", weights + state_bytes(config, total))


def _at(model: Model, depth: int, gen: int, fill: Fill) -> Row:
    rate, cache = None, model.make_cache()
    mx.reset_peak_memory()
    if fill == "real":
        ids = mx.random.randint(0, model.args.vocab_size, (depth,), key=mx.random.key(depth))
        for _ in range(2):
            cache, begun = model.make_cache(), time.perf_counter()
            prefill(model, ids.tolist(), cache)  # type: ignore[arg-type]
            rate = depth / (time.perf_counter() - begun)
    else:
        cache = synthetic_state(model, depth)
    times, hosts, operations = decode(model, cache, gen)
    seconds = statistics.median(times)
    return Row(
        depth=depth,
        prefill_tokens_per_s=None if rate is None else round(rate, 2),
        decode_tokens_per_s=round(1 / seconds, 3),
        decode_ms=round(1000 * seconds, 3),
        host_ms=round(1000 * statistics.median(hosts), 3),
        operations=sum(operations.values()),
        peak_gb=round(mx.get_peak_memory() / 1e9, 3),
    )


def decode(
    model: Model, cache: DecodeState, gen: int
) -> tuple[list[float], list[float], Counter[str]]:
    """Greedy decoding: seconds of each token, the host's share of them, and a token's operations."""
    token, times, hosts = mx.array([[1]]), [], []
    operations: Counter[str] = Counter()
    for step in range(WARM + gen):
        begun = time.perf_counter()
        token = mx.argmax(model.last_logits(token, cache), axis=-1)[None]
        if step == 0:
            operations = kinds(token)
            begun = time.perf_counter()
        mx.async_eval(token)
        encoded = time.perf_counter()
        mx.eval(token)
        if step >= WARM:
            times.append(time.perf_counter() - begun)
            hosts.append(encoded - begun)
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


def table(rows: list[Row]) -> str:
    """For people."""
    lines = [
        f"{'depth':>8} {'prefill t/s':>12} {'decode t/s':>11} {'ms/token':>9} {'host ms':>8} "
        f"{'operations':>10} {'peak GB':>8}"
    ]
    for row in rows:
        rate = "" if row.prefill_tokens_per_s is None else f"{row.prefill_tokens_per_s:.1f}"
        lines.append(
            f"{row.depth:>8} {rate:>12} {row.decode_tokens_per_s:>11.2f} {row.decode_ms:>9.2f} "
            f"{row.host_ms:>8.2f} {row.operations:>10} {row.peak_gb:>8.2f}"
        )
    return "\n".join(lines)


def csv_text(rows: list[Row]) -> str:
    """The rows as CSV, with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(asdict(rows[0])))
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()
