"""Prompts like the small model's training text, to collect importances on; none is held out."""

import json
import random
import sysconfig
from pathlib import Path

from ds4mlx.evaluation.held_out import MODULES, filler_of
from ds4mlx.evaluation.recall import document
from ds4mlx.evaluation.tool_calls import case

SEED = 3
SOURCES = ("argparse", "ast", "csv", "dataclasses", "datetime", "enum", "functools", "json.decoder")
DOCUMENTS, TOOL_CASES, CHARACTERS = 4, 24, 9000


def write_prompts(path: Path) -> None:
    """Write a file for `ds4mlx imatrix --prompts`; the same on the same Python version."""
    rng = random.Random(SEED)
    texts = tuple(map(source, SOURCES))
    lines: list[dict] = [{"text": text[:CHARACTERS]} for text in texts]
    filler = filler_of(texts, 700)
    lines += [{"text": document(rng, 8, 6, filler).text} for _ in range(DOCUMENTS)]
    for number in range(TOOL_CASES):
        found, thinking = case(rng), ("none", "high")[number % 2]
        lines.append({"messages": found.messages, "tools": found.tools, "thinking": thinking})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def source(module: str) -> str:
    """A module of the standard library that training may see."""
    assert module not in MODULES
    library = Path(sysconfig.get_paths()["stdlib"])
    return library.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
