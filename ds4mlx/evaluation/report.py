"""An evaluation's results together: as JSON, and as the table that a person reads."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ds4mlx.evaluation.agreement import Agreement
from ds4mlx.evaluation.perplexity import Perplexity
from ds4mlx.evaluation.recall_accuracy import Recall
from ds4mlx.evaluation.scoring import Mean
from ds4mlx.evaluation.tool_accuracy import ToolCalls
from ds4mlx.evaluation.vectors import Outcome


@dataclass
class Report:
    """What was measured of a model; None or empty: not asked for. `str()` is the table."""

    model: str
    recipe: str
    dtype: str
    rounding: str
    perplexity: Perplexity | None = None
    agreement: list[Agreement] = field(default_factory=list)
    recall: Recall | None = None
    tool_calls: list[ToolCalls] = field(default_factory=list)
    vectors: list[Outcome] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each part

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: recipe {self.recipe}, {self.dtype}, {self.rounding} rounding"]
        if self.perplexity is not None:
            lines += ["", *_perplexity(self.perplexity)]
        for result in self.agreement:
            lines += ["", *_agreement(result)]
        if self.recall is not None:
            lines += ["", *_recall(self.recall)]
        if self.tool_calls:
            lines += ["", f"{'tool calls, thinking':<28} {'valid':>18} {'right':>18} {'cases':>8}"]
            lines += [
                f"{t.thinking:<28} {_share(t.valid):>18} {_share(t.right):>18} {t.valid.count:>8}"
                for t in self.tool_calls
            ]
        if self.vectors:
            lines += ["", *_vectors(self.vectors)]
        seconds = ", ".join(f"{part} {value:.0f} s" for part, value in self.seconds.items())
        return "\n".join([*lines, "", f"measured in: {seconds}"])


def _perplexity(result: Perplexity) -> Iterator[str]:
    same = "each depth on the same" if result.same_text else "in all"
    yield f"perplexity {result.perplexity:.4f} ({result.tokens:,} tokens, {same})"
    yield f"{'tokens before':<28} {'perplexity':>18} {'nats a token':>18} {'rise':>18}"
    for depth in result.depths:
        place = f"{depth.first:,} to {depth.end - 1:,}"
        rise = _plus_minus(depth.rise, "+.4f") if depth.rise.count else "-"
        loss = _plus_minus(depth.loss, ".4f")
        yield f"{place:<28} {depth.perplexity:>18.4f} {loss:>18} {rise:>18}"


def _agreement(result: Agreement) -> Iterator[str]:
    yield f"against {result.reference} ({result.kl.count:,} tokens)"
    yield f"{'KL divergence, nats':<28} {_plus_minus(result.kl, '.3g'):>18}"
    yield f"{'largest of a token':<28} {result.kl_largest:>18.3g}"
    yield f"{'same likeliest token':<28} {_share(result.top1):>18}"


def _recall(result: Recall) -> Iterator[str]:
    heads = [f"no {r.hidden} rows" if r.hidden else "all rows" for r in result.results]
    yield f"{'recall, tokens back':<28} " + " ".join(f"{head:>18}" for head in heads)
    for n, distance in enumerate(result.results[0].distances):
        end = "or more" if distance.end is None else f"to {distance.end - 1:,}"
        place = f"{distance.first:,} {end}"
        yield _row(place, [r.distances[n].accuracy for r in result.results])
    place = f"{result.reach:,}+, {result.rows:,}+ CSA rows"
    yield _row(place, [r.among_many_rows for r in result.results])
    yield _row("all", [r.all for r in result.results])


def _row(name: str, shares: list[Mean]) -> str:
    return f"{name:<28} " + " ".join(f"{_counted(share):>18}" for share in shares)


def _vectors(result: list[Outcome]) -> Iterator[str]:
    yield f"{'official vectors':<28} {'steps':>18}  answer (official)"
    for outcome in result:
        steps = f"{outcome.matched} of {outcome.steps}"
        note = "; ds4 skips it" if outcome.skipped_by_ds4 else ""
        texts = f"{outcome.answer!r} ({outcome.official!r}{note})"
        yield f"{outcome.name:<28} {steps:>18}  {texts}"
    matched, steps = sum(o.matched for o in result), sum(o.steps for o in result)
    yield f"{'all':<28} {f'{matched} of {steps}':>18}"


def _plus_minus(mean: Mean, form: str) -> str:
    return f"{mean.value:{form}} ± {mean.standard_error:.2g}"


def _share(mean: Mean) -> str:
    return f"{mean.value:.1%} ± {mean.standard_error:.1%}"


def _counted(mean: Mean) -> str:
    return f"{mean.value:.1%} of {mean.count}" if mean.count else "-"
