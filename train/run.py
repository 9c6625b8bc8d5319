"""Train ds4-tiny on one GPU, for a given time.

    python -m train.corpus CORPUS
    python -m train.run CORPUS OUT --seconds 1200

Three phases: short sequences, where most is learnt per second; longer ones; and the full length,
with the checkpoint's and the model's own roundings and the indexer's choice in the forward pass.
`OUT` gets the weights as bfloat16 files of less than 16 MiB, the figures of the run, and at times
a state to go on from: with one in OUT, the same command continues. `--begin WEIGHTS` starts from
the bfloat16 files of an earlier run instead of from random weights.
"""

import argparse
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from ds4mlx.chat.tokens import BOS
from ds4mlx.evaluation.held_out import held_out_texts
from train.batches import batches
from train.checkpoint import load_state, load_weights, save_state, save_weights
from train.network import Network, Options, Trace
from train.optimiser import Optimiser
from train.sizes import TRAINED_LENGTH, full_config
from train.weights import Weights, as_computed, first_values, is_trained

DRAFT_WEIGHT, INDEX_WEIGHT = 0.2, 0.3
BIAS_RATE = 2e-3
WARM_UP, COOL_DOWN = 0.01, 0.5  # shares of the time
SAVE_EVERY = 120.0  # seconds


@dataclass(frozen=True)
class Phase:
    """Sequences of one length, until a share of the time is over."""

    length: int
    until: float
    options: Options
    quantised: bool


PHASES = (
    Phase(512, 0.35, Options(), False),
    Phase(2048, 0.65, Options(index_loss=True, draft=True), False),
    Phase(
        TRAINED_LENGTH, 1.0, Options(rounding=True, select=True, index_loss=True, draft=True), True
    ),
)


def rate_factor(progress: float) -> float:
    """Warm-up, full rate, then linearly down to nothing; progress in 0..1."""
    up, down = progress / WARM_UP, (1 - progress) / COOL_DOWN
    return max(0.0, min(1.0, up, down))


class Trainer:
    """The weights and what changes them."""

    def __init__(self, config: dict[str, Any], weights: Weights, device: str, compiled: bool):
        self.config = config
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.weights = {n: w.to(device).requires_grad_(is_trained(n)) for n, w in weights.items()}
        trained = {n: w for n, w in self.weights.items() if w.requires_grad}
        self.optimiser = Optimiser(trained, config["o_groups"])
        self.device = device
        self.network = Network(config, device, compiled)
        self.plain = Network(config, device, False)
        self.lost = torch.compile(token_losses, dynamic=False) if compiled else token_losses

    def step(self, ids: Tensor, weighting: Tensor, phase: Phase, factor: float) -> Tensor:
        """One update; returns (loss of the text, of the drafts, of the indexers)."""
        trace = Trace()
        ready = as_computed(self.weights, self.config, self.dtype, phase.quantised)
        hidden, drafted = self.network(ready, ids, phase.options, trace)
        head = ready["head.weight"]
        text = self.lost(hidden, head, shifted(ids, 1), shifted(weighting, 1))
        total, zero = text, torch.zeros_like(text)
        draft = index = zero
        if drafted is not None:
            draft = self.lost(drafted, head, shifted(ids, 2), shifted(weighting, 2))
            total = total + DRAFT_WEIGHT * draft
        if trace.index_losses:
            index = torch.stack(trace.index_losses).mean()
            total = total + INDEX_WEIGHT * index
        total.backward()
        self.optimiser.step(factor)
        self.balance(trace)
        return torch.stack([text, draft, index]).detach()

    def loss_of(self, ready: Weights, ids: Tensor, options: Options) -> Tensor:
        """Mean cross-entropy of ids (B, T) under weights as they are computed with."""
        hidden, _ = self.plain(ready, ids, options, Trace())
        weighting = torch.ones_like(ids, dtype=torch.float32)
        return token_losses(hidden, ready["head.weight"], shifted(ids, 1), shifted(weighting, 1))

    @torch.no_grad()
    def balance(self, trace: Trace) -> None:
        """Move routers' biases against the load."""
        for name, load in trace.loads.items():
            bias = self.weights.get(f"{name}.gate.bias")
            if bias is not None:
                bias -= BIAS_RATE * torch.sign(load - load.mean())


