"""GPU kernels of ds4mlx, one kernel a file: body, wrapper and plain-MLX reference together.

Formats and model code ask `dispatch`, which says where a kernel takes over.
"""
