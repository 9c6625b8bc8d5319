"""The evaluation of one model: which parts run, on what, and how large they are."""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ds4mlx.errors import DataError
from ds4mlx.evaluation.agreement import save_logits, spread_sequences, with_file, with_model
from ds4mlx.evaluation.held_out import held_out_texts
from ds4mlx.evaluation.perplexity import STRETCHES, perplexity, trained_length
from ds4mlx.evaluation.recall_accuracy import PLANS, recall_accuracy
from ds4mlx.evaluation.report import Report
from ds4mlx.evaluation.tool_accuracy import CASES, tool_accuracy
from ds4mlx.evaluation.vectors import read_vectors, run_vectors
from ds4mlx.model.model import Model
from ds4mlx.text.prompts import read_sequences
from ds4mlx.text.tokenizer import Tokenizer

# Longest context that is measured unless told: a real model's own would take hours.
LONGEST = 8192


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `scale` multiplies the numbers of stretches, documents and cases."""

    context: int | None = None  # default: the trained length, at most LONGEST
    scale: float = 1.0

    def of(self, count: int) -> int:
        """A number of samples, scaled; at least 1 of any."""
        return max(1, round(count * self.scale)) if count else 0


@dataclass(frozen=True)
class Subject:
    """A loaded model with what is measured on it."""

    model: Model
    tokenizer: Tokenizer
    sizes: Sizes

    @property
    def context(self) -> int:
        """Tokens of the longest sequences of text."""
        return self.sizes.context or min(trained_length(self.model), LONGEST)

    def tokens(self, text: Path | None) -> list[int]:
        """Ids of a text, without the token that begins a sequence; default: the held-out text."""
        if text is None:
            return self.tokenizer.encode("\n".join(held_out_texts()))
        release = self.model.args.release
        pieces = read_sequences(text, self.tokenizer, release, length=1 << 30)
        return np.concatenate([piece[1:] for piece in pieces]).tolist()

    def sequences(self, text: Path | None) -> list[list[int]]:
        """Sequences of the text on which logits are compared."""
        bos = self.tokenizer.bos_token_id
        return spread_sequences(self.tokens(text), bos, self.context, self.sizes.of(2))


@contextmanager
def timed(report: Report, part: str):
    """Notes how long the block took."""
    begun = time.perf_counter()
    yield
    report.seconds[part] = round(time.perf_counter() - begun, 1)


def measure_text(report: Report, subject: Subject, text: Path | None) -> None:
    """Perplexity against depth."""
    with timed(report, "perplexity"):
        tokens, bos = subject.tokens(text), subject.tokenizer.bos_token_id
        stretches = subject.sizes.of(STRETCHES)
        report.perplexity = perplexity(subject.model, tokens, bos, subject.context, stretches)


def measure_tasks(report: Report, subject: Subject, parts: Sequence[str]) -> None:
    """Recall and tool calls, as far as asked for."""
    model, tokenizer, sizes = subject.model, subject.tokenizer, subject.sizes
    if "recall" in parts:
        with timed(report, "recall"):
            plans = [replace(plan, documents=sizes.of(plan.documents)) for plan in PLANS]
            report.recall = recall_accuracy(model, tokenizer, plans)
    if "tools" in parts:
        with timed(report, "tools"):
            report.tool_calls = tool_accuracy(model, tokenizer, sizes.of(CASES))


def measure_agreement(
    report: Report,
    subject: Subject,
    reference: Path,
    text: Path | None,
    load: Callable[[Path], tuple[Model, Tokenizer]],
) -> None:
    """KL divergence and top-1 agreement to saved logits, or to a model directory."""
    with timed(report, "agreement"):
        if reference.is_file():
            report.agreement = with_file(subject.model, reference)
            return
        other, their_tokenizer = load(reference)
        sequences = subject.sequences(text)
        sample = subject.tokenizer.decode(sequences[0][1:])
        if their_tokenizer.encode(sample) != subject.tokenizer.encode(sample):
            raise DataError(f"{reference}: its tokenizer is another one than the model's")
        report.agreement = [with_model(subject.model, other, sequences, str(reference))]


def measure_vectors(report: Report, subject: Subject, vectors: Path) -> None:
    """ds4's official vectors."""
    with timed(report, "vectors"):
        cases = read_vectors(vectors)
        report.vectors = run_vectors(subject.model, subject.tokenizer, cases)


def save(report: Report, subject: Subject, text: Path | None, output: Path) -> None:
    """Write the model's logits on the text."""
    with timed(report, "logits"):
        save_logits(subject.model, subject.sequences(text), output)
