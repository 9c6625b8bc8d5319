"""Peak memory and speed of converting layers of V4-Flash's own shapes.

Writes a synthetic official checkpoint (random codes; about 9 GB: embedding, head, and two layers with
all 256 experts), converts it in a process of its own, and reports that process's peak resident size
and, on a GPU, what it took of the GPU's memory.

    python benchmarks/convert_memory.py --scratch DIR [--recipe R] [--layers N] [--results FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from device import device

from ds4mlx.config import ModelConfig
from ds4mlx.convert.official import INDEX, scale_name
from ds4mlx.weights import tensor_file
from ds4mlx.weights.inventory import Entry, experts, inventory

LIMIT = 1.5e9
ROWS = 1024
CONVERT = """
import sys
import mlx.core as mx
from ds4mlx.convert import convert
convert(*sys.argv[1:])
print(mx.get_peak_memory())
"""
STORED = {"matrix": "F8_E4M3", "experts": "I8", "plain": "BF16", "exact": "F32", "ids": "I64"}


def main() -> None:
    """Run the benchmark; exit code 1 if the peak is above the limit."""
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        nbytes = synthesise(source, arguments.layers)
        seconds, peak, arrays = convert(source, target, arguments.recipe)
        written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    result = {
        "device": device(),
        "layers": arguments.layers,
        "recipe": arguments.recipe,
        "source_bytes": nbytes,
        "written_bytes": written,
        "peak_resident_bytes": peak,
        "peak_array_bytes": arrays,
        "seconds": round(seconds, 1),
        "source_mb_per_second": round(nbytes / seconds / 1e6),
    }
    for key, value in result.items():
        print(f"{key:<22} {value:>20,}" if isinstance(value, int) else f"{key:<22} {value!s:>20}")
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(peak > LIMIT)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="where to put twice the bytes")
    parser.add_argument("--recipe", default="official")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--results", type=Path)
    return parser.parse_args()


def synthesise(path: Path, layers: int) -> int:
    """Write a checkpoint of `layers` Flash layers; its bytes of weights."""
    values = {
        **ModelConfig().model_dump(mode="json", exclude={"release"}),
        "num_hidden_layers": layers,
        "compress_ratios": [(4, 128)[i % 2] for i in range(layers)],
        "num_nextn_predict_layers": 0,
        "num_hash_layers": 1,
    }
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(values))
    weight_map = {}
    for shard, entries in inventory(ModelConfig.from_dict(values)).items():
        tensors = {name: stored for entry in entries for name, stored in official(entry).items()}
        write(path / f"model-{shard}", tensors)
        weight_map |= dict.fromkeys(tensors, f"model-{shard}")
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def official(entry: Entry) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Official name -> (type, shape) of every tensor of an entry."""
    found = {}
    shape = entry.shape[1:] if entry.kind == "experts" else entry.shape
    for expert in range(experts(entry)):
        name, dtype = entry.official(expert), STORED[entry.kind]
        if dtype == "I8":
            found[name] = (dtype, (shape[0], shape[1] // 2))
            found[scale_name(name)] = ("F8_E8M0", (shape[0], shape[1] // 32))
        else:
            found[name] = (dtype, shape)
        if dtype == "F8_E4M3":
            found[scale_name(name)] = ("F8_E8M0", tuple(-(-n // 128) for n in shape))
    return found


def write(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    with file.open("wb") as out:
        out.write(tensor_file.header(tensors))
        for dtype, shape in tensors.values():
            for start in range(0, shape[0], ROWS):  # little memory: a child's peak counts ours too
                random(dtype, start, (min(ROWS, shape[0] - start), *shape[1:])).tofile(out)


def random(dtype: str, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rows from `start` on: codes without NaN, or ids that differ within a row."""
    if dtype == "I64":
        return (np.arange(start, start + shape[0])[:, None] * 7 + np.arange(shape[1])) % 256
    if dtype in ("BF16", "F32"):
        values = RNG.standard_normal(shape, np.float32)
        return values if dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
    codes = RNG.integers(0, 256, shape, np.uint8)
    return codes % 0x7F if dtype == "F8_E4M3" else codes % 20 + 110 if "E8M0" in dtype else codes


def convert(source: Path, target: Path, recipe: str) -> tuple[float, int, int]:
    """Seconds, peak resident bytes, and peak bytes of MLX's arrays of a conversion."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, str(source), str(target), recipe]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        arrays = int(child.stdout.read() or 0)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit("the conversion failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - begun, usage.ru_maxrss * unit, arrays


RNG = np.random.default_rng(0)

if __name__ == "__main__":
    main()
