"""Whether formats chosen for each layer beat `q2` and its kin at the same bytes, on the small model.

Gate and up of a layer together, and down, get IQ2_XXS, Q2_K or the checkpoint's own exact FP4 (which is
smaller than Q4_K). What each costs is measured alone, as KL divergence on code that is in none of the
texts of `two_bits.py`, and the choice with the least sum is found for a budget: the bytes of `q2`, or
of `q2` with the last one or two layers left exact. Both are then measured on the three texts. Costs that
the results have are not measured again.

    DS4MLX_OPENBLAS=1 python benchmarks/allocation.py [--source DIR] [--work DIR] [--results FILE]
"""

import json
from functools import cached_property
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
from calibration import opened
from device import device
from safetensors.numpy import load_file
from training_text import SOURCES, source
from two_bits import Bench, compared, kl_blocks, mean_of, options

from ds4mlx.convert.feedback import Moment
from ds4mlx.convert.importance import Importance, imatrix_name
from ds4mlx.convert.quantise import decode, quantise
from ds4mlx.convert.quantise_fed import quantise_fed
from ds4mlx.evaluation.scoring import logit_blocks
from ds4mlx.evaluation.weights import replace_values
from ds4mlx.formats import FORMATS

RESULTS = Path(__file__).parent / "results" / "allocation.json"
ROLES = {"gate and up": ("w1", "w3"), "down": ("w2",)}
ROUNDED, EXACT = ("iq2_xxs", "q2_k"), "mxfp4"
Q2 = {"gate and up": "iq2_xxs", "down": "q2_k"}
MODULES, TOKENS = ("inspect", "tarfile", "difflib"), 320
Place = tuple[int, str]  # layer and role
Choice = dict[Place, str]


class Subject:
    """The small model in memory, whose experts are given values of any format."""

    def __init__(self, bench: Bench):
        self.bench, self.kept = bench, {}
        self.model, tokenizer = opened(bench.exact)
        self.layers = range(self.model.args.num_hidden_layers)
        self.places: list[Place] = list(product(self.layers, ROLES))
        parts = product(self.layers, ("w1", "w2", "w3"))
        self.exact = {(n, part): np.array(self.experts(n)[part].decode()) for n, part in parts}
        assert not set(MODULES) & set(SOURCES)
        texts = (source(module)[9000:] for module in MODULES)
        self.text = [[tokenizer.bos_token_id, *tokenizer.encode(t)[: TOKENS - 1]] for t in texts]

    def experts(self, layer: int):
        return self.model.layers[layer].ffn.experts

    @cached_property
    def moments(self) -> list[Moment]:
        """Of what each layer's gate and up are given."""
        arrays = load_file(self.bench.calibration.moments)
        return [Moment.of(arrays[f"layers.{n}.w1"]) for n in self.layers]

    @cached_property
    def importance(self) -> Importance:
        return Importance.read(self.bench.calibration.importance)

    def values(self, layer: int, part: str, format: str) -> np.ndarray:
        """A stack of experts as a conversion with a layer's moments stores it; kept."""
        key = layer, part, format
        if format != EXACT and key not in self.kept:
            self.kept[key] = np.stack(
                [
                    self.rounded(layer, part, format, e)
                    for e in range(self.model.args.n_routed_experts)
                ]
            )
        return self.exact[layer, part] if format == EXACT else self.kept[key]

    def rounded(self, layer: int, part: str, format: str, expert: int) -> np.ndarray:
        values = mx.array(self.exact[layer, part][expert])
        if part == "w2":
            columns = self.importance.stacks[imatrix_name(layer, part)][expert]
            return decode(format, quantise(values, format, columns)[0])
        return decode(format, quantise_fed(values, format, self.moments[layer])[0])

    def hold(self, choice: Choice) -> None:
        """Have the model compute with these formats, and exact values elsewhere."""
        for layer, role in self.places:
            for part in ROLES[role]:
                format = choice.get((layer, role), EXACT)
                replace_values(
                    self.experts(layer)[part], mx.array(self.values(layer, part, format))
                )

    def logits(self) -> list[np.ndarray]:
        """Of the text that costs are measured on."""
        return [
            np.concatenate([np.array(b) for _, b in logit_blocks(self.model, ids)])
            for ids in self.text
        ]

    @cached_property
    def reference(self) -> list[np.ndarray]:
        """The same with everything exact."""
        self.hold({})
        return self.logits()

    def cost(self, choice: Choice) -> list[float]:
        """KL by blocks of that text."""
        reference = self.reference
        self.hold(choice)
        pairs = zip(reference, self.logits(), strict=True)
        return [each for exact, got in pairs for each in kl_blocks(exact, got)]


