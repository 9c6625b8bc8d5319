"""Options whose value may be left out, which Typer does not have."""

from typing import Any

from typer.core import TyperCommand

# What each stands for without a value.
VALUES = {"--cors": "*"}


class WithOptionalValues(TyperCommand):
    """A command that takes `--cors` alone, at the end or before another option, as `--cors=*`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line with the values put in that were left out."""
        return super().parse_args(ctx, completed(args))


def completed(args: list[str]) -> list[str]:
    """The arguments, each with its value."""
    following = [*args[1:], "-"]
    return [
        f"{arg}={VALUES[arg]}" if arg in VALUES and after.startswith("-") else arg
        for arg, after in zip(args, following, strict=False)
    ]
