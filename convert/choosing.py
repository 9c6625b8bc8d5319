"""What a conversion by `q2-auto` follows: a file, what it has chosen before, or a choice made now."""

import sys
from pathlib import Path
from typing import NamedTuple

from ds4mlx.convert.allocation import Basis, choose
from ds4mlx.convert.choice import CHOICE, Choice
from ds4mlx.convert.importance import Importance
from ds4mlx.convert.moments import Moments
from ds4mlx.convert.recipes import choose_recipe
from ds4mlx.convert.sensitivity import Sensitivity
from ds4mlx.convert.sources import Source
from ds4mlx.errors import DataError


class Wanted(NamedTuple):
    """What is asked of `q2-auto`.

    budget: bytes that all weight files may take; sensitivity: a file that says how much each layer
    matters, all alike without one; choice: a file to follow instead of both.
    """

    budget: int | None
    sensitivity: str | Path | None
    choice: str | Path | None

    def check(self, recipe: str | None) -> None:
        """DataError for what the recipe has no use for, or lacks."""
        if recipe != "q2-auto":
            if any(each is not None for each in self):
                raise DataError("a budget, sensitivities and a choice are for recipe q2-auto only")
        elif (self.budget is None) == (self.choice is None):
            raise DataError("recipe q2-auto needs a budget or a choice to follow, and not both")
        elif self.choice is not None and self.sensitivity is not None:
            raise DataError("a choice is followed as it is, whatever the sensitivities are")


def chosen(
    wanted: Wanted,
    recipe: str | None,
    source: Source,
    importance: Importance | None,
    moments: Moments | None,
    target: Path,
    progress: bool,
) -> Choice | None:
    """The choice that a conversion into `target` follows; None for other recipes.

    What an interrupted conversion has chosen, from all the same, is not chosen again.
    """
    wanted.check(recipe)
    if choose_recipe(recipe, source) != "q2-auto":
        return None
    entries = [entry for found in source.inventory.values() for entry in found]
    exact = source.exact(next(entry for entry in entries if entry.kind == "experts"))
    if wanted.budget is None:
        return Choice.read(Path(wanted.choice or "").expanduser(), source.config, exact)
    steep = Sensitivity.even(source.config.num_hidden_layers)
    if wanted.sensitivity is None:
        print("note: without sensitivities all layers count alike", file=sys.stderr)
    else:
        path = Path(wanted.sensitivity).expanduser()
        steep = Sensitivity.read(path, source.config.num_hidden_layers)
    basis = Basis(source, importance, moments, steep, wanted.budget)
    if (target / CHOICE).exists():
        kept = Choice.read(target / CHOICE, source.config, exact)
        if kept.made_from == basis.digest(kept):
            return kept
    return choose(basis, progress)
