"""Whether `q2-auto` beats keeping the last layers exact at the same bytes, on the small model.

Sensitivities are measured on the text of the calibration, which is in none of the texts A, B and C of
`two_bits.py`. For every number of last layers whose experts stay exact, beside the others in `q2`, the
least expected cost is found for the bytes that the main layers then take. The draft block, which
follows the last layer and is a sixth of all experts here, is not counted, as it is not measured
either. Differences are paired by blocks of 64 tokens. `allocation.py` measures the costs that are
expected here.

    DS4MLX_OPENBLAS=1 python benchmarks/q2_auto.py [--source DIR] [--work DIR] [--results FILE]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration import opened
from device import device
from two_bits import Bench, compared, mean_of, options

from ds4mlx.convert import convert
from ds4mlx.convert.allocation import least
from ds4mlx.convert.choice import ROLES, Choice, Place
from ds4mlx.convert.sensitivity import write_sensitivity
from ds4mlx.evaluation.sensitivity import sensitivities
from ds4mlx.formats import FORMATS
from ds4mlx.text.prompts import read_sequences

RESULTS = Path(__file__).parent / "results" / "q2_auto.json"
Q2 = {"gate_up": "iq2_xxs", "down": "q2_k"}
TOKENS, LENGTH = 1024, 512
Costs = Mapping[Place, Mapping[str, float]]


def main() -> None:
    """Measure, and keep every figure as it comes."""
    parser = options(__doc__, RESULTS)
    parser.add_argument("--late", type=int, nargs="*", default=(1, 2, 3), help="exact layers")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.source, arguments.work, arguments.sequences)
    costs = expected(bench)
    result: dict = {
        "device": device(),
        "tokens of the sensitivities": TOKENS,
        "expected cost alone": {
            f"{role} of layer {layer} in {format}": round(cost, 5)
            for (layer, role), each in costs.items()
            for format, cost in each.items()
            if cost
        },
        "at equal bytes": {},
    }
    for late in arguments.late:
        name = f"the last {late} layers exact"
        result["at equal bytes"][name] = compare(bench, costs, late)
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def expected(bench: Bench) -> Costs:
    """What every format is expected to cost at every place; any budget shows it."""
    official = bench.converted("official", "official")
    files: dict[str, Any] = {**steered(bench), "sensitivity": measured(bench, official)}
    budget = sum(file.stat().st_size for file in official.glob("*.safetensors")) - 1
    plan = convert(bench.source, official, "q2-auto", budget=budget, dry_run=True, **files)
    assert plan.choice is not None
    return plan.choice.costs


def measured(bench: Bench, official: Path) -> Path:
    """The sensitivities, by the official conversion."""
    path, prompts = bench.work / "sensitivity.json", bench.work / "prompts.jsonl"
    model, tokenizer = opened(official)
    texts = read_sequences(prompts, tokenizer, model.args.release, LENGTH, TOKENS)
    found = sensitivities(model, [text.tolist() for text in texts])
    pairs = {place: (mean.value, mean.standard_error) for place, mean in found.items()}
    write_sensitivity(path, pairs, TOKENS)
    return path


def steered(bench: Bench) -> dict[str, Any]:
    """What importances and moments a conversion is given."""
    return {"imatrix": bench.calibration.importance, "moments": bench.calibration.moments}


def compare(bench: Bench, costs: Costs, late: int) -> dict:
    """`q2` with the last `late` layers exact, against the choice of the same bytes."""
    first = 1 + max(layer for layer, _ in costs) - late
    usual = {place: Q2[place[1]] if place[0] < first else "mxfp4" for place in costs}
    sizes = {place: {f: size(place, f) for f in each} for place, each in costs.items()}
    chosen = least(costs, sizes, sum(sizes[place][f] for place, f in usual.items()))
    choices = {"usual": Choice(usual, costs), "chosen": Choice(chosen, costs)}
    blocks = {}
    for name, choice in choices.items():
        folder = bench.work / f"{name}-{late}"
        file = folder.with_suffix(".json")
        file.write_bytes(choice.written())
        convert(bench.source, folder, "q2-auto", choice=file, **steered(bench))
        blocks[name] = bench.blocks_of(bench.logits_of(opened(folder)[0]))
    return {
        "sixteenths of a bit": {
            name: sum(sizes[place][f] for place, f in choice.formats.items())
            for name, choice in choices.items()
        },
        "expected cost": {name: round(choice.expected, 4) for name, choice in choices.items()},
        "chosen": {f"{r} of layer {n}": f for (n, r), f in chosen.items() if f != Q2[r]},
        "usual, KL": {text: mean_of(each) for text, each in blocks["usual"].items()},
        "chosen, KL": compared(blocks["chosen"], blocks["usual"]),
    }


def size(place: Place, format: str) -> int:
    """Of the matrices of a place, which are all as large: sixteenths of a bit a weight of one."""
    return round(16 * FORMATS[format].bits) * len(ROLES[place[1]])


if __name__ == "__main__":
    main()
