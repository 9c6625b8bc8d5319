"""The quality table: what each recipe costs a small model, and two strawmen beside them.

Converts a source with every recipe, then measures each model: KL divergence and top-1 agreement to
the `f32` recipe, perplexity of held-out text, recall, tool calls. Rows are kept as they come, so
that an interrupted run goes on; --work keeps the converted models.

    DS4MLX_OPENBLAS=1 python benchmarks/quality.py [--source DIR] [--work DIR] [--scale F] [--ctx N] [--results FILE]
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from calibration import collected, opened
from device import device

from ds4mlx.convert import convert, inspect
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.evaluation import suite
from ds4mlx.evaluation.agreement import save_logits
from ds4mlx.evaluation.strawmen import BITS_PER_WEIGHT, experts_affine, others_affine
from ds4mlx.model.model import Model
from ds4mlx.weights.directory import ModelDirectory

RESULTS = Path(__file__).parent / "results" / "quality_cpu.json"
RECIPES = ("f32", "official", "q4", "q2-q4", "q2")
STEERED, MOMENTS = "q2 with importances", "q2 with moments"
CALIBRATED = (STEERED, MOMENTS, f"{MOMENTS}, down per expert")
# name -> (the conversion it starts from, what is done to it in memory)
STRAWMEN: dict[str, tuple[str, Callable[[Model], set[str]]]] = {
    "everything at 2 bits": (STEERED, others_affine),
    "experts in affine 2 bits": ("official", experts_affine),
}

NAMES = (*RECIPES, *CALIBRATED, *STRAWMEN)


def main() -> None:
    """Make what is missing of the table."""
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = ModelSource(arguments.source, arguments.work)
    run = {
        "source": source.fingerprint(),
        "scale": arguments.scale,
        "ctx": arguments.ctx,
        "device": device(),
    }
    result = kept(arguments.results, run)
    sizes = suite.Sizes(arguments.ctx, arguments.scale)
    for name in NAMES:
        if name not in result["rows"]:
            result["rows"][name] = measure(name, source, sizes)
            arguments.results.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {result['rows'][name]['seconds']}", flush=True)
    table = markdown(result)
    arguments.results.with_suffix(".md").write_text(table)
    print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=EMBEDDED, help="official checkpoint")
    parser.add_argument("--work", type=Path, default=Path("quality-work"), help="scratch folder")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples")
    parser.add_argument("--ctx", type=int, help="context; default: the trained one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def kept(path: Path, run: dict) -> dict:
    """Rows of an earlier run of the same source, scale and device."""
    if path.exists():
        found = json.loads(path.read_text())
        if all(found.get(key) == value for key, value in run.items()):
            return found
    return {**run, "rows": {}}


class ModelSource:
    """Conversions of one checkpoint, and the saved logits, made when first asked for."""

    def __init__(self, source: Path, work: Path):
        self.source, self.work = source, work

    def fingerprint(self) -> str:
        """Checksum of the lossless conversion."""
        return ModelDirectory.open(self.directory("official")).manifest["checksum"]

    def directory(self, name: str) -> Path:
        """A recipe's model directory."""
        path = self.work / name.replace(" ", "-").replace(",", "")
        importance, moments = self.calibrated(name)
        convert(self.source, path, name.split()[0], imatrix=importance, moments=moments)
        return path

    def calibrated(self, name: str) -> tuple[Path | None, Path | None]:
        """The importances and second moments that steer a conversion."""
        if name not in CALIBRATED:
            return None, None
        found = collected(self.directory("official"), self.work)
        if name == STEERED:
            return found.importance, None
        return found.importance, found.moments if name == MOMENTS else found.per_expert

    def logits(self, sizes: suite.Sizes) -> Path:
        """The f32 recipe's logits on held-out text."""
        path = self.work / f"f32-{sizes.scale}-{sizes.context}.safetensors"
        if not path.exists():
            subject = suite.Subject(*opened(self.directory("f32")), sizes)
            save_logits(subject.model, subject.sequences(None), path)
        return path


def measure(name: str, source: ModelSource, sizes: suite.Sizes) -> dict:
    """One row."""
    base, change = STRAWMEN.get(name, (name, None))
    directory = source.directory(base)
    model, tokenizer = opened(directory)
    changed = change(model) if change else set()
    size, weights = stored(directory, changed)
    report = suite.Report(name, base, "float32", "official")
    subject = suite.Subject(model, tokenizer, sizes)
    logits = source.logits(sizes)
    suite.measure_agreement(report, subject, logits, None, opened)
    suite.measure_text(report, subject, None)
    suite.measure_tasks(report, subject, ("recall", "tools"))
    row = {"bytes": size, "bits_per_weight": 8 * size / weights, **asdict(report)}
    for each in row["agreement"]:
        each["reference"] = Path(each["reference"]).name  # wherever it was kept
    return row


def stored(directory: Path, changed: set[str]) -> tuple[int, int]:
    """Bytes of all weights, where modules in `changed` have the strawmen's format; and weights."""
    size = weights = 0
    for tensor in inspect(directory, tensors=True).tensors:
        count = 1
        for side in tensor.shape:
            count *= side
        affine = tensor.name.removesuffix(".weight") in changed
        size += round(count * BITS_PER_WEIGHT / 8) if affine else tensor.bytes
        weights += count
    return size, weights


def markdown(result: dict) -> str:
    """The table of docs/recipes.md."""
    heads = ["", "MB", "bits a weight", "KL to f32, nats", "same top-1", "perplexity"]
    heads += ["recall just beyond the window", "recall among 1,000+ CSA rows"]
    heads += ["valid tool calls", "right tool calls"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    lines += [f"| {' | '.join(cells(name, result['rows'][name]))} |" for name in NAMES]
    counts = next(iter(result["rows"].values()))
    tokens, answers = counts["agreement"][0]["kl"]["count"], counts["tool_calls"][0]["valid"]
    near, far = recall(counts)
    note = f"{tokens:,} tokens for KL, {counts['perplexity']['tokens']:,} at each of four depths "
    note += f"for perplexity, {near['count']} and {far['count']} questions, "
    note += f"{len(counts['tool_calls']) * answers['count']} tool calls; {result['device']}."
    if result["rows"]["q2-q4"]["bytes"] == result["rows"]["q4"]["bytes"]:
        note += " `q2-q4` keeps the last six layers at four bits, which are all that there are."
    return "\n".join([*lines, "", note, ""])


def cells(name: str, row: dict) -> list[str]:
    agreement, calls = row["agreement"][0], row["tool_calls"]
    near, far = recall(row)
    shares = [sum(c[side]["value"] for c in calls) / len(calls) for side in ("valid", "right")]
    return [
        f"`{name}`" if name in RECIPES else name,
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['bits_per_weight']:.2f}",
        f"{agreement['kl']['value']:.3g}",
        f"{agreement['top1']['value']:.1%}",
        f"{row['perplexity']['perplexity']:.3f}",
        *(f"{share['value']:.0%}" if share["count"] else "-" for share in (near, far)),
        *(f"{share:.0%}" for share in shares),
    ]


def recall(row: dict) -> tuple[dict, dict]:
    """Accuracy just beyond the window, and among many rows."""
    every = row["recall"]["results"][0]
    return every["distances"][1]["accuracy"], every["among_many_rows"]


if __name__ == "__main__":
    main()
