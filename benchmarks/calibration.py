"""What benchmarks calibrate the small model's conversions by: importances and second moments."""

from pathlib import Path
from typing import NamedTuple

from safetensors.numpy import load_file
from training_text import write_prompts

from ds4mlx.cli.eval_commands import open_to_measure
from ds4mlx.convert.moments import write_moments
from ds4mlx.imatrix.collect import collect
from ds4mlx.weights.tensor_file import TensorFile


class Calibration(NamedTuple):
    """Files of one collection: importances; moments, with each expert's own; and a layer's alone."""

    importance: Path
    per_expert: Path
    moments: Path


def collected(official: Path, work: Path) -> Calibration:
    """From text like the training's, by the official conversion of the model; kept in `work`."""
    prompts = work / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
    names = "importance.gguf", "moments.safetensors", "moments-a-layer.safetensors"
    found = Calibration(*(work / name for name in names))
    collect(
        official,
        prompts,
        found.importance,
        lambda: opened(official)[0],
        moments=found.per_expert,
        per_expert=True,
    )
    if not found.moments.exists():
        write_without_down(found.per_expert, found.moments)
    return found


def write_without_down(path: Path, target: Path) -> None:
    """The moments that a collection of one matrix a layer would have written."""
    arrays = {name: each for name, each in load_file(path).items() if not name.endswith(".w2")}
    tokens = int(TensorFile(path).metadata["tokens"])
    write_moments(target, dict(sorted(arrays.items())), tokens, "without down")


def opened(path: Path):
    """A model directory in float32, and its tokenizer."""
    return open_to_measure(path, "float32", "official")
