"""The quantities that can be recorded and changed: their names, shapes, types and meanings."""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.model.taps import site_of

# Whether a quantity has a value for each token of a call, or for each row of one sequence so far.
Of = Literal["tokens", "rows"]
# What a value without an end, as long as there are rows, is filled up with where calls are joined.
FILL = {"visible": False, "indexer.scores": -float("inf"), "compressed": 0, "weights.rows": -1}


@dataclass(frozen=True)
class Site:
    """A named quantity: the shape that a trace gives, its type, and where in the paper it stands.

    Letters in a shape: B sequences, L tokens, R compressed rows so far, K compressed rows that are
    attended to (R, or in CSA layers at most index_topk). `fixed`: an intervention cannot change it.
    """

    shape: tuple[int | str, ...]
    dtype: mx.Dtype
    where: str
    of: Of = "tokens"
    fixed: bool = False


def sites(model: Model) -> dict[str, Site]:
    """Every name that `trace` and `intervene` take, in the order in which the quantities are made."""
    config, dtype = model.args, model.dtype
    made = {"embed": Site(("B", "L", config.hidden_size), dtype, "embedding of the token")}
    for block in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        site = site_of(config, block)
        draft = site.startswith("mtp")
        if draft:
            made[f"{site}embed"] = Site(
                made["embed"].shape, dtype, "MTP: the next token's embedding"
            )
        made |= {site + name: found for name, found in _block(config, block, dtype)}
        made |= {site + name: found for name, found in _head(config, dtype) if draft}
    return _main_first(made, dict(_head(config, dtype)))


def _main_first(made: dict[str, Site], head: dict[str, Site]) -> dict[str, Site]:
    """The head after the main layers, and draft blocks at the end."""
    main = {name: site for name, site in made.items() if not name.startswith("mtp.")}
    return main | head | made


def _head(config: ModelConfig, dtype: mx.Dtype) -> Iterator[tuple[str, Site]]:
    n, width = config.hc_mult, config.hidden_size
    yield "head.streams", _tokens((n, width), dtype, "mHC: streams that the head is given")
    yield "head.pre", _tokens((n,), mx.float32, "mHC: weights of the head's collapse")
    yield "head.collapsed", _tokens((width,), dtype, "mHC: weighted sum of the streams")
    yield "head.in", _tokens((width,), dtype, "the same after the last RMSNorm")
    yield "logits", _tokens((config.vocab_size,), mx.float32, "logits of the next token")


def _block(config: ModelConfig, block: int, dtype: mx.Dtype) -> Iterator[tuple[str, Site]]:
    """What one block makes."""
    ratio, width = config.ratio(block), config.hidden_size
    yield from _hyper(config, "hc_attn", dtype, "attention")
    yield "attn.in", _tokens((width,), dtype, "input of attention, after RMSNorm")
    yield "attn.query_latent", _tokens((config.q_lora_rank,), dtype, "compressed query, normed")
    rows = "sliding window: the token's key and value, rotated and rounded"
    yield "attn.window_rows", _tokens((config.head_dim,), dtype, rows)
    if ratio:
        yield from _rows(config, ratio, dtype)
    yield from _weights(config, ratio)
    yield "attn.out", _tokens((width,), dtype, "output of attention")
    both = _tokens((config.hc_mult, width), dtype, "mHC: streams between attention and experts")
    yield "attn.streams", both
    yield from _hyper(config, "hc_ffn", dtype, "the experts")
    yield from _experts(config, dtype)
    yield "streams", _tokens(both.shape[2:], dtype, "mHC: residual streams after the layer")


def _hyper(config: ModelConfig, name: str, dtype: mx.Dtype, of: str) -> Iterator[tuple[str, Site]]:
    n, width = config.hc_mult, config.hidden_size
    yield f"{name}.streams", _tokens((n, width), dtype, f"mHC: residual streams before {of}")
    yield f"{name}.pre", _tokens((n,), mx.float32, f"mHC: weights of the streams in {of}'s input")
    yield f"{name}.collapsed", _tokens((width,), dtype, "mHC: that input, before RMSNorm")
    yield f"{name}.post", _tokens((n,), mx.float32, f"mHC: weights of {of}'s output in the streams")
    mixes = f"mHC: doubly stochastic weights from stream to stream around {of}"
    yield f"{name}.comb", _tokens((n, n), mx.float32, mixes)


