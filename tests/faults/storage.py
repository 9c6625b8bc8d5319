"""Mistakes in reading stored weights."""

import mlx.core as mx

from faults.listing import change, experts, storage_fault


@storage_fault
def nibbles_swapped(patch, model):
    def swap(codes):
        return ((codes & 0x0F0F0F0F) << 4) | ((codes >> 4) & 0x0F0F0F0F)

    change(patch, [m.w1 for m in experts(model)], "weight", swap)


@storage_fault
def fp4_scales_off_by_one_group(patch, model):
    change(patch, [m.w1 for m in experts(model)], "scales", lambda s: mx.roll(s, 1, axis=-1))


@storage_fault
def fp8_scales_off_by_one_tile(patch, model):
    modules = [b.attn.wo_b for b in model.layers]
    change(patch, modules, "scales", lambda s: mx.roll(s, 4, axis=-1))


@storage_fault
def fp8_scale_tiles_transposed(patch, model):
    def transpose(scales):
        tiles = scales[::128, ::4]
        return mx.repeat(mx.repeat(tiles.T, 128, axis=0), 4, axis=1)

    change(patch, [b.attn.wo_b for b in model.layers], "scales", transpose)


@storage_fault
def fp4_scales_one_power_low(patch, model):
    change(patch, [m.w2 for m in experts(model)[:1]], "scales", lambda s: s - 1)
