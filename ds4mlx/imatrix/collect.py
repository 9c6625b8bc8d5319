"""Collect the importance of routed experts' columns by running a model over a file of prompts.

Gate and up: per expert and column, the sum of squares of the normed input over the tokens routed to
the expert. Down: the same of its own input, after the route weight. What is summed so far is saved
every minute and on Ctrl-C, whole sequences only, so that however often a run is interrupted the
order of summation, and with it the file, stays the same. Second moments, where they are wanted, are
summed and saved with it; `second_moments.py` has their file.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ds4mlx.convert.importance import run_of, write_gguf
from ds4mlx.durable import Busy, alone, replacing
from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.room import PREFILL_STEP
from ds4mlx.errors import DataError
from ds4mlx.imatrix.recorder import recording
from ds4mlx.imatrix.running_sums import RunningSums
from ds4mlx.imatrix.second_moments import MomentsFile
from ds4mlx.model.model import Model
from ds4mlx.text.prompts import read_sequences, sequence_length
from ds4mlx.text.tokenizer import Tokenizer
from ds4mlx.weights.directory import ModelDirectory

SAVE_SECONDS = 60.0
# What is put after the name of the result: sums so far, a file being written, who is at work.
PARTIAL, NEW, LOCK = ".partial", ".new", ".lock"
# From this share of experts without a token on, a note says what that means.
MANY = 0.02


@dataclass(frozen=True)
class Report:
    """What a collection came to."""

    sequences: int
    tokens: int
    experts: int  # of all layers
    unreached: int  # of these, experts that no token was routed to

    def __str__(self) -> str:
        share = self.unreached / self.experts
        text = (
            f"{self.tokens:,} tokens in {self.sequences:,} sequences; "
            f"{self.unreached:,} of {self.experts:,} experts never reached ({share:.1%})"
        )
        if share < MANY:
            return text
        return f"{text}\nwarning: these get an even importance; more, or more varied, prompts help"


def collect(
    directory: Path,
    prompts: Path,
    output: Path,
    load_model: Callable[[], Model],
    *,
    moments: Path | None = None,
    per_expert: bool | None = None,
    length: int | None = None,
    max_tokens: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    save_seconds: float = SAVE_SECONDS,
    step: int = PREFILL_STEP,
) -> Report | None:
    """Write the imatrix `output` of the model in `directory`; None if it was there already.

    load_model: gives that model, once everything else has been checked. moments: where to write
    second moments of the same run; per_expert: also each expert's own for down, None for where those
    take little room. prompts, length, max_tokens: see `read_sequences`. overwrite: replace a file, or
    an unfinished run, of another model, prompts or options. step: tokens that are fed at a time.
    The output is written whole or not at all. Until then `OUTPUT.partial` holds what was saved, and
    the same call goes on from there. Raises DataError naming the file at fault.
    """
    for path in filter(None, (output, moments)):
        if not path.parent.is_dir():
            raise DataError(f"{path.parent}: no such directory")
        if path.is_dir():
            raise DataError(f"{path}: is a directory")
    found = ModelDirectory.open(directory)
    second = MomentsFile.wanted(moments, output, found.config, per_expert)
    length = sequence_length(prompts, length, found.config)
    tokenizer = Tokenizer.from_dir(found.path)
    sequences = read_sequences(prompts, tokenizer, found.config.release, length, max_tokens)
    settings = found.manifest["checksum"], prompts.name, length, step, *second.settings
    run = _fingerprint(settings, sequences)
    with _alone(output), _disk_errors(output):
        if _finished(output, run, overwrite) & second.finished(run, overwrite):
            _beside(output, PARTIAL).unlink(missing_ok=True)
            return None
        second.check_fits()
        partial = _beside(output, PARTIAL)
        sums = RunningSums.resumed(partial, found.config, run, overwrite, second.places)
        with _saving(output, sums, save_seconds) as save:
            model = load_model()
            _measure(model, sums, sequences, step, progress, save)
            with undivided():
                second.write(sums, model, _tokens(sequences), run)
            with undivided(), replacing(output, _beside(output, NEW)) as new:
                count = len(sequences)
                write_gguf(new, sums.stacks(), prompts.name, count, length, run)
        partial.unlink(missing_ok=True)
    return _report(sums, sequences)


def _fingerprint(settings: tuple[str | int, ...], sequences: Sequence[np.ndarray]) -> str:
    """Of everything that the result depends on."""
    digest = hashlib.sha256(repr(settings).encode())
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little") + sequence.tobytes())
    return digest.hexdigest()


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """DataError if another process is writing the same file."""
    try:
        with alone(_beside(output, LOCK)):
            yield
    except Busy:
        raise DataError(f"{output}: another collection is writing here") from None


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """What the system refuses, such as a full disk, is a DataError that says how to go on."""
    try:
        yield
    except OSError as error:
        cause = f"{error.filename or output}: {error.strerror}"
        raise DataError(f"{cause}; the same command goes on from what was saved last") from error


def _finished(output: Path, run: str, overwrite: bool) -> bool:
    """Whether this run has written its result; a kill may have left its sums beside it."""
    if overwrite or not output.exists():
        return False
    if run_of(output) != run:
        raise DataError(
            f"{output}: exists and is of another model, prompts or options; use --overwrite"
        )
    return True


@contextmanager
def _saving(output: Path, sums: RunningSums, seconds: float) -> Iterator[Callable[[], None]]:
    """Gives what is called after each sequence: it saves now and then; Ctrl-C saves too."""
    saved, at = sums.done, time.monotonic()

    def save() -> None:
        nonlocal saved, at
        with undivided():
            sums.save(_beside(output, PARTIAL), _beside(output, NEW))
        saved, at = sums.done, time.monotonic()

    try:
        yield lambda: save() if time.monotonic() - at >= seconds else None
    except KeyboardInterrupt:
        if sums.done > saved:
            save()
        raise


def _measure(
    model: Model,
    sums: RunningSums,
    sequences: Sequence[np.ndarray],
    step: int,
    progress: bool,
    save: Callable[[], None],
) -> None:
    """Feed what has not been fed, a fresh state for each sequence."""
    before, total = _tokens(sequences[: sums.done]), _tokens(sequences)
    visible = progress and sys.stderr.isatty()
    bar = tqdm(total=total, initial=before, unit="tok", disable=not visible, smoothing=0.05)
    with bar, recording(model, sums.moments) as (recorders, moments):
        for sequence in sequences[sums.done :]:
            prefill(model, sequence.tolist(), model.make_cache(), step, _Advance(bar))
            with undivided():
                sums.add(
                    {place: recorder.take() for place, recorder in recorders.items()},
                    ((place, recorder.take()) for place, recorder in moments.items()),
                )
            save()


class _Advance:
    """Tells a bar of the tokens of a sequence as they are done."""

    def __init__(self, bar: tqdm):
        self.bar, self.done = bar, 0

    def __call__(self, done: int, _: int) -> None:
        self.bar.update(done - self.done)
        self.done = done


def _tokens(sequences: Sequence[np.ndarray]) -> int:
    return sum(map(len, sequences))


def _report(sums: RunningSums, sequences: Sequence[np.ndarray]) -> Report:
    counts = [count for (_, part), count in sums.counts.items() if part == "w1"]
    experts = sum(count.size for count in counts)
    unreached = sum(int((count == 0).sum()) for count in counts)
    return Report(len(sequences), _tokens(sequences), experts, unreached)
