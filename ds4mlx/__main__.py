"""`python -m ds4mlx` is the `ds4mlx` command."""

from ds4mlx.cli.main import main

main()
