"""The seam for named quantities: where a running model may be looked at, and reached into.

A module passes what it makes through `tap` by its name, such as `layers.3.attn.out`, and goes on with
what comes back. Names are those of the model's tensors as far as there are such, `mtp.0.` in the place
of `layers.N.` for draft blocks. Where nobody listens, a tap is one look at a context variable; a
listener hears the calls of its own thread alone. A quantity that a kernel keeps to itself has plain
operations take the kernel's place while somebody wants it.

    embed                         (N, D)       embeddings
    layers.N.hc_attn.{pre,post,comb}           weights of a hyper-connection; pre is hidden in a kernel
    layers.N.attn.in, .out        (N, D)       what attention is given, normed, and gives
    layers.N.attn.query_latent    (N, rank)    normed
    layers.N.attn.window_rows     (N, c)       raw rows, not yet rounded; hidden in a kernel
    layers.N.attn.rows            (R, .)       of one span: compressed rows so far, as laid out
    layers.N.attn.visible         (L, R)       of some queries of one span: the rows they may attend to
    layers.N.attn.indexer.rows    (R, .)       of one span: index rows so far, as laid out
    layers.N.attn.indexer.scores  (L, R)       of some queries of one span, where rows are selected
    layers.N.attn.indexer.chosen  (L, topk)    the rows they choose, some of which may be invisible
    layers.N.attn.streams         (N, n, D)    streams between the two sublayers
    layers.N.hc_ffn.{pre,post,comb}
    layers.N.ffn.in, .out         (N, D)       what the experts are given, normed, and give
    layers.N.ffn.router.scores    (N, E)       hidden in a kernel
    layers.N.ffn.router.experts, .weights      (N, k)
    layers.N.ffn.experts.hidden   (N, k, F)    input of each expert's w2, weighted; hidden in a kernel
    layers.N.ffn.experts.out      (N, D)       weighted sum of the routed experts, float32
    layers.N.ffn.shared_experts.out            (N, D)
    layers.N.streams              (N, n, D)    streams after the block
    head.in                       (..., D)     collapsed streams, normed
    logits                        (..., vocab)
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.model.batch import Batch, Span

# Quantities of a block, as in the table above.
BLOCK = (
    *(f"{site}.{part}" for site in ("hc_attn", "hc_ffn") for part in ("pre", "post", "comb")),
    *("attn.in", "attn.query_latent", "attn.window_rows", "attn.rows", "attn.visible"),
    *("attn.indexer.rows", "attn.indexer.scores", "attn.indexer.chosen"),
    *("attn.out", "attn.streams", "ffn.in", "ffn.router.scores", "ffn.router.experts"),
    *("ffn.router.weights", "ffn.experts.hidden", "ffn.experts.out", "ffn.shared_experts.out"),
    *("ffn.out", "streams"),
)

# What a function that hides a quantity is given, to pass it through: name and value to value.
Inside = Callable[[str, mx.array], mx.array]


class Listener:
    """Hears the quantities it wants, and may replace them. A call that it ends by raising leaves
    all states as they were."""

    def begins(self, batch: Batch) -> None:
        """A call of the model begins, for these tokens."""

    def wants(self, name: str) -> bool:
        """Whether it wants the quantity of that name."""
        raise NotImplementedError

    def take(self, name: str, value: mx.array, span: Span | None) -> mx.array:
        """What the model goes on with in place of `value`, of the same shape and type.

        span: the sequence that the quantity belongs to, None where it is of all of the call.
        """
        raise NotImplementedError


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block the listener hears what this thread's models make, after those before it."""
    before = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(before)


def begin(batch: Batch) -> None:
    """Tell the listeners of a call."""
    for listener in _listeners.get():
        listener.begins(batch)


def tap(site: str, name: str, value: mx.array, span: Span | None = None) -> mx.array:
    """`value`, or what a listener puts in its place; `site` is the beginning of its name."""
    listeners = _listeners.get()
    if not listeners:
        return value
    name = site + name
    for listener in listeners:
        if listener.wants(name):
            value = listener.take(name, value, span)
    return value


def inside(site: str, *names: str) -> Inside | None:
    """The way through for quantities that kernels hide, or None where nobody wants any of them."""
    listeners = _listeners.get()
    if not any(listener.wants(site + name) for listener in listeners for name in names):
        return None
    return lambda name, value: tap(site, name, value)


def listened() -> bool:
    """Whether anybody listens."""
    return bool(_listeners.get())


def heard(site: str) -> bool:
    """Whether anybody wants a quantity of the block whose names begin so."""
    return inside(site, *BLOCK) is not None


def site_of(config: ModelConfig, block: int) -> str:
    """How the names of a block's quantities begin."""
    drafts = block - config.num_hidden_layers
    return f"layers.{block}." if drafts < 0 else f"mtp.{drafts}."
