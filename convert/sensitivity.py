"""How much a model's predictions suffer where a layer's routed experts are off, and files that say so.

A file is JSON: for every main layer, and in it for gate and up together and for down, the KL divergence
in nats a token for a relative square error of 1 of the products, as far as it grows in proportion.
`ds4mlx sensitivity` measures it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ds4mlx.convert.choice import ROLES, Place
from ds4mlx.durable import put_in_place
from ds4mlx.errors import DataError

KIND = "ds4mlx sensitivity 1"


@dataclass(frozen=True)
class Sensitivity:
    """Nats of every place, more than 0; `fingerprint` is that of the file."""

    nats: Mapping[Place, float]
    fingerprint: str | None = None

    @classmethod
    def even(cls, layers: int) -> "Sensitivity":
        """As if all layers mattered alike."""
        return cls(dict.fromkeys(product(range(layers), ROLES), 1.0))

    @classmethod
    def read(cls, path: Path, layers: int) -> "Sensitivity":
        """Of a model of so many layers. Raises DataError naming the file."""
        try:
            raw = path.read_bytes()
            content = json.loads(raw)
            listed, kind = content["layers"], content["kind"]
            nats = {(n, r): float(each[r]["nats"]) for n, each in enumerate(listed) for r in ROLES}
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: is no file of sensitivities") from None
        if kind != KIND or not all(math.isfinite(each) and each > 0 for each in nats.values()):
            raise DataError(f"{path}: is no file of sensitivities")
        if len(listed) != layers:
            raise DataError(f"{path}: is of a model with {len(listed)} layers, not {layers}")
        return cls(nats, hashlib.sha256(raw).hexdigest())


def write_sensitivity(path: Path, found: Mapping[Place, tuple[float, float]], tokens: int) -> None:
    """Write (nats, standard error) of every place, measured over so many tokens.

    Raises OSError naming `path`.
    """
    layers = [
        {r: dict(zip(("nats", "standard_error"), found[n, r], strict=True)) for r in ROLES}
        for n in range(len(found) // len(ROLES))
    ]
    content = {"kind": KIND, "tokens": tokens, "layers": layers}
    with put_in_place(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n")
