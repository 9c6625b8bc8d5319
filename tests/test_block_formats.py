"""GGUF's block types: our planes stand for exactly the values that gguf-py reads."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from ds4mlx import DataError
from ds4mlx.convert import dequantize
from ds4mlx.formats import BLOCK_FORMATS
from ds4mlx.formats.gguf_blocks import BLOCK_BYTES

TYPES = ["Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ3_XXS", "MXFP4"]
# Where the half-precision scales of a block are.
HALVES = {
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q4_K": [0, 2],
    "Q6_K": [208],
    "IQ2_XXS": [0],
    "IQ3_XXS": [0],
    "MXFP4": [],
}
# Zero of both signs, subnormals, the smallest normal, the largest, one.
SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC00]


def random_blocks(name: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes, with finite half-precision scales."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, BLOCK_BYTES[name.lower()]), np.uint8)
    for place in HALVES[name]:
        raw[..., place + 1] &= 0xBF  # an exponent below the one of infinity
    if name == "MXFP4":
        raw[..., 0] %= 255
    return raw


def same(name: str, raw: np.ndarray) -> None:
    """Ours equals gguf-py's bit for bit."""
    flat = np.ascontiguousarray(raw.reshape(len(raw), -1))
    want = gguf.quants.dequantize(flat, Type[name])
    got = dequantize(flat, name)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.array_equal(got.view(np.uint32), want.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("seed", range(4))
def test_random_blocks(name, seed):
    same(name, random_blocks(name, 7, 5, seed))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0])
def test_blocks_of_one_byte(name, byte):
    raw = np.full((1, 3, BLOCK_BYTES[name.lower()]), byte, np.uint8)
    for place in HALVES[name]:
        raw[..., place : place + 2] = np.array([[0x66, 0x2E]], np.uint8)  # 0.1
    if name == "MXFP4" and byte == 0xFF:
        raw[..., 0] = 254
    same(name, raw)


@pytest.mark.parametrize("name", [t for t in TYPES if HALVES[t]])
def test_special_scales(name):
    raw = random_blocks(name, len(SPECIAL) ** len(HALVES[name]), 1, 9)
    grid = np.stack(np.meshgrid(*[SPECIAL] * len(HALVES[name])), -1).reshape(len(raw), -1)
    for column, place in enumerate(HALVES[name]):
        raw[:, 0, place : place + 2] = grid[:, column, None].astype(np.uint16).view(np.uint8)
    same(name, raw)


@given(st.sampled_from(TYPES), st.binary(min_size=2 * 210, max_size=2 * 210))
def test_any_bytes(name, raw):
    size = BLOCK_BYTES[name.lower()]
    blocks = np.frombuffer(raw, np.uint8)[: len(raw) // size * size].reshape(1, -1, size).copy()
    for place in HALVES[name]:
        blocks[..., place + 1] &= 0xBF
    if name == "MXFP4":
        blocks[..., 0] %= 255
    same(name, blocks)


def test_every_scale_of_mxfp4():
    raw = random_blocks("MXFP4", 255, 1, 0)
    raw[:, 0, 0] = np.arange(255)
    same("MXFP4", raw)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types(name):
    raw = np.random.default_rng(0).integers(0, 256, (3, 64), np.uint8)
    raw[..., 3::4] &= 0xBF
    raw[..., 1::4] &= 0xBF
    same(name, raw)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_planes_take_no_more_than_the_blocks(name):
    found = BLOCK_FORMATS[name]
    raw = random_blocks(name.upper(), 2, 4, 1).reshape(2, -1)
    planes = found.from_blocks(raw)
    assert sum(plane.nbytes for plane in planes.values()) == raw.nbytes
    empty = found.empty((2, 4 * found.block))
    assert {p: (a.shape, a.nbytes) for p, a in planes.items()} == {
        p: (a.shape, a.nbytes) for p, a in empty.items()
    }


@pytest.mark.parametrize("name", BLOCK_FORMATS)
@pytest.mark.parametrize("pairs", [3, 40])
def test_gather_decodes_only_what_is_chosen(name, pairs):
    """A NaN in an expert that nobody chose must not be seen; equal to the product of each pair."""
    found, rng = BLOCK_FORMATS[name], np.random.default_rng(5)
    raw = np.stack([random_blocks(name.upper(), 6, 2, s).reshape(6, -1) for s in range(5)])
    planes = {p: mx.array(a) for p, a in found.from_blocks(raw).items()}
    planes["d"][4] = mx.full(planes["d"][4].shape, mx.nan, mx.float16)
    experts = rng.integers(0, 4, pairs)
    x = rng.normal(size=(pairs, 1, 2 * found.block)).astype(np.float32)
    got = np.array(found.gather(planes, mx.array(x), mx.array(experts), False))
    weight = np.array(found.decode({p: a[:4] for p, a in planes.items()}))
    want = np.einsum("pmi,poi->pmo", x, weight[experts])
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_what_cannot_be_decoded_is_said():
    with pytest.raises(DataError, match="no type 'q3_k'; there are: f32"):
        dequantize(np.zeros((1, 110), np.uint8), "Q3_K")
    with pytest.raises(DataError, match=r"q2_k: rows of \(1, 83\) bytes are not blocks of 84"):
        dequantize(np.zeros((1, 83), np.uint8), "Q2_K")
    with pytest.raises(DataError, match="q2_k: blocks are bytes, uint8, and not float32"):
        dequantize(np.zeros((1, 84), np.float32), "Q2_K")
