"""The seam for named quantities: where a running model may be looked at, and reached into.

A module passes what it makes through `tap` by its name, such as `layers.3.attn.out`, and goes on with
what comes back. Names are those of the model's tensors as far as there are such, `mtp.0.` in the place
of `layers.N.` for draft blocks. Where nobody listens, a tap is one look at a context variable; a
listener hears the calls of its own thread alone. A quantity that a kernel keeps to itself has plain
operations take the kernel's place while somebody wants it.

    embed                         (N, D)       embeddings
    layers.N.hc_attn.streams      (N, n, D)    streams before attention
    layers.N.hc_attn.{pre,post,comb}           weights of a hyper-connection; pre is hidden in a kernel
    layers.N.hc_attn.collapsed    (N, D)       streams weighted by pre, not yet normed; hidden too
    layers.N.attn.in, .out        (N, D)       what attention is given, normed, and gives
    layers.N.attn.query_latent    (N, rank)    normed
    layers.N.attn.window_rows     (N, c)       raw rows, not yet rounded; hidden in a kernel
    layers.N.attn.rows            (R, .)       of one span: compressed rows so far, as laid out
    layers.N.attn.indexer.rows    (R, .)       of one span: index rows so far, as laid out

Of some queries of one span, in order; all hidden in kernels. W: the window, K: compressed rows that a
query may attend to, all R, or those that it chooses.

    layers.N.attn.visible         (L, R)       which compressed rows a query sees
    layers.N.attn.indexer.scores  (L, R)
    layers.N.attn.indexer.chosen  (L, topk)    compressed rows, -1 where a query sees fewer
    layers.N.attn.weights.positions   (L, W)   of the raw rows, the query's own last; -1 where none is
    layers.N.attn.window_visible      (L, W)   which of them it sees
    layers.N.attn.weights.rows        (L, K)   numbers of the compressed rows, -1 where it sees none
    layers.N.attn.weights.window      (L, H, W)
    layers.N.attn.weights.compressed  (L, H, K)
    layers.N.attn.weights.sink        (L, H)   the share that goes to no row

Then, of all tokens again:

    layers.N.attn.streams         (N, n, D)    streams between the two sublayers
    layers.N.hc_ffn.{streams,pre,post,comb,collapsed}
    layers.N.ffn.in, .out         (N, D)       what the experts are given, normed, and give
    layers.N.ffn.router.logits    (N, E)       hidden in a kernel, as are
    layers.N.ffn.router.scores    (N, E)       sqrt(softplus(logits)), and
    layers.N.ffn.router.choice    (N, E)       what the best k are chosen by, see `route`
    layers.N.ffn.router.experts, .weights      (N, k)
    layers.N.ffn.experts.hidden   (N, k, F)    input of each expert's w2, weighted; hidden in a kernel
    layers.N.ffn.experts.each     (N, k, D)    output of each expert, weighted; hidden in a kernel
    layers.N.ffn.experts.out      (N, D)       weighted sum of the routed experts, float32
    layers.N.ffn.shared_experts.out            (N, D)
    layers.N.streams              (N, n, D)    streams after the block
    head.streams                  (..., n, D)  streams that the head is given
    head.pre, head.collapsed                   as of a hyper-connection
    head.in                       (..., D)     collapsed streams, normed
    logits                        (..., vocab)

Draft blocks have their own embedding, head and logits, as `mtp.0.embed`, `mtp.0.head.in`, `mtp.0.logits`.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.model.batch import Batch, Span
from ds4mlx.state.changes import changing

# What the core attention tells of each query, and kernels hide.
ATTENDED = (
    *("visible", "indexer.scores", "indexer.chosen", "window_visible"),
    *(f"weights.{part}" for part in ("positions", "rows", "window", "compressed", "sink")),
)
# Quantities of a block, and of the head, as in the table above.
BLOCK = (
    *(
        f"{site}.{part}"
        for site in ("hc_attn", "hc_ffn")
        for part in ("streams", "pre", "post", "comb", "collapsed")
    ),
    *("attn.in", "attn.query_latent", "attn.window_rows", "attn.rows", "attn.indexer.rows"),
    *(f"attn.{name}" for name in ATTENDED),
    *("attn.out", "attn.streams", "ffn.in"),
    *(f"ffn.router.{part}" for part in ("logits", "scores", "choice", "experts", "weights")),
    *("ffn.experts.hidden", "ffn.experts.each", "ffn.experts.out", "ffn.shared_experts.out"),
    *("ffn.out", "streams"),
)
HEAD = ("head.streams", "head.pre", "head.collapsed", "head.in", "logits")

# What a function that hides a quantity is given, to pass it through: name and value to value.
Inside = Callable[[str, mx.array], mx.array]


class Listener:
    """Hears the quantities it wants, and may replace them. A call that it ends by raising leaves
    all states as they were.

    steady: whether it does the same to every call, by operations alone, and keeps nothing of it: so
    calls may be made before anybody has asked for them, and be traced once for all. changes: the name
    of what it does to the model, NAMELESS where that may be anything; None where it replaces nothing.
    """

    steady = False
    changes: str | None = None

    def begins(self, batch: Batch) -> None:
        """A call of the model begins, for these tokens."""

    def ends(self) -> None:
        """It has come to its end; one that raises never does."""

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
    """Inside the block the listener hears what this thread's models make, after those before it.

    It takes only itself away at the end, since a generator may hold a block open beyond those around it.
    """
    _listeners.set((*_listeners.get(), listener))
    name = listener.changes
    try:
        with contextlib.nullcontext() if name is None else changing(name):
            yield
    finally:
        _listeners.set(tuple(each for each in _listeners.get() if each is not listener))


def begin(batch: Batch) -> None:
    """Tell the listeners of a call."""
    for listener in _listeners.get():
        listener.begins(batch)


def end() -> None:
    """Tell the listeners that a call has come to its end."""
    for listener in _listeners.get():
        listener.ends()


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


def listeners() -> tuple[Listener, ...]:
    """Who listens."""
    return _listeners.get()


def steady() -> bool:
    """Whether all who listen do the same to every call, so that calls may be made ahead."""
    return all(listener.steady for listener in _listeners.get())


def wanted(site: str, *names: str) -> bool:
    """Whether anybody wants one of these quantities."""
    return inside(site, *names) is not None


def site_of(config: ModelConfig, block: int) -> str:
    """How the names of a block's quantities begin."""
    drafts = block - config.num_hidden_layers
    return f"layers.{block}." if drafts < 0 else f"mtp.{drafts}."
