"""ds4mlx: DeepSeek-V4-Flash on MLX."""