def main() -> None:
    """Measure the costs, choose, compare; every figure is kept as it comes."""
    parser = options(__doc__, RESULTS)
    parser.add_argument("--late", type=int, nargs="*", default=(0, 1, 2), help="exact layers")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    subject = Subject(Bench(arguments.source, arguments.work, arguments.sequences))
    result = {"device": device(), "cost alone": {}, "at equal bytes": {}}
    if arguments.results.exists():
        result |= json.loads(arguments.results.read_text())
    costs = measured(subject, result, arguments.results)
    for late in arguments.late:
        compare(subject, late, costs, result, arguments.results)
    print(json.dumps(result, indent=1))


def measured(subject: Subject, result: dict, path: Path) -> dict[tuple[Place, str], float]:
    """What each place costs in each format while everything else is exact, in nats a token."""
    costs, known = {(p, EXACT): 0.0 for p in subject.places}, result["cost alone"]
    for place, format in product(subject.places, ROUNDED):
        name = f"{named(place)} in {format}"
        if name not in known:
            known[name] = mean_of(subject.cost({place: format}))
            path.write_text(json.dumps(result, indent=1) + "\n")
        costs[place, format] = known[name]["kl"]
    return costs


def compare(subject: Subject, late: int, costs: dict, result: dict, path: Path) -> None:
    """`q2` with the last `late` layers exact, against the choice of the same bytes."""
    first = subject.layers[-1] - late
    usual = {(n, role): Q2[role] if n <= first else EXACT for n, role in subject.places}
    chosen = least(costs, subject.places, bits(usual))
    found = {}
    for name, choice in (("usual", usual), ("chosen", chosen)):
        subject.hold(choice)
        found[name] = subject.bench.blocks_of(subject.bench.logits_of(subject.model))
    result["at equal bytes"][f"q2, the last {late} layers exact"] = {
        "bits a weight": {"usual": bits(usual), "chosen": bits(chosen)},
        "sum of costs": {
            name: round(sum(costs[item] for item in choice.items()), 4)
            for name, choice in (("usual", usual), ("chosen", chosen))
        },
        "chosen": {named(place): format for place, format in chosen.items()},
        "usual, KL": {text: mean_of(each) for text, each in found["usual"].items()},
        "chosen, KL": compared(found["chosen"], found["usual"]),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def least(costs: dict, places: list[Place], budget: float) -> Choice:
    """Formats with the least sum of costs among all that take at most so many bits a weight."""
    every = product((*ROUNDED, EXACT), repeat=len(places))
    choices = (dict(zip(places, formats, strict=True)) for formats in every)
    affordable = (choice for choice in choices if bits(choice) <= budget + 1e-9)
    return min(affordable, key=lambda choice: sum(costs[item] for item in choice.items()))


def bits(choice: Choice) -> float:
    """Bits a weight of the routed experts; every matrix has as many weights as the others."""
    matrices = [(len(ROLES[role]), FORMATS[f].bits) for (_, role), f in choice.items()]
    return round(sum(n * each for n, each in matrices) / sum(n for n, _ in matrices), 4)


def named(place: Place) -> str:
    return f"{place[1]} of layer {place[0]}"


if __name__ == "__main__":
    main()
