"""Draws docs/terminal.svg: runs two commands, and writes down what they printed."""

import html
import subprocess
import sys
from pathlib import Path

COMMANDS = [
    ["generate", "Write a function that adds two numbers.", "--seed", "1"],
    [*("convert", "ds4mlx/embedded", "~/models/tiny-q2"), "--recipe", "q2", "--dry-run"],
]
WIDTH, LINE, CHARACTER = 92, 18, 8.0


def shown(command: list[str]) -> list[str]:
    """The command as it is typed, and what it printed."""
    run = [sys.executable, "-m", "ds4mlx", *command]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    typed = " ".join(f'"{word}"' if " " in word else word for word in command)
    return [f"$ ds4mlx {typed}", *done.stdout.strip().splitlines(), ""]


def picture(lines: list[str]) -> str:
    """An SVG of lines of text in a dark window; what was typed is bright."""
    width, height = WIDTH * CHARACTER + 32, len(lines) * LINE + 32
    rows = [
        f'<text x="16" y="{32 + n * LINE}" fill="{"#8fd3ff" if line.startswith("$") else "#d6dae0"}">'
        f"{html.escape(line)}</text>"
        for n, line in enumerate(lines)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
            'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" xml:space="preserve">',
            f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#1b1f27"/>',
            *rows,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    lines = [line for command in COMMANDS for line in shown(command)]
    Path(__file__).with_name("terminal.svg").write_text(picture(lines[:-1]))
