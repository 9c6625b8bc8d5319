"""llama.cpp's control vectors: GGUF files with `direction.N`, F32 (D,), for layers N from 1 on.

llama.cpp adds `direction.N` to what layer N gives, of DeepSeek-V4 to all four streams: `streams`. It has
no direction for layer 0. The generator that comes with it writes what it has measured in layer N - 1 as
`direction.N`; files are read as they are applied. A file may say what it is for by keys that begin with
`glp.` (those of the format GGUF Layer Projection, version 1, which ds4 reads): `mode`, `hook_point`
and `alpha_default`. llama.cpp itself reads none of them, and adds.
"""

import math
import re
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from ds4mlx.config import ModelConfig
from ds4mlx.convert.gguf_container import GGUFFile
from ds4mlx.errors import DataError
from ds4mlx.research.stated import Stated
from ds4mlx.research.steering import OPERATIONS, Steering

ARCHITECTURE = "controlvector"
HOOKS = {
    "streams": "residual_stream_post_layer",
    "ffn.out": "ffn_out_pre_residual",
    "attn.out": "attn_out_pre_residual",
}
SITES = {hook: site for site, hook in HOOKS.items()}


def read(path: Path) -> tuple[Stated, dict[int, np.ndarray]]:
    """What a file says, and its directions. Raises DataError."""
    file = GGUFFile(path)
    kind = file.text("general.architecture")
    if kind != ARCHITECTURE:
        raise DataError(f"{path}: holds {kind!r}, not a control vector")
    return _stated(file), {_layer(path, name): file.floats(name) for name in file.tensors}


def _stated(file: GGUFFile) -> Stated:
    """What its keys say, which must be something that is done here."""
    mode, hook = file.text("glp.mode"), file.text("glp.hook_point")
    if mode is not None and mode not in OPERATIONS:
        raise DataError(f"{file.path}: its glp.mode, {mode!r}, is not known here")
    if hook is not None and hook not in SITES:
        raise DataError(f"{file.path}: its glp.hook_point, {hook!r}, is not known here")
    for key in ("glp.spec_version", "glp.rank"):
        if file.value(key) not in (None, 1):
            raise DataError(
                f"{file.path}: its {key} is {file.value(key)}, and only 1 is known here"
            )
    return Stated(mode, None if hook is None else SITES[hook], _scale(file))


def _scale(file: GGUFFile) -> float | None:
    scale = file.value("glp.alpha_default")
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise DataError(f"{file.path}: its glp.alpha_default is {scale!r}")
    return scale


def _layer(path: Path, name: str) -> int:
    found = re.fullmatch(r"direction\.([1-9][0-9]{0,5})", name, re.ASCII)
    if found is None:
        raise DataError(f"{path}: tensor {name!r} is none of direction.1, direction.2 and so on")
    return int(found[1])


def write(path: Path, steering: Steering, config: ModelConfig) -> None:
    """Write one that says what it is for. Raises DataError for what it has no words for."""
    if steering.site not in HOOKS:
        raise DataError(f"control vectors are for {', '.join(HOOKS)}, and not for {steering.site}")
    if 0 in steering.directions:
        raise DataError("control vectors have none for layer 0: leave it out, as with only(...)")
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string("controlvector.model_hint", "deepseek4")
    writer.add_uint32("controlvector.layer_count", config.num_hidden_layers - 1)
    writer.add_uint32("glp.spec_version", 1)
    writer.add_string("glp.mode", steering.operation)
    writer.add_string("glp.hook_point", HOOKS[steering.site])
    writer.add_float32("glp.alpha_default", steering.scale)
    added = steering.operation == "add"
    for layer, direction in (steering.directions if added else steering.unit()).items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
