"""Whether second moments change tool calls: many more cases than the quality table has.

The variants of `two_bits.py` answer the cases of two seeds in both thinking modes.

    DS4MLX_OPENBLAS=1 python benchmarks/two_bits_tools.py [--source DIR] [--work DIR] [--results FILE]
"""

import argparse
import json
from pathlib import Path

from calibration import opened
from device import device
from two_bits import VARIANTS, Bench

from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.evaluation.scoring import Mean
from ds4mlx.evaluation.tool_accuracy import SEED, tool_accuracy

RESULTS = Path(__file__).parent / "results" / "two_bits_tools.json"


def main() -> None:
    """Ask every variant, and keep its shares as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=EMBEDDED, help="official checkpoint")
    parser.add_argument("--work", type=Path, default=Path("two-bits-work"), help="scratch folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.source, arguments.work)
    result: dict = {"device": device()}
    for name in VARIANTS:
        result[name] = asked(*opened(bench.variant(name)))
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def asked(model, tokenizer) -> dict[str, float | int]:
    """Shares of the answers that are valid calls, and that are the right ones."""
    rounds = [tool_accuracy(model, tokenizer, seed=seed) for seed in (SEED, SEED + 1)]
    found = [each for calls in rounds for each in calls]
    return {
        "answers": sum(each.valid.count for each in found),
        "valid": share([each.valid for each in found]),
        "right": share([each.right for each in found]),
    }


def share(means: list[Mean]) -> float:
    """The share of all together."""
    count = sum(mean.count for mean in means)
    return round(sum(mean.value * mean.count for mean in means) / count, 4)


if __name__ == "__main__":
    main()
