"""What second moments gain at 2 bits: KL divergence of `q2` with them against `q2` with importances.

On three texts: A and B, alternate modules of the held-out Python code, and C, prose that nothing was
chosen on. Differences are paired by blocks of 64 tokens, whose standard errors are given. Beside
today's conversions stands `q2` as it was quantised at commit 2f2d5eb, whose blocks are kept in
`results/two_bits_before.json` (--before DIR measures such a conversion, and writes them).

    DS4MLX_OPENBLAS=1 python benchmarks/two_bits.py [--source DIR] [--work DIR] [--results FILE]
"""

import argparse
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from calibration import Calibration, collected, opened
from device import device

from ds4mlx.convert import convert
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.evaluation.agreement import divergence
from ds4mlx.evaluation.held_out import held_out_texts
from ds4mlx.evaluation.scoring import logit_blocks
from ds4mlx.model.model import Model

HERE = Path(__file__).parent
RESULTS, BEFORE = HERE / "results" / "two_bits.json", HERE / "results" / "two_bits_before.json"
LENGTH, SEQUENCES, BLOCK = 1024, 4, 64
IMPORTANCE, MOMENTS = "q2 with importances", "q2 with moments"
PER_EXPERT = "q2 with moments, down per expert"
VARIANTS = (IMPORTANCE, MOMENTS, PER_EXPERT)


class Bench:
    """The conversions of one checkpoint, and what they are measured on."""

    def __init__(self, source: Path, work: Path, sequences: int = SEQUENCES):
        self.source, self.work, self.sequences = source, work, sequences
        self.exact = self.converted("f32", "f32")

    def converted(self, name: str, recipe: str, **options) -> Path:
        """A model directory, made when first asked for."""
        path = self.work / name.replace(" ", "-").replace(",", "")
        convert(self.source, path, recipe, **options)
        return path

    @cached_property
    def calibration(self) -> Calibration:
        """Importances and moments of text like the training's."""
        return collected(self.converted("official", "official"), self.work)

    def variant(self, name: str) -> Path:
        """The conversion of that name."""
        found, moments = self.calibration, None
        if "moments" in name:
            moments = found.per_expert if "per expert" in name else found.moments
        recipe = name.split()[0]
        return self.converted(name, recipe, imatrix=found.importance, moments=moments)

    @cached_property
    def texts(self) -> dict[str, list[list[int]]]:
        """Sequences of ids by text."""
        tokenizer, modules = opened(self.exact)[1], held_out_texts()
        prose = (HERE / "prose.txt").read_text(encoding="utf-8")
        found = {"A": "\n".join(modules[0::2]), "B": "\n".join(modules[1::2]), "C": prose}
        body = LENGTH - 1
        return {
            name: [
                [tokenizer.bos_token_id, *ids[start : start + body]]
                for start in range(0, min(len(ids), self.sequences * body), body)
            ]
            for name, ids in ((name, tokenizer.encode(text)) for name, text in found.items())
        }

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        """The f32 recipe's logits of every sequence."""
        return self.logits(self.exact)

    def logits(self, directory: Path) -> dict[str, np.ndarray]:
        """Float32 (tokens, vocabulary) by sequence, kept beside the directory."""
        kept = directory.with_suffix(f".{self.sequences}.npz")
        if not kept.exists():
            found: dict[str, Any] = {**self.logits_of(opened(directory)[0])}
            np.savez(kept, **found)
        with np.load(kept) as stored:
            return dict(stored)

    def logits_of(self, model: Model) -> dict[str, np.ndarray]:
        """The same of a model in memory."""
        return {
            f"{name}{n}": np.concatenate([np.array(b) for _, b in logit_blocks(model, ids)])
            for name, sequences in self.texts.items()
            for n, ids in enumerate(sequences)
        }

    def blocks(self, directory: Path) -> dict[str, list[float]]:
        """Mean KL to f32 of every block of 64 tokens, by text; what is left of a text is left out."""
        return self.blocks_of(self.logits(directory))

    def blocks_of(self, found: dict[str, np.ndarray]) -> dict[str, list[float]]:
        """The same of logits by sequence."""
        blocks: dict[str, list[float]] = {}
        for key, logits in found.items():
            blocks.setdefault(key[0], []).extend(kl_blocks(self.reference[key], logits))
        return blocks


def kl_blocks(reference: np.ndarray, logits: np.ndarray) -> list[float]:
    """Mean KL of every whole block of 64 tokens, from logits (tokens, vocabulary)."""
    kl, _ = divergence(mx.array(reference), mx.array(logits))
    whole = kl[: len(kl) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(-1)
    return [float(f"{each:.6g}") for each in whole]


def options(description: str | None, results: Path) -> argparse.ArgumentParser:
    """What every benchmark that compares conversions takes; results: where it keeps its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--source", type=Path, default=EMBEDDED, help="official checkpoint")
    parser.add_argument("--work", type=Path, default=Path("two-bits-work"), help="scratch folder")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of each text, at most")
    return parser


def main() -> None:
    """Measure what is missing, and keep it."""
    parser = options(__doc__, RESULTS)
    parser.add_argument("--before", type=Path, help="measure this conversion, as the one before")
    parser.add_argument(
        "--only", nargs="*", default=VARIANTS, help="variants to measure, those of q4 too"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.source, arguments.work, arguments.sequences)
    if arguments.before:
        found = {"device": device(), "blocks": bench.blocks(arguments.before)}
        BEFORE.write_text(json.dumps(found) + "\n")
        return
    blocks = {}
    for name in arguments.only:
        blocks[name] = bench.blocks(bench.variant(name))
        arguments.results.write_text(json.dumps(report(blocks), indent=1) + "\n")
    print(json.dumps(report(blocks), indent=1))


def report(blocks: dict[str, dict[str, list[float]]]) -> dict:
    """Every variant's KL, and its ratio to `q2` before and to the same recipe by importance."""
    kept, texts = json.loads(BEFORE.read_text())["blocks"], next(iter(blocks.values()))
    before = {name: kept[name][: len(each)] for name, each in texts.items()}
    result = {
        "device": device(),
        "tokens": {name: BLOCK * len(each) for name, each in before.items()},
        "q2 with importances at 2f2d5eb": {n: mean_of(each) for n, each in before.items()},
        **{name: compared(each, before) for name, each in blocks.items()},
    }
    result["against today's importances"] = {
        name: compared(each, blocks[usual])
        for name, each in blocks.items()
        if (usual := f"{name.split()[0]} with importances") in blocks and name != usual
    }
    return result


def mean_of(values: list[float]) -> dict[str, float]:
    """A mean over blocks, and its standard error."""
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"kl": round(float(np.mean(values)), 5), "standard_error": round(spread, 5)}


def compared(blocks: dict[str, list[float]], before: dict[str, list[float]]) -> dict[str, dict]:
    """By text: the KL, its ratio to the one before, and the paired difference."""
    found = {}
    for name, values in blocks.items():
        gap = mean_of([a - b for a, b in zip(values, before[name], strict=True)])
        found[name] = {
            **mean_of(values),
            "ratio": round(float(np.mean(values) / np.mean(before[name])), 3),
            "difference": gap["kl"],
            "difference_in_errors": round(gap["kl"] / gap["standard_error"], 1),
        }
    return found


if __name__ == "__main__":
    main()
