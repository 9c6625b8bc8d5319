"""Which formats each layer's routed experts get in the recipe `q2-auto`: files, and the table.

A file is JSON and replays the choice it was made for: `formats` are what is followed, beside them
stand the costs that led to them, in nats a token (or in relative square errors where no sensitivity was
measured), and of what the choice was made.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.weights.inventory import Entry

KIND, CHOICE = "ds4mlx choice 1", "choice.json"
# What a layer gives formats to; gate and up are read by one kernel, which takes one format for both.
ROLES = {"gate_up": ("w1", "w3"), "down": ("w2",)}
# The formats that kernels read there, beside the exact one.
READ = {"gate_up": ("iq2_xxs", "q2_k", "q4_k"), "down": ("q2_k", "q4_k")}
Place = tuple[int, str]  # layer and role


@dataclass(frozen=True)
class Choice:
    """Formats of every place; costs of each format there; and what all was made of."""

    formats: Mapping[Place, str]
    costs: Mapping[Place, Mapping[str, float]]
    budget: int | None = None
    made_from: str | None = None

    def of(self, entry: Entry, config: ModelConfig) -> str:
        """The format of a stack of experts."""
        return self.formats[place_of(entry, config)]

    @property
    def listed(self) -> list[list[str]]:
        """The formats, place by place."""
        return [[*map(str, place), format] for place, format in sorted(self.formats.items())]

    @property
    def expected(self) -> float:
        """The sum of the costs, of those that are known."""
        return sum(costs.get(self.formats[p], 0.0) for p, costs in self.costs.items())

    @classmethod
    def read(cls, path: Path, config: ModelConfig, exact: str) -> "Choice":
        """For a model whose experts the format `exact` holds. Raises DataError naming the file."""
        places = [(n, role) for n in range(config.num_hidden_layers) for role in ROLES]
        try:
            content = json.loads(path.read_bytes())
            found, kind = content["layers"], content["kind"]
            formats = {(n, role): found[n][role]["format"] for n, role in places}
            listed = {(n, role): dict(found[n][role].get("costs", {})) for n, role in places}
            costs = {
                place: {f: float(c) for f, c in each.items()} for place, each in listed.items()
            }
            choice = cls(formats, costs, content.get("budget"), content.get("made_from"))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise DataError(f"{path}: is no choice of formats for this model") from None
        if kind != KIND or len(found) != config.num_hidden_layers:
            raise DataError(f"{path}: is no choice of formats for this model")
        for (layer, role), format in formats.items():
            if format not in (*READ[role], exact):
                raise DataError(f"{path}: {role} of layer {layer} cannot be stored as {format!r}")
        return choice

    def written(self) -> bytes:
        """The file. Equal choices give equal bytes."""
        layers = max(layer for layer, _ in self.formats) + 1
        listed = [
            {
                role: {"format": self.formats[n, role], "costs": dict(self.costs[n, role])}
                for role in ROLES
            }
            for n in range(layers)
        ]
        about = {"kind": KIND, "budget": self.budget, "made_from": self.made_from}
        return (json.dumps({**about, "layers": listed}, indent=1) + "\n").encode()

    def __str__(self) -> str:
        """The table: for every place the cost of each format, with a star at the one chosen."""
        lines = []
        for (layer, role), costs in sorted(self.costs.items()):
            taken = self.formats[layer, role]
            each = (f"{f} {cost:.3g}{'*' if f == taken else ' '}" for f, cost in costs.items())
            lines.append(
                f"{layer:>5}  {role:<8} {'  '.join(f'{text:<18}' for text in each)}".rstrip()
            )
        head = "layer  what     format and what it is expected to cost, * chosen"
        return "\n".join([head, *lines, f"expected cost of all: {self.expected:.4g}"])


def place_of(entry: Entry, config: ModelConfig) -> Place:
    """The place of a stack of experts; the MTP block's are those of the last main layer."""
    number = re.match(r"layers\.(\d+)\.", entry.name)
    layer = int(number[1]) if number else config.num_hidden_layers - 1
    return layer, "down" if ".w2." in entry.name else "gate_up"
