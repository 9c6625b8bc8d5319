"""Official weights to MLX model directories."""
