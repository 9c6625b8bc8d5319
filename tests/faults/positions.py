"""Mistakes with the rotary embedding."""

import mlx.core as mx

from ds4mlx.custom_kernels.layer.plain import rotate
from ds4mlx.model import attention, batch, compressor, indexer
from faults.listing import fault, retable


@fault
def compress_theta_and_yarn_on_window_layers(patch, model):
    retable(patch, model, [0], True)


@fault
def yarn_on_window_layers(patch, model):
    retable(patch, model, [0], True, compress_rope_theta=model.args.rope_theta)


@fault
def no_yarn(patch, model):
    retable(patch, model, [4, 128], True, scaling={"original_max_position_embeddings": 0})


@fault
def rope_theta_on_compressed_layers(patch, model):
    retable(patch, model, [4, 128], True, compress_rope_theta=model.args.rope_theta)


@fault
def rope_pairs_are_halves(patch, model):
    def halves(x, angles, inverse=False):
        dims = 2 * angles[0].shape[-1]
        tail = x[..., -dims:]
        order = mx.arange(dims).reshape(2, -1).T.flatten()
        turned = rotate(mx.take(tail, order, axis=-1), angles, inverse)
        return mx.concatenate([x[..., :-dims], mx.take(turned, mx.argsort(order), axis=-1)], -1)

    for module in (attention, compressor, indexer):
        patch.setattr(module, "rotate", halves)


@fault
def rope_on_the_first_channels(patch, model):
    def first(x, angles, inverse=False):
        dims = 2 * angles[0].shape[-1]
        return mx.concatenate([rotate(x[..., :dims], angles, inverse), x[..., dims:]], -1)

    for module in (attention, compressor, indexer):
        patch.setattr(module, "rotate", first)


@fault
def output_rotation_not_undone(patch, model):
    patch.setattr(
        attention, "rotate", lambda x, angles, inverse=False: x if inverse else rotate(x, angles)
    )


def place_rows(patch, place):
    """Rotate compressed rows to place(first position, ratio) instead of their first position."""
    usual = batch.row_positions
    patch.setattr(batch, "row_positions", lambda step, ratio: place(usual(step, ratio), ratio))


@fault
def row_rotated_to_the_end_of_its_group(patch, model):
    place_rows(patch, lambda position, ratio: position + ratio - 1)


@fault
def row_rotated_by_its_number(patch, model):
    place_rows(patch, lambda position, ratio: position // ratio)
