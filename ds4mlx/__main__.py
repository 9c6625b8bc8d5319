"""`python -m ds4mlx` is the `ds4mlx` command."""

from ds4mlx.cli import main

main()