def shifted(values: Tensor, by: int) -> Tensor:
    """values (B, T) `by` places on, flattened; zeros (of no weight) behind the end."""
    return F.pad(values[:, by:], (0, by)).flatten()


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, weighting: Tensor) -> Tensor:
    """Weighted mean cross-entropy, in nats, of hidden (N, D) with head (vocabulary, D)."""
    losses = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    return (losses * weighting).sum() / weighting.sum()


@torch.no_grad()
def held_out(trainer: Trainer, corpus: Path) -> dict[str, float]:
    """Perplexity of the held-out text, in stretches of the trained length, by what is rounded."""
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    ids = [
        i for t in held_out_texts() for i in tokenizer.encode(BOS + t, add_special_tokens=False).ids
    ]
    usable = len(ids) // TRAINED_LENGTH * TRAINED_LENGTH
    stretches = torch.tensor(ids[:usable]).view(-1, 1, TRAINED_LENGTH).to(trainer.device)
    found = {}
    for name, quantised, options in (
        ("float32", False, Options(select=True)),
        ("official", True, Options(select=True, rounding=True)),
    ):
        ready = as_computed(trainer.weights, trainer.config, torch.float32, quantised)
        losses = [trainer.loss_of(ready, stretch, options) for stretch in stretches]
        found[name] = torch.stack(losses).mean().exp().item()
    return found


def train(corpus: Path, out: Path, seconds: float, args: argparse.Namespace) -> None:
    """Run the phases that the time so far has not passed."""
    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 64  # one compilation for each width
    torch.set_float32_matmul_precision("high")
    config = full_config()
    weights = load_weights(args.begin) if args.begin else first_values(config, args.seed)
    trainer = Trainer(config, weights, args.device, args.compiled)
    log: list[dict[str, float]] = load_state(out, trainer)
    spent = log[-1]["seconds"] if log else 0.0
    start = time.monotonic() - spent
    args.pause = time.monotonic() + args.pause
    for phase in PHASES:
        run_phase(trainer, corpus, out, phase, start, seconds, log, args)
    save_weights(out, trainer.weights)
    save_state(out, trainer, log)
    if time.monotonic() < args.pause:
        print(held_out(trainer, corpus), flush=True)


def run_phase(
    trainer: Trainer,
    corpus: Path,
    out: Path,
    phase: Phase,
    start: float,
    seconds: float,
    log: list[dict[str, float]],
    args: argparse.Namespace,
) -> None:
    """Steps of one phase until its time is over."""
    done = log[-1]["step"] if log else 0.0
    seen = log[-1]["tokens"] if log else 0.0
    saved = recorded = time.monotonic()
    losses: list[Tensor] = []
    if (time.monotonic() - start) / seconds >= phase.until or time.monotonic() > args.pause:
        return
    source = batches(corpus, phase.length, args.tokens, args.workers, args.seed + int(done))
    for ids, weighting in source:
        progress = (time.monotonic() - start) / seconds
        if progress >= phase.until or time.monotonic() > args.pause:
            break
        ids, weighting = ids.to(args.device), weighting.to(args.device)
        losses.append(trainer.step(ids, weighting, phase, rate_factor(progress)))
        done, seen = done + 1, seen + ids.numel()
        if time.monotonic() - recorded > args.record:
            recorded = time.monotonic()
            text, draft, index = torch.stack(losses).mean(0).tolist()
            losses.clear()
            record = {"step": done, "tokens": seen, "seconds": recorded - start, "text": text}
            log.append({**record, "draft": draft, "index": index, "length": phase.length})
            print(" ".join(f"{key} {value:.4g}" for key, value in log[-1].items()), flush=True)
            if recorded - saved > SAVE_EVERY:
                saved = recorded
                save_state(out, trainer, log)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument(
        "--pause", type=float, default=1e9, help="stop after so many, to go on later"
    )
    parser.add_argument("--begin", type=Path, help="bfloat16 weights to start from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tokens", type=int, default=49152, help="tokens per step")
    parser.add_argument("--workers", type=int, default=12, help="processes that make batches")
    parser.add_argument("--record", type=float, default=5.0, help="seconds between records")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # at the next step, so that nothing is half done
        signal.signal(number, lambda *_: setattr(args, "pause", 0.0))
    train(args.corpus, args.out, args.seconds, args)


if __name__ == "__main__":
    main()
