"""Batches of training sequences, made on the spot by worker processes.

A sequence is a stretch of Python modules, conversations one after the other, documents with planted
facts and questions, or drills. Each token has a weight in the loss; the values that can be looked
up, few and decisive, weigh more.
"""

import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ds4mlx.evaluation.held_out import filler_of
from ds4mlx.evaluation.recall import document
from train.dialogues import chat, tool_call
from train.drills import drill

VALUE_WEIGHT = 6.0
FACT_TOKENS, TURN_TOKENS = 7, 18  # of a fact's sentence, and of a question with its answer
CHARACTERS_PER_TOKEN = 3.2
MOST_DRILLED = 64  # facts
LEAST_FILLER = 60  # characters, about two lines

Mixture = dict[str, float]  # kinds of sequences and how often each comes
Piece = tuple[list[int], list[float]]


class Sequences(IterableDataset):
    """Endless batches (ids int64 (B, T), weights float32 (B, T)); each worker has its own seed."""

    def __init__(self, corpus: Path, mixture: Mixture, length: int, batch: int, seed: int):
        self.corpus, self.mixture, self.seed = corpus, mixture, seed
        self.length, self.batch = length, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        self.rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        self.tokenizer = Tokenizer.from_file(str(self.corpus / "tokenizer.json"))
        self.modules = np.load(self.corpus / "modules.npy", mmap_mode="r")
        begin = self.rng.randrange(len(self.modules) - 200_000)
        self.texts = (self.tokenizer.decode(self.modules[begin : begin + 200_000].tolist()),)
        while True:
            rows = [self.sequence() for _ in range(self.batch)]
            yield torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])

    def sequence(self) -> Piece:
        """One sequence of `length` tokens."""
        kind = self.rng.choices(list(self.mixture), list(self.mixture.values()))[0]
        if kind == "modules":
            begin = self.rng.randrange(len(self.modules) - self.length)
            return self.modules[begin : begin + self.length].tolist(), [1.0] * self.length
        make = {"dialogues": self.dialogue, "recall": self.recall, "drills": self.drill}[kind]
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < self.length:
            more, weight = make(self.length - len(ids))
            ids, weights = ids + more, weights + weight
        return ids[: self.length], weights[: self.length]

    def dialogue(self, left: int) -> Piece:
        """A conversation, however long."""
        return self.weighted(self.rng.choice((chat, tool_call))(self.rng), ())

    def recall(self, left: int) -> Piece:
        """A document that takes most of what is left of a sequence, half or a tenth, with questions.

        Short ones and few questions are there for the first answer, which has no example before it.
        """
        rng, room = self.rng, int(left * self.rng.choice((0.1, 0.1, 0.5, 0.95)))
        asked = max(1, int(room * rng.uniform(0.05, 0.6)) // TURN_TOKENS)
        planted = asked + rng.randrange(1 + asked // 3)
        rest = room - TURN_TOKENS * asked - FACT_TOKENS * planted
        characters = characters_of(rest / (planted + 1))
        filler = filler_of(self.texts if characters > 20 else ("\n",), characters)
        found = document(rng, planted, asked, filler, thinking=rng.choice(("none", "none", "high")))
        values = [(found.text.rindex(" ", begin, end), end) for begin, end in found.answers]
        return self.weighted(found.text, values)

    def drill(self, left: int) -> Piece:
        """A drill that fills what is left of a sequence, or with few facts less of it."""
        rng, rounds = self.rng, self.rng.choice((2, 3, 4, 8))
        most = int(left * rng.uniform(0.3, 1.0) / rounds / FACT_TOKENS)
        count = max(2, min(MOST_DRILLED, most))
        characters = characters_of(left / count / rounds - FACT_TOKENS)
        longer = max(LEAST_FILLER, characters)
        found = drill(rng, count, rounds, filler_of(self.texts, longer), characters / longer)
        return self.weighted(found.text, found.values)

    def weighted(self, text: str, values: Sequence[tuple[int, int]]) -> Piece:
        """A text's tokens; those in the characters of `values` (each begins a token) weigh more."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        weights = [1.0] * len(encoding.ids)
        for begin, end in values:
            token = encoding.char_to_token(begin)
            while token is not None and encoding.offsets[token][0] < end:
                weights[token] = VALUE_WEIGHT
                token += 1
        return encoding.ids, weights


def characters_of(tokens: float) -> int:
    """How many characters so many tokens of text take, about; 0 for less than none."""
    return max(0, int(tokens * CHARACTERS_PER_TOKEN))


def outlive_signals(worker: int) -> None:
    """Leave Ctrl-C to the training process, which saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batches(
    corpus: Path, mixture: Mixture, length: int, tokens: int, workers: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of about `tokens` tokens in sequences of `length`, made ahead by `workers`."""
    data = Sequences(corpus, mixture, length, max(1, tokens // length), seed)
    ahead = {"prefetch_factor": 4, "worker_init_fn": outlive_signals} if workers else {}
    return iter(DataLoader(data, batch_size=None, num_workers=workers, pin_memory=False, **ahead))
