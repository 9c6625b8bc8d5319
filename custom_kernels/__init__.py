"""GPU kernels of ds4mlx, one kernel a file: body, wrapper and plain-MLX reference together."""
