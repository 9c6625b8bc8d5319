"""The two files of a dictionary in SAELens's form, checked: what kind it is, and its arrays.

What is not read here is refused by the name that the file has for it: other architectures and
activations, normalised activations, reshaped heads, scalings by decoder norms or finetuning.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.formats import TAGS
from ds4mlx.weights.tensor_file import TensorFile

# What each kind has besides W_enc (D, F), W_dec (F, D) and b_dec (D,): arrays (F,).
ARRAYS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
TYPES = ("F32", "F16", "BF16")
# Keys, and the values that change nothing.
PLAIN: dict[str, tuple[object, ...]] = {
    "normalize_activations": (None, "none", False),
    "reshape_activations": (None, "none"),
    "finetuning_scaling_factor": (None, False),
    "rescale_acts_by_decoder_norm": (None, False),
}


@dataclass(frozen=True)
class Described:
    """Kind and sizes: D channels, F features. centred: whether b_dec is taken off the value first. k: of topk."""

    architecture: str
    width: int
    features: int
    centred: bool
    k: int


def describe(path: Path) -> Described:
    """What `cfg.json` says. Raises DataError naming it."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON: {error}") from None
    if not isinstance(said, dict):
        raise DataError(f"{path}: is no JSON object")
    try:
        return _described(said)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _described(said: Mapping[str, Any]) -> Described:
    for key, plain in PLAIN.items():
        if said.get(key) not in plain:
            raise DataError(f"{key} is {said[key]!r}, which is not read here, only {plain[1]!r}")
    centred = said.get("apply_b_dec_to_input", True)
    if not isinstance(centred, bool):
        raise DataError(f"apply_b_dec_to_input is {centred!r}, not true or false")
    width, features, kind = _whole(said, "d_in"), _whole(said, "d_sae"), _architecture(said)
    options = said.get("activation_fn_kwargs")
    k = 0
    if kind == "topk":
        k = _whole(said if "k" in said or not isinstance(options, dict) else options, "k")
    if k > features:
        raise DataError(f"k is {k}, of {features} features")
    return Described(kind, width, features, centred, k)


def _architecture(said: Mapping[str, Any]) -> str:
    """The kind; older files name topk by its activation alone."""
    kind = said.get("architecture", "standard")
    activation = said.get("activation_fn_str", said.get("activation_fn")) or "relu"
    if kind not in tuple(ARRAYS):  # whatever the file has there
        raise DataError(f"architecture is {kind!r}, and only {', '.join(ARRAYS)} are read here")
    if activation == "topk" and kind in ("standard", "topk"):
        return "topk"
    if activation != "relu":
        raise DataError(
            f"activation_fn_str is {activation!r}, and only relu and topk are read here"
        )
    return str(kind)


def _whole(said: Mapping[str, Any], key: str) -> int:
    value = said.get(key)
    if type(value) is not int or value < 1:
        raise DataError(f"{key} is {value!r}, not a whole number from 1 on")
    return value


def read_arrays(path: Path, about: Described) -> dict[str, mx.array]:
    """The arrays that a kind has, float32. Raises DataError naming the file."""
    file = TensorFile(path)
    shapes = {"W_enc": (about.width, about.features), "W_dec": (about.features, about.width)}
    shapes |= {"b_dec": (about.width,)}
    shapes |= dict.fromkeys(ARRAYS[about.architecture], (about.features,))
    try:
        if more := sorted(file.tensors.keys() - shapes.keys()):
            raise DataError(f"{path}: {about.architecture} dictionaries have no {more[0]}")
        return {name: _array(file, name, shape) for name, shape in shapes.items()}
    finally:
        file.close()


def _array(file: TensorFile, name: str, shape: tuple[int, ...]) -> mx.array:
    info = file.info(name)
    if info.dtype not in TYPES or info.shape != shape:
        raise DataError(
            f"{file.path}: {name} is {info.dtype} {list(info.shape)}, not a float of {list(shape)}"
        )
    tag = TAGS[info.dtype]
    bits: Any = np.frombuffer(file.read(name, 0, info.nbytes), tag.numpy).reshape(shape)
    values = mx.array(bits).view(tag.mlx or mx.float32).astype(mx.float32)
    if not mx.isfinite(values).all():
        raise DataError(f"{file.path}: {name} has values that are not finite")
    return values
