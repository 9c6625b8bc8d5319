"""One training step: loss, gradients, update; on a GPU recorded once and then replayed.

At these sizes a step has thousands of small launches, which cost more on the host than on the GPU.
A CUDA graph launches them as one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from train.batches import VALUE_WEIGHT, Mixture
from train.network import Network, Options, Trace
from train.optimiser import Optimiser
from train.weights import Weights, as_computed, is_trained

DRAFT_WEIGHT, INDEX_WEIGHT = 0.2, 0.3
BIAS_RATE = 1e-3
PLAIN_STEPS = 3  # before a step is recorded: what is compiled, compiles


@dataclass(frozen=True)
class Phase:
    """So many steps with sequences of one length."""

    length: int
    steps: int
    options: Options
    quantised: bool
    mixture: Mixture


class Trainer:
    """The weights and what changes them."""

    def __init__(
        self, config: dict[str, Any], weights: Weights, device: str, compiled: bool, recorded: bool
    ):
        self.config, self.recorded = config, recorded and device == "cuda"
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.weights = {n: w.to(device).requires_grad_(is_trained(n)) for n, w in weights.items()}
        trained = {n: w for n, w in self.weights.items() if w.requires_grad}
        self.optimiser = Optimiser(trained, config["o_groups"])
        self.device = device
        self.network = Network(config, device, compiled)
        self.plain = Network(config, device, False)
        self.lost = torch.compile(token_losses, dynamic=False) if compiled else token_losses
        self.begin(None)

    def begin(self, phase: Phase | None) -> None:
        """Forget the recorded step of another phase."""
        self.phase, self.graph, self.steps = phase, None, 0
        self.inputs: tuple[Tensor, Tensor] | None = None

    def step(self, ids: Tensor, weighting: Tensor, phase: Phase, factor: float) -> Tensor:
        """One update; returns the losses of the text, its values, the drafts and the indexers."""
        if phase is not self.phase:
            self.begin(phase)
        self.optimiser.set_factor(factor)
        if not self.recorded:
            return self.update(ids.to(self.device), weighting.to(self.device))
        if self.inputs is None:
            self.inputs = ids.to(self.device), weighting.to(self.device)
        for kept, new in zip(self.inputs, (ids, weighting), strict=True):
            kept.copy_(new, non_blocking=True)
        self.steps += 1
        if self.steps <= PLAIN_STEPS:
            return self.aside(*self.inputs)
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.losses.clone()

    def aside(self, *inputs: Tensor) -> Tensor:
        """An update on a stream of its own, as recording one wants the updates before it."""
        stream, usual = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            losses = self.update(*inputs)
        usual.wait_stream(stream)
        return losses

    def record(self) -> None:
        """Record the update of this phase."""
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = self.update(*self.inputs)

    def update(self, ids: Tensor, weighting: Tensor) -> Tensor:
        """Forward, backward, and the step of the optimiser."""
        trace = Trace()
        ready = as_computed(self.weights, self.config, self.dtype, self.phase.quantised)
        hidden, drafted = self.network(ready, ids, self.phase.options, trace)
        head = ready["head.weight"]
        text, values = self.lost(hidden, head, shifted(ids, 1), shifted(weighting, 1))
        total, zero = text, torch.zeros_like(text)
        draft = index = zero
        if drafted is not None:
            draft, _ = self.lost(drafted, head, shifted(ids, 2), shifted(weighting, 2))
            total = total + DRAFT_WEIGHT * draft
        if trace.index_losses:
            index = torch.stack(trace.index_losses).mean()
            total = total + INDEX_WEIGHT * index
        total.backward()
        self.optimiser.step()
        self.balance(trace)
        return torch.stack([text, values, draft, index]).detach()

    def loss_of(self, ready: Weights, ids: Tensor, options: Options) -> Tensor:
        """Mean cross-entropy of ids (B, T) under weights as they are computed with."""
        hidden, _ = self.plain(ready, ids, options, Trace())
        weighting = torch.ones_like(ids, dtype=torch.float32)
        head = ready["head.weight"]
        return token_losses(hidden, head, shifted(ids, 1), shifted(weighting, 1))[0]

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


def token_losses(
    hidden: Tensor, head: Tensor, targets: Tensor, weighting: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, in nats, of hidden (N, D) with head (vocabulary, D).

    The weighted mean of all tokens, and the mean of the values that can be looked up.
    """
    losses = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    values = (weighting == VALUE_WEIGHT).float()
    found = (losses.detach() * values).sum() / values.sum().clamp(min=1)
    return (losses * weighting).sum() / weighting.sum(), found
