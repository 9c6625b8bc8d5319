"""Official weights to MLX model directories: convert, verify, inspect."""

from ds4mlx.convert.conversion import convert
from ds4mlx.convert.inspection import inspect
from ds4mlx.convert.verification import verify

__all__ = ["convert", "inspect", "verify"]
