"""How help is laid out: the whole first paragraph of every command, however long."""

from typing import Any

from typer.core import TyperGroup


class Commands(TyperGroup):
    """A group whose list of commands wraps long descriptions instead of cutting them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section with one entry for each command."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, " ".join((command.help or "").split("\n\n")[0].split()))
            for name, command in commands
            if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
