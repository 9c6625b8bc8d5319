"""What a block's launches show of themselves to those who listen, by the names that its modules have.

A quantity that a launch makes together with another is made by a launch of its own while somebody wants
it. Whoever wants what launches never show has the whole block go through its modules, see `choice`.
"""

import mlx.core as mx

from ds4mlx.custom_kernels.layer.after import After, Beside
from ds4mlx.custom_kernels.layer.carried import Carried, carry
from ds4mlx.custom_kernels.layer.hyper_out import hyper_mix, hyper_out
from ds4mlx.model.taps import BLOCK, tap, wanted

SHOWN = ("hc_attn.streams", "attn.out", "attn.streams", "hc_ffn.streams", "ffn.out", "streams")
HIDDEN = tuple(name for name in BLOCK if name not in SHOWN)


def shown(carried: Carried, site: str, names: tuple[str, ...], fn: mx.array) -> Carried:
    """What is carried on once the streams were passed to those who want them by any of the names.

    fn: the matrix of the hyper-connection that comes next.
    """
    if not wanted(site, *names):
        return carried
    streams = before = carried.streams
    for name in names:
        streams = tap(site, name, streams)
    return carried if streams is before else carry(streams, hyper_mix(streams, fn))


def merged(carried: Carried, out: mx.array, after: After | Beside, fn: mx.array) -> Carried:
    """The streams with what a sublayer gave, out (B, D), and their partial mixes; see `hyper_out`."""
    outs = [out.astype(mx.float32)]
    return carry(*hyper_out(carried.streams, outs, after.post, after.comb, fn))
