"""Weights to MLX model directories: convert, verify, inspect; and the quantisers by themselves."""

from ds4mlx.convert.conversion import convert
from ds4mlx.convert.gguf_source import GGUFSource
from ds4mlx.convert.inspection import inspect
from ds4mlx.convert.merging import merge
from ds4mlx.convert.quantise import Quantised, dequantize, quantize
from ds4mlx.convert.verification import verify

read_gguf = GGUFSource

__all__ = [
    "Quantised",
    "convert",
    "dequantize",
    "inspect",
    "merge",
    "quantize",
    "read_gguf",
    "verify",
]
