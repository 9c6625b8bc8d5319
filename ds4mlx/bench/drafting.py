"""How fast a model decodes with drafts, and how many of them it accepts."""

import time
from dataclasses import dataclass

from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.sequence import Sequence
from ds4mlx.engine.speculative import Speculation, check_drafts
from ds4mlx.evaluation.held_out import held_out_texts
from ds4mlx.model.model import Model
from ds4mlx.text.tokenizer import Tokenizer

WARM = 3  # rounds before the clock runs


@dataclass(frozen=True)
class Drafted:
    """tokens_per_s: with drafts; acceptance: of those proposed; per_round: tokens of a round."""

    tokens_per_s: float
    acceptance: float
    per_round: float


class Drafting:
    """Decoding of Python code with up to `drafts` drafts a round. Raises DataError where none can be."""

    def __init__(self, model: Model, tokenizer: Tokenizer, drafts: int):
        check_drafts(model, drafts)
        self.model, self.tokenizer, self.drafts = model, tokenizer, drafts
        self._ids = [each for text in held_out_texts() for each in tokenizer.encode(text)]

    def measure(self, depth: int, gen: int) -> Drafted:
        """Greedy decoding after `depth` tokens of code: `gen` tokens, or fewer where the text ends."""
        ids = (self._ids * (depth // len(self._ids) + 1))[:depth]
        most = gen + WARM * (self.drafts + 1)
        sequence = Sequence(
            ids, self.model.make_cache(), self.tokenizer, max_tokens=most + self.drafts
        )
        speculation = Speculation(self.model, sequence, self.drafts, bypass=None)
        speculation.add(prefill(self.model, ids, sequence.state, on_streams=speculation.saw), 0)
        begun, counted = time.perf_counter(), 0
        while not sequence.reason and sequence.drawn < most:
            if speculation.drafted.rounds <= WARM:
                begun, counted = time.perf_counter(), sequence.drawn
            speculation.step()
        drafted, seconds = speculation.drafted, time.perf_counter() - begun
        return Drafted(
            tokens_per_s=round((sequence.drawn - counted) / seconds, 3),
            acceptance=round(drafted.accepted / max(1, drafted.proposed), 4),
            per_round=round(1 + drafted.accepted / max(1, drafted.rounds), 3),
        )
