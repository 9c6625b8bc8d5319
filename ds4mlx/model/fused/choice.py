"""Whether a call goes through launches, and which blocks of it go through their modules all the same."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from ds4mlx.custom_kernels import dispatch
from ds4mlx.custom_kernels.products.dense_matvec_text import STRUCTS as DENSE
from ds4mlx.custom_kernels.products.experts import DOWN, UP
from ds4mlx.model.attention import Attention
from ds4mlx.model.batch import Batch
from ds4mlx.model.block import Block
from ds4mlx.model.compressed_attention import HeavyAttention, SparseAttention
from ds4mlx.model.fused.seen import HIDDEN
from ds4mlx.model.fused.sequences import compressors_of
from ds4mlx.model.linear import GroupedLinear, Linear, Matrix, Projection
from ds4mlx.model.moe import MoE
from ds4mlx.model.taps import wanted

# Sequences that the launches of a step take.
MOST_STEPPED = 8
ATTENTIONS = (Attention, HeavyAttention, SparseAttention)


_wanted: ContextVar[bool | None] = ContextVar("launches", default=None)


@contextlib.contextmanager
def launches(used: bool = True) -> Iterator[None]:
    """Inside the block steps go through launches, by plain operations where kernels are not used; or
    through the modules: for comparisons."""
    before = _wanted.set(used)
    try:
        yield
    finally:
        _wanted.reset(before)


def takes(batch: Batch) -> bool:
    """Whether the tokens of a call are one of each of a few sequences, and launches are used here."""
    spans = batch.spans
    each = len(spans) <= MOST_STEPPED and all(s.step.end - s.step.offset == 1 for s in spans)
    wanted = _wanted.get()
    return each and (dispatch.in_use() if wanted is None else wanted)


def by_modules(layers: Sequence[Block]) -> frozenset[int]:
    """Blocks whose modules are not what the launches know, or of which somebody wants what these hide."""
    return unknown(layers) | hiding(layers)


def unknown(layers: Sequence[Block]) -> frozenset[int]:
    """Blocks whose modules are not what the launches know."""
    return frozenset(n for n, block in enumerate(layers) if not known(block))


def hiding(layers: Sequence[Block]) -> frozenset[int]:
    """Blocks of which somebody wants what the launches hide."""
    return frozenset(n for n, block in enumerate(layers) if wanted(block._site, *HIDDEN))


def known(block: Block) -> bool:
    """Whether the launches compute what a block's modules do."""
    own = type(block) is Block and type(block.ffn) is MoE and type(block.attn) in ATTENTIONS
    return own and _attention_known(block.attn) and _experts_known(block.ffn)


def _attention_known(attn: Attention) -> bool:
    matrices: list[Matrix] = [attn.wq_a, attn.wq_b, attn.wkv, attn.wo_a, attn.wo_b]
    matrices += [m for c in compressors_of(attn) for m in (c.wkv, c.wgate)]
    if isinstance(attn, SparseAttention):
        if attn.indexer.settles_on_gpu:
            return False
        matrices += [attn.indexer.wq_b, attn.indexer.weights_proj]
    return all(map(dense_known, matrices))


def _experts_known(ffn: MoE) -> bool:
    shared, experts = ffn.shared_experts, ffn.experts
    stacks = [stack.operand for stack in (experts.w1, experts.w3, experts.w2)]
    if any(stack is None for stack in stacks):
        return False
    up, also, down = (stack.format for stack in stacks if stack is not None)
    routed = up == also and up in UP.formats and down in DOWN.formats
    return routed and all(map(dense_known, (shared.w1, shared.w2, shared.w3)))


def dense_known(matrix: Matrix) -> bool:
    """Whether a launch multiplies by a matrix as calling it would."""
    plain = type(matrix) in (Linear, GroupedLinear) and matrix.format in DENSE
    return plain and not (isinstance(matrix, Projection) and matrix.adapted)