def _rows(config: ModelConfig, ratio: int, dtype: mx.Dtype) -> Iterator[tuple[str, Site]]:
    """What layers with compressed rows make of them."""
    kind = {4: "CSA", 128: "HCA"}[ratio]
    rows = f"{kind}: compressed keys and values so far, one of {ratio} tokens each"
    yield "attn.rows", Site(("B", "R", config.head_dim), dtype, rows, "rows")
    if ratio == 4:
        keys = Site(
            ("B", "R", config.index_head_dim), dtype, "CSA: the indexer's keys so far", "rows"
        )
        yield "attn.indexer.rows", keys
    yield "attn.visible", _tokens(("R",), mx.bool_, f"{kind}: compressed rows that a token may see")
    if ratio == 4:
        scores = "CSA: lightning indexer's scores, -inf where a row is not visible"
        yield "attn.indexer.scores", _tokens(("R",), mx.float32, scores)
        chosen = "CSA: numbers of the rows that the indexer chooses, -1 where there are fewer"
        yield "attn.indexer.chosen", _tokens((config.index_topk,), mx.int32, chosen)


def _weights(config: ModelConfig, ratio: int) -> Iterator[tuple[str, Site]]:
    """What each head makes of the rows that a token sees."""
    heads, window = config.num_attention_heads, config.sliding_window
    near = "sliding window: positions of the rows, the token's own last, -1 before the first"
    yield "attn.weights.positions", _tokens((window,), mx.int32, near, fixed=True)
    seen = "sliding window: which of these rows the token sees"
    yield "attn.window_visible", _tokens((window,), mx.bool_, seen)
    if ratio:
        far = "compressed rows that the token attends to, -1 where there are fewer"
        yield "attn.weights.rows", _tokens(("K",), mx.int32, far, fixed=True)
    yield "attn.weights.window", _tokens((heads, window), mx.float32, "attention to window rows")
    if ratio:
        far = "attention to compressed rows"
        yield "attn.weights.compressed", _tokens((heads, "K"), mx.float32, far)
    share = "attention sink: the share that goes to no row"
    yield "attn.weights.sink", _tokens((heads,), mx.float32, share, fixed=True)


def _experts(config: ModelConfig, dtype: mx.Dtype) -> Iterator[tuple[str, Site]]:
    """What router and experts make."""
    width, count, k = config.hidden_size, config.n_routed_experts, config.num_experts_per_tok
    yield "ffn.in", _tokens((width,), dtype, "input of the experts, after RMSNorm")
    yield "ffn.router.logits", _tokens((count,), mx.float32, "MoE: affinity before its activation")
    yield "ffn.router.scores", _tokens((count,), mx.float32, "MoE: affinity, sqrt(softplus)")
    choice = "MoE: what experts are chosen by: affinity and bias; in hash layers k..1, then below 1"
    yield "ffn.router.choice", _tokens((count,), mx.float32, choice)
    yield "ffn.router.experts", _tokens((k,), mx.int32, "MoE: the chosen experts")
    yield "ffn.router.weights", _tokens((k,), mx.float32, "MoE: their weights, in the same order")
    hidden = "MoE: what each chosen expert multiplies by its w2, weighted"
    yield "ffn.experts.hidden", _tokens((k, config.moe_intermediate_size), dtype, hidden)
    yield "ffn.experts.each", _tokens((k, width), dtype, "MoE: output of each expert, weighted")
    yield "ffn.experts.out", _tokens((width,), mx.float32, "MoE: sum of the routed experts")
    yield "ffn.shared_experts.out", _tokens((width,), dtype, "MoE: output of the shared expert")
    yield "ffn.out", _tokens((width,), dtype, "output of routed and shared experts")


def _tokens(shape: tuple[int | str, ...], dtype: mx.Dtype, where: str, fixed: bool = False) -> Site:
    return Site(("B", "L", *shape), dtype, where, fixed=fixed)


def matching(patterns: tuple[str, ...], known: Mapping[str, Site]) -> list[str]:
    """The known names that any pattern matches, in their order.

    `*` stands for one dotted part and `**` for any number; the name of a group stands for all under
    it. DataError: a pattern matches nothing; it lists near names.
    """
    found: set[str] = set()
    for pattern in patterns:
        regular = _regular(pattern)
        mine = [name for name in known if regular.fullmatch(f"{name}.")]
        if not mine:
            near = difflib.get_close_matches(pattern, known, 5, 0.5) or list(known)[:5]
            raise DataError(f"{pattern!r} names no quantity of this model; near: {', '.join(near)}")
        found |= set(mine)
    return [name for name in known if name in found]


def _regular(pattern: str) -> re.Pattern[str]:
    """Of names with a full stop behind each part."""
    several = r"(?:[^.]+\.)*"
    parts = [re.escape(part).replace(r"\*", "[^.]+") + r"\." for part in pattern.split(".")]
    doubled = re.escape("**").replace(r"\*", "[^.]+") + r"\."
    return re.compile("".join(several if part == doubled else part for part in parts) + several)


def fill(name: str) -> float | None:
    """What the last axis is filled up with where later calls have more rows; None: it has an end."""
    return next((value for end, value in FILL.items() if name.endswith(end)), None)
