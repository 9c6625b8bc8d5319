"""What a file of steering says of itself, and what has to be said for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.research.steering import OPERATIONS, Operation, Steering


class Unstated(DataError):
    """A file does not say what is to be done, or where: `missing` has "operation", "site", or both."""

    def __init__(self, path: Path, missing: list[str]):
        self.path, self.missing = path, missing
        super().__init__(self.told({"operation": "operation=", "site": "site="}))

    def told(self, names: Mapping[str, str]) -> str:
        """What is missing, by what the caller calls it, such as "--steer-site "."""
        say = {
            "operation": f"{names['operation']}{' or '.join(OPERATIONS)}",
            "site": f"{names['site']}SITE, such as ffn.out or streams",
        }
        asked = ", and ".join(say[each] for each in self.missing)
        return (
            f"{self.path}: does not say what is to be done with its directions, so that must be said: "
            f"{asked} (files of ds4: project at ffn.out; of llama.cpp: add at streams)"
        )


@dataclass(frozen=True)
class Stated:
    """What a file says: operation, site, scale; None for what it does not."""

    operation: str | None = None
    site: str | None = None
    scale: str | float | None = None

    def agreed(self, path: Path, operation: str | None, site: str | None) -> "Stated":
        """With what the caller says, which must not be something else."""
        for what, own, told in (
            ("operation", self.operation, operation),
            ("site", self.site, site),
        ):
            if None not in (own, told) and own != told:
                raise DataError(f"{path}: its {what} is {own}, as it says itself, and not {told}")
        return replace(self, operation=self.operation or operation, site=self.site or site)

    def steering(self, path: Path, directions: dict[int, np.ndarray]) -> Steering:
        """The steering. Raises Unstated, and DataError for what is none."""
        said = {"operation": self.operation, "site": self.site}
        missing = [name for name, value in said.items() if value is None]
        if missing:
            raise Unstated(path, missing)
        try:
            scale = 1.0 if self.scale is None else float(self.scale)
        except ValueError:
            raise DataError(f"its scale is {self.scale!r}") from None
        return Steering(cast(Operation, self.operation), str(self.site), directions, scale)
