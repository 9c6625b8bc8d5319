"""Train ds4-tiny on one GPU.

    python -m train.corpus CORPUS
    python -m train.run CORPUS OUT

Three phases: short sequences, where most is learnt per second; longer ones; and the full length,
with the checkpoint's and the model's own roundings and the indexer's choice in the forward pass.
`OUT` gets the weights as bfloat16 files of less than 16 MiB, the figures of the run, and at times
a state to go on from: with one in OUT, the same command continues. `--begin WEIGHTS` starts from
the bfloat16 files of an earlier run instead of from random weights.
"""

import argparse
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ds4mlx.chat.tokens import BOS
from ds4mlx.evaluation.held_out import held_out_texts
from train.batches import batches
from train.checkpoint import load_state, load_weights, save_state, save_weights
from train.network import Options
from train.sizes import TRAINED_LENGTH, full_config
from train.trainer import Phase, Trainer
from train.weights import as_computed, first_values

WARM_UP, COOL_DOWN = 0.01, 0.5  # shares of the steps
SAVE_EVERY = 120.0  # seconds
LOSSES = ("text", "values", "draft", "index")

LOOK_UP = {"modules": 0.4, "dialogues": 0.22, "recall": 0.18, "drills": 0.2}
LONGER = {"modules": 0.4, "dialogues": 0.25, "recall": 0.3, "drills": 0.05}
LONGEST = {"modules": 0.42, "dialogues": 0.26, "recall": 0.32}
CHOSEN = Options(rounding=True, select=True, index_loss=True, draft=True)
PHASES = (
    Phase(512, 3000, Options(), False, LOOK_UP),
    Phase(2048, 2000, Options(index_loss=True, draft=True), False, LONGER),
    Phase(TRAINED_LENGTH, 2000, CHOSEN, True, LONGEST),
)


def rate_factor(progress: float) -> float:
    """Warm-up, full rate, then linearly down to nothing; progress in 0..1."""
    up, down = progress / WARM_UP, (1 - progress) / COOL_DOWN
    return max(0.0, min(1.0, up, down))


@torch.no_grad()
def held_out(trainer: Trainer, corpus: Path, phase: Phase) -> dict[str, float]:
    """Perplexity of the held-out text in a phase's length; as trained, and as `official`."""
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    ids = [
        i for t in held_out_texts() for i in tokenizer.encode(BOS + t, add_special_tokens=False).ids
    ]
    usable = len(ids) // TRAINED_LENGTH * TRAINED_LENGTH
    stretches = torch.tensor(ids[:usable]).to(trainer.device).view(-1, TRAINED_LENGTH)
    stretches = stretches.view(len(stretches), -1, phase.length)
    found = {}
    for name, rounded in (("float32", False), ("official", True)):
        options = Options(select=phase.options.select, rounding=rounded)
        ready = as_computed(trainer.weights, trainer.config, torch.float32, rounded)
        losses = [trainer.loss_of(ready, stretch, options) for stretch in stretches]
        found[name] = torch.stack(losses).mean().exp().item()
    return found


class Run:
    """A training run: where it stands, and what it leaves in its folder."""

    def __init__(self, args: argparse.Namespace):
        config = full_config()
        weights = load_weights(args.begin) if args.begin else first_values(config, args.seed)
        self.args = args
        self.phases = [replace(p, steps=int(p.steps * args.scale)) for p in PHASES]
        self.trainer = Trainer(config, weights, args.device, args.compiled, args.recorded)
        self.log: list[dict[str, float]] = load_state(args.out, self.trainer)
        self.done = int(self.log[-1]["step"]) if self.log else 0
        self.begun = time.monotonic() - (self.log[-1]["seconds"] if self.log else 0.0)
        self.saved = self.recorded = time.monotonic()
        self.losses: list[Tensor] = []

    @property
    def paused(self) -> bool:
        """Whether to stop, to go on later."""
        return time.monotonic() > self.args.pause

    def train(self) -> None:
        """The steps that are not done yet."""
        total, end = sum(phase.steps for phase in self.phases), 0
        for phase in self.phases:
            end += phase.steps
            if self.done < end and not self.paused:
                self.run(phase, end, total)
        self.save()

    def run(self, phase: Phase, end: int, total: int) -> None:
        """The steps of one phase."""
        args, seed = self.args, self.args.seed + self.done
        source = batches(args.corpus, phase.mixture, phase.length, args.tokens, args.workers, seed)
        for ids, weighting in source:
            factor = rate_factor(self.done / total)
            self.losses.append(self.trainer.step(ids, weighting, phase, factor))
            self.done += 1
            if time.monotonic() - self.recorded > args.record or self.done == end:
                self.record(phase)
            if self.done == end:
                print(held_out(self.trainer, args.corpus, phase), flush=True)
                return
            if self.paused:
                self.record(phase)
                return

    def record(self, phase: Phase) -> None:
        """Note the mean losses since the last record; save at times."""
        self.recorded = time.monotonic()
        means = torch.stack(self.losses).mean(0).tolist()
        self.losses.clear()
        found = {"step": self.done, "tokens": self.done * self.args.tokens}
        found |= {"seconds": self.recorded - self.begun, "length": phase.length}
        self.log.append({**found, **dict(zip(LOSSES, means, strict=True))})
        print(" ".join(f"{key} {value:.4g}" for key, value in self.log[-1].items()), flush=True)
        if self.recorded - self.saved > SAVE_EVERY:
            self.saved = self.recorded
            self.save()

    def save(self) -> None:
        """Write the weights, and the state to go on from."""
        save_weights(self.args.out, self.trainer.weights)
        save_state(self.args.out, self.trainer, self.log)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument(
        "--pause", type=float, default=1e9, help="stop after so many, to go on later"
    )
    parser.add_argument("--begin", type=Path, help="bfloat16 weights to start from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--recorded", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per step")
    parser.add_argument("--workers", type=int, default=12, help="processes that make batches")
    parser.add_argument("--record", type=float, default=5.0, help="seconds between records")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # at the next step, so that nothing is half done
        signal.signal(number, lambda *_: setattr(args, "pause", 0.0))
    args.pause += time.monotonic()
    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 64  # one compilation for each width
    torch.set_float32_matmul_precision("high")
    Run(args).train()


if __name__ == "__main__":
    main()
