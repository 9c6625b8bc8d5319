"""Dictionaries of features (sparse autoencoders) as SAELens writes them, applied to quantities of a model.

A folder with `cfg.json` and `sae_weights.safetensors`. Of a value x (D,) the features (F,) are, with
c = x - b_dec where `apply_b_dec_to_input` says so, else c = x:

    standard   relu(c W_enc + b_enc)
    topk       the k largest of these, 0 for all others
    jumprelu   c W_enc + b_enc where that is more than `threshold` and more than 0, else 0
    gated      relu(c (W_enc exp(r_mag)) + b_mag) where c W_enc + b_gate is more than 0, else 0

and the value that they stand for is f W_dec + b_dec. What a dictionary was made of is not checked: its
`hook_name` is another project's word.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.research.intervene import Edit
from ds4mlx.research.places import Where
from ds4mlx.research.saelens import Described, describe, read_arrays
from ds4mlx.research.steering import Steering

Arrays = Mapping[str, mx.array]


class Dictionary:
    """A dictionary of F features of values with D channels. `folder` holds the two files.

    Everything is computed in float32. Raises DataError naming a file: it is missing, damaged, or of a kind
    that is not read here.
    """

    def __init__(self, folder: str | Path):
        self.about: Described = describe(Path(folder) / "cfg.json")
        self._arrays = read_arrays(Path(folder) / "sae_weights.safetensors", self.about)

    def __repr__(self) -> str:
        """Its kind and sizes."""
        return f"Dictionary({self.about.architecture}, {self.about.width} -> {self.about.features})"

    def encode(self, value: mx.array) -> mx.array:
        """Features float32 (..., F) of values (..., D)."""
        self._check(value)
        centred = value.astype(mx.float32)
        if self.about.centred:
            centred = centred - self._arrays["b_dec"]
        return ACTIVATIONS[self.about.architecture](centred, self._arrays, self.about.k)

    def decode(self, features: mx.array) -> mx.array:
        """Values float32 (..., D) of features (..., F)."""
        return features @ self._arrays["W_dec"] + self._arrays["b_dec"]

    def error(self, value: mx.array) -> mx.array:
        """What of values (..., D) the features do not stand for, float32 (..., D)."""
        return value.astype(mx.float32) - self.decode(self.encode(value))

    def direction(self, feature: int) -> np.ndarray:
        """What a feature of 1 adds to a value, float32 (D,)."""
        self._check_features([feature])
        return np.array(self._arrays["W_dec"][feature])

    def steering(self, feature: int, site: str, layer: int) -> Steering:
        """The addition of a feature at a quantity of a layer, to be saved, scaled and used as any other."""
        return Steering("add", site, {layer: self.direction(feature)})

    def add(self, amounts: Mapping[int, float]) -> Edit:
        """To be given to `model.intervene`: add so much to features; the rest of the value stays."""
        self._check_features(amounts)
        rows = self._arrays["W_dec"][mx.array(list(amounts))]
        return lambda value, where: value.astype(mx.float32) + mx.array([*amounts.values()]) @ rows

    def set(self, values: Mapping[int, float]) -> Edit:
        """To be given to `model.intervene`: set features; all others and the error stay."""
        self._check_features(values)
        numbers, wanted = mx.array(list(values)), mx.array([float(v) for v in values.values()])

        def change(value: mx.array, where: Where) -> mx.array:
            now = self.encode(value)[..., numbers]
            return value.astype(mx.float32) + (wanted - now) @ self._arrays["W_dec"][numbers]

        return change

    def reconstruct(self) -> Edit:
        """To be given to `model.intervene`: put what the features stand for in the value's place."""
        return lambda value, where: self.decode(self.encode(value))

    def _check(self, value: mx.array) -> None:
        if value.shape[-1] != self.about.width:
            raise DataError(
                f"the dictionary is of {self.about.width} channels, and the value has "
                f"{value.shape[-1]}"
            )

    def _check_features(self, features: Iterable[int]) -> None:
        for feature in features:
            if not 0 <= feature < self.about.features:
                raise DataError(f"there are {self.about.features} features, and no {feature}")


def _standard(centred: mx.array, arrays: Arrays, k: int) -> mx.array:
    return mx.maximum(centred @ arrays["W_enc"] + arrays["b_enc"], 0)


def _topk(centred: mx.array, arrays: Arrays, k: int) -> mx.array:
    features = _standard(centred, arrays, k)
    best = mx.argpartition(-features, k - 1, axis=-1)[..., :k]
    kept = mx.take_along_axis(features, best, axis=-1)
    return mx.put_along_axis(mx.zeros_like(features), best, kept, axis=-1)


def _jumprelu(centred: mx.array, arrays: Arrays, k: int) -> mx.array:
    before = centred @ arrays["W_enc"] + arrays["b_enc"]
    return mx.where(before > arrays["threshold"], mx.maximum(before, 0), 0)


def _gated(centred: mx.array, arrays: Arrays, k: int) -> mx.array:
    gate = centred @ arrays["W_enc"] + arrays["b_gate"]
    size = centred @ (arrays["W_enc"] * mx.exp(arrays["r_mag"])) + arrays["b_mag"]
    return mx.where(gate > 0, mx.maximum(size, 0), 0)


ACTIVATIONS: dict[str, Callable[[mx.array, Arrays, int], mx.array]] = {
    "standard": _standard,
    "topk": _topk,
    "jumprelu": _jumprelu,
    "gated": _gated,
}
