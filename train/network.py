"""The model in PyTorch, for training: whole sequences, no decode state, gradients everywhere.

Functions of a dictionary of weights under their official names (experts stacked), so that the
same code runs on the trained weights and on their rounded forms. The dense mixture of experts runs
every expert on every token: at these widths that is faster than sorting tokens.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ds4mlx.config import ModelConfig
from ds4mlx.model.rope import frequencies
from train.rounding import hadamard_matrix, index_rounding, kv_rounding

Weights = dict[str, Tensor]
Angles = tuple[Tensor, Tensor]


@dataclass
class Options:
    """What a step does beyond the plain forward pass."""

    rounding: bool = False  # the model's own FP8 and FP4 roundings of rows
    select: bool = False  # the indexer's choice hides the other compressed rows
    index_loss: bool = False
    draft: bool = False  # the MTP block's loss
    hide: int = -1  # compressed rows of this ratio are hidden, to see what they carry


@dataclass
class Trace:
    """What a forward pass leaves beside its result."""

    index_losses: list[Tensor] = field(default_factory=list)
    loads: dict[str, Tensor] = field(default_factory=dict)  # router -> share of tokens per expert


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, in x's type."""
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (2i, 2i + 1) of the last channels of x; cos, sin broadcast to pairs."""
    dims = 2 * cos.shape[-1]
    pairs = x[..., -dims:].float().unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-dims], turned.to(x.dtype)], -1)


def mixes(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """streams (N, n, D) -> the collapsed input (N, D), post (n, N) and comb (n, n, N)."""
    n = streams.shape[1]
    flat = streams.flatten(1).float()
    unit = torch.rsqrt(flat.square().mean(-1) + 1e-6)
    mix = (fn @ flat.T) * unit
    pre = torch.sigmoid(mix[:n] * scale[0] + base[:n, None]) + eps
    post = 2 * torch.sigmoid(mix[n : 2 * n] * scale[1] + base[n : 2 * n, None])
    comb = (mix[2 * n :] * scale[2] + base[2 * n :, None]).view(n, n, -1)
    comb = torch.softmax(comb, 1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    collapsed = sum(pre[j, :, None] * streams[:, j].float() for j in range(n))
    return collapsed.to(streams.dtype), post, comb


def merge(streams: Tensor, out: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """new_k = post_k out + sum_j comb[j, k] stream_j: (N, n, D)."""
    n, wide = streams.shape[1], out.float()
    parts = [streams[:, j].float() for j in range(n)]
    new = [
        post[k, :, None] * wide + sum(comb[j, k, :, None] * parts[j] for j in range(n))
        for k in range(n)
    ]
    return torch.stack(new, 1).to(streams.dtype)


def head_collapse(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The streams (N, n, D) as one vector each, before the final norm."""
    flat = streams.flatten(1).float()
    unit = torch.rsqrt(flat.square().mean(-1) + 1e-6)
    pre = torch.sigmoid((fn @ flat.T) * unit * scale + base[:, None]) + eps
    parts = range(streams.shape[1])
    return sum(pre[j, :, None] * streams[:, j].float() for j in parts).to(streams.dtype)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(gate) * up, float32, clamped as the experts' are."""
    gate, up = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return F.silu(gate) * up


def queries(q: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: float) -> Tensor:
    """q (N, H, c): unit RMS per head, rotated, scaled for the softmax."""
    wide = q.float()
    wide = wide * (scale * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))
    return rotate(wide.to(q.dtype), cos, sin)


def pool(values: Tensor, scores: Tensor) -> Tensor:
    """Softmax-weighted sum over axis 1 of (rows, candidates, width), channel by channel."""
    return (torch.softmax(scores.float(), 1) * values.float()).sum(1).to(values.dtype)


class Network:
    """The forward pass for one configuration (the official config.json's keys).

    What is compiled sees tokens flattened, (N, ...): with the same number of tokens a step, longer
    sequences compile nothing anew.
    """

    def __init__(self, config: dict[str, Any], device: str, compiled: bool):
        self.config, self.device = config, device
        wrap = partial(torch.compile, dynamic=False) if compiled else (lambda function: function)
        self.mixes, self.merge, self.swiglu = wrap(mixes), wrap(merge), wrap(swiglu)
        self.queries, self.rotate, self.pool = wrap(queries), wrap(rotate), wrap(pool)
        self.norm, self.collapse = rms_norm, wrap(head_collapse)
        self.hadamard = hadamard_matrix(config["index_head_dim"]).to(device)
        self.tables: dict[tuple[int, int, bool, int], Angles] = {}

    def angles(self, batch: int, length: int, compressed: bool, step: int = 1) -> Angles:
        """cos and sin (batch * length, rope / 2) of positions 0, step, ... of each sequence."""
        key = (batch, length, compressed, step)
        if key not in self.tables:
            turns = frequencies(ModelConfig.from_dict(self.config), compressed)
            angle = torch.arange(length).mul(step)[:, None] * torch.tensor(turns)
            angle = angle.repeat(batch, 1)
            self.tables[key] = (angle.cos().to(self.device), angle.sin().to(self.device))
        return self.tables[key]

    def __call__(
        self, w: Weights, ids: Tensor, options: Options, trace: Trace
    ) -> tuple[Tensor, Tensor | None]:
        """ids (B, T) -> hidden states before the head, (N, D), and the MTP block's, if asked for.

        The MTP block's states at position t are for token t + 2.
        """
        embedded = F.embedding(ids, w["embed.weight"]).flatten(0, 1)
        streams = embedded[:, None].expand(-1, self.config["hc_mult"], -1)
        for layer in range(self.config["num_hidden_layers"]):
            streams = self.block(w, f"layers.{layer}", layer, streams, ids, options, trace)
        hidden = self.head(w, "", streams)
        if not options.draft:
            return hidden, None
        following = embedded.view(*ids.shape, -1).roll(-1, 1).flatten(0, 1)
        eps = self.config["rms_norm_eps"]
        joined = self.norm(following, w["mtp.0.enorm.weight"], eps) @ w["mtp.0.e_proj.weight"].T
        streams = self.norm(streams, w["mtp.0.hnorm.weight"], eps) @ w["mtp.0.h_proj.weight"].T
        streams = joined[:, None] + streams
        block, shifted = self.config["num_hidden_layers"], ids.roll(-1, 1)
        streams = self.block(w, "mtp.0", block, streams, shifted, options, trace)
        return hidden, self.head(w, "mtp.0.", streams)

    def head(self, w: Weights, prefix: str, streams: Tensor) -> Tensor:
        """Collapsed and normed streams, (N, D)."""
        site = (w[f"{prefix}hc_head_{part}"] for part in ("fn", "base", "scale"))
        hidden = self.collapse(streams, *site, self.config["hc_eps"])
        return self.norm(hidden, w[f"{prefix}norm.weight"], self.config["rms_norm_eps"])

    def block(
        self,
        w: Weights,
        name: str,
        index: int,
        streams: Tensor,
        ids: Tensor,
        options: Options,
        trace: Trace,
    ) -> Tensor:
        """One block on streams (N, n, D)."""
        c = self.config
        for site in ("attn", "ffn"):
            parts = (w[f"{name}.hc_{site}_{part}"] for part in ("fn", "base", "scale"))
            x, post, comb = self.mixes(streams, *parts, c["hc_sinkhorn_iters"], c["hc_eps"])
            x = self.norm(x, w[f"{name}.{site}_norm.weight"], c["rms_norm_eps"])
            if site == "attn":
                ratio = c["compress_ratios"][index]
                out = self.attention(
                    w, f"{name}.attn", ratio, x.view(*ids.shape, -1), options, trace
                )
            else:
                out = self.experts(w, f"{name}.ffn", x, ids, index < c["num_hash_layers"], trace)
            streams = self.merge(streams, out, post, comb)
        return streams

    def experts(
        self, w: Weights, name: str, x: Tensor, ids: Tensor, hashed: bool, trace: Trace
    ) -> Tensor:
        """Routed and shared experts of x (N, D)."""
        c = self.config
        scores = F.softplus(x.float() @ w[f"{name}.gate.weight"].float().T).sqrt()
        if hashed:
            chosen = w[f"{name}.gate.tid2eid"][ids.flatten()]
        else:
            chosen = (scores + w[f"{name}.gate.bias"]).topk(c["num_experts_per_tok"], -1).indices
        mask = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
        trace.loads[name] = mask.mean(0).detach()
        weights = scores * mask
        weights = weights / weights.sum(-1, keepdim=True) * c["routed_scaling_factor"]
        gate = x @ w[f"{name}.experts.w1"].flatten(0, 1).T
        up = x @ w[f"{name}.experts.w3"].flatten(0, 1).T
        hidden = self.swiglu(gate, up, c["swiglu_limit"])
        hidden = hidden.unflatten(1, (c["n_routed_experts"], -1)) * weights[..., None]
        out = hidden.flatten(1).to(x.dtype) @ w[f"{name}.experts.w2"].transpose(1, 2).flatten(0, 1)
        shared = f"{name}.shared_experts"
        gate, up = x @ w[f"{shared}.w1.weight"].T, x @ w[f"{shared}.w3.weight"].T
        inner = self.swiglu(gate, up, c["swiglu_limit"]).to(x.dtype)
        return out + inner @ w[f"{shared}.w2.weight"].T

    def attention(
        self, w: Weights, name: str, ratio: int, x: Tensor, options: Options, trace: Trace
    ) -> Tensor:
        """Attention of x (B, T, D), T a multiple of 128; (N, D)."""
        c, (batch, length, _) = self.config, x.shape
        eps, width = c["rms_norm_eps"], c["head_dim"]
        flat, (cos, sin) = x.flatten(0, 1), self.angles(batch, length, ratio > 0)
        qr = self.norm(flat @ w[f"{name}.wq_a.weight"].T, w[f"{name}.q_norm.weight"], eps)
        q = (qr @ w[f"{name}.wq_b.weight"].T).unflatten(-1, (-1, width))
        q = self.queries(q, cos[:, None], sin[:, None], eps, width**-0.5)
        kv = self.norm(flat @ w[f"{name}.wkv.weight"].T, w[f"{name}.kv_norm.weight"], eps)
        kv = self.rounded(self.rotate(kv, cos, sin), options).view(batch, length, width)
        rows = hidden = scores = None
        if ratio and ratio != options.hide:
            rows = self.rounded(self.compress(w, f"{name}.compressor", ratio, x), options)
            last = torch.arange(length, device=x.device)[:, None] + 1
            hidden = torch.arange(rows.shape[1], device=x.device) >= last // ratio  # (T, R)
        if rows is not None and ratio == 4 and (options.select or options.index_loss):
            scores = self.index(w, f"{name}.indexer", x.detach(), qr.detach(), options)
            hidden = self.unselected(scores, hidden) if options.select else hidden
        q = q.view(batch, length, -1, width)
        out, mass = self.core(q, kv, rows, hidden, w[f"{name}.attn_sink"])
        if scores is not None and options.index_loss:
            trace.index_losses.append(self.index_loss(scores, mass, length))
        out = self.rotate(out.flatten(0, 1), cos[:, None], -sin[:, None])
        return self.output(w, name, out)

    def output(self, w: Weights, name: str, out: Tensor) -> Tensor:
        """Heads (N, H, c) -> (N, D): each group of heads through wo_a, all through wo_b."""
        groups = self.config["o_groups"]
        low = w[f"{name}.wo_a.weight"].unflatten(0, (groups, -1))  # (G, rank, in)
        latent = torch.einsum("ngi,gri->ngr", out.reshape(len(out), groups, -1), low)
        return latent.flatten(1) @ w[f"{name}.wo_b.weight"].T

    def rounded(self, rows: Tensor, options: Options) -> Tensor:
        """KV rows as the model keeps them."""
        return kv_rounding(rows, self.config["qk_rope_head_dim"]) if options.rounding else rows

    def compress(self, w: Weights, name: str, ratio: int, x: Tensor) -> Tensor:
        """Compressed rows of x (B, T, D), normed and rotated: (B, T / ratio, width)."""
        batch, count = x.shape[0], x.shape[1] // ratio
        values = (x @ w[f"{name}.wkv.weight"].T).unflatten(1, (-1, ratio))
        scores = (x @ w[f"{name}.wgate.weight"].T).unflatten(1, (-1, ratio)) + w[f"{name}.ape"]
        if ratio == 4:
            width = values.shape[-1] // 2
            values = torch.cat([_shifted(values[..., :width], 0.0), values[..., width:]], 2)
            scores = torch.cat([_shifted(scores[..., :width], -1e9), scores[..., width:]], 2)
        rows = self.pool(values.flatten(0, 1), scores.flatten(0, 1))
        rows = self.norm(rows, w[f"{name}.norm.weight"], self.config["rms_norm_eps"])
        return self.rotate(rows, *self.angles(batch, count, True, ratio)).view(batch, count, -1)

    def index(
        self, w: Weights, name: str, x: Tensor, qr: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's queries (B, T, heads, width), rows (B, R, width), head weights."""
        c, (batch, length, _) = self.config, x.shape
        cos, sin = self.angles(batch, length, True)
        q = (qr @ w[f"{name}.wq_b.weight"].T).unflatten(-1, (-1, c["index_head_dim"]))
        q = self.rotate(q, cos[:, None], sin[:, None])
        rows = self.compress(w, f"{name}.compressor", 4, x)
        if options.rounding:
            q, rows = index_rounding(q, self.hadamard), index_rounding(rows, self.hadamard)
        scale = (c["index_head_dim"] * c["index_n_heads"]) ** -0.5
        weights = x @ w[f"{name}.weights_proj.weight"].T * scale
        return q.view(batch, length, *q.shape[1:]), rows, weights

    @staticmethod
    def row_scores(q: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """sum_h w_h relu(q_h . k): (B, T, R) from q (B, T, heads, width)."""
        hits = torch.relu(torch.einsum("bthi,bri->bthr", q, rows))
        return torch.einsum("bth,bthr->btr", weights, hits)

    def unselected(self, indexed: tuple[Tensor, Tensor, Tensor], hidden: Tensor) -> Tensor:
        """(B, T, R): rows that are not visible, or not among the best `index_topk`."""
        keep = self.config["index_topk"]
        if hidden.shape[-1] <= keep:
            return hidden
        with torch.no_grad():
            scores = self.row_scores(*indexed).masked_fill(hidden, -1e9)
            least = scores.topk(keep, -1).values[..., -1:]
            return hidden | (scores < least)

    def index_loss(
        self, indexed: tuple[Tensor, Tensor, Tensor], mass: Tensor, length: int
    ) -> Tensor:
        """Cross-entropy of the indexer's softmax to attention's mass over rows (B, T, R).

        On every eighth query, from a random one on; a query counts by its mass on rows.
        """
        q, rows, weights = indexed
        first = torch.randint(8, (), device=q.device)
        at = torch.arange(0, length, 8, device=q.device) + first
        hidden = torch.arange(rows.shape[1], device=q.device) >= (at[:, None] + 1) // 4
        scores = self.row_scores(q[:, at], rows, weights[:, at]).float()
        logs = torch.log_softmax(scores.masked_fill(hidden, -1e9), -1)
        target = mass[:, at].detach().float()
        return -(target * logs).sum() / target.sum().clamp(min=1e-6)

    def core(
        self, q: Tensor, kv: Tensor, rows: Tensor | None, hidden: Tensor | None, sink: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One softmax over the window, the compressed rows and the sink.

        q (B, T, H, c), scaled; hidden (T, R) or (B, T, R) marks rows out of sight. Returns
        (B, T, H, c) and the heads' mean attention on each row, (B, T, R).
        """
        window, (batch, length, heads, width) = self.config["sliding_window"], q.shape
        near = kv.view(batch, -1, window, width)
        near = torch.cat([F.pad(near, (0, 0, 0, 0, 1, 0))[:, :-1], near], 2)  # (B, blocks, 2W, c)
        blocks = near.shape[1]
        logits = q.reshape(batch, blocks, window * heads, width) @ near.mT
        logits = logits.view(batch, blocks, window, heads, 2 * window)
        logits = logits.masked_fill(self.out_of_window(blocks, window)[:, :, None], -1e9)
        parts = [logits.view(batch, length, heads, -1)]
        if rows is not None:
            far = (q.reshape(batch, length * heads, width) @ rows.mT).view(batch, length, heads, -1)
            parts.append(far.masked_fill(hidden.unsqueeze(-2), -1e9))
        parts.append(sink.to(q.dtype)[:, None].expand(batch, length, heads, 1))
        weights = torch.softmax(torch.cat(parts, -1), -1, dtype=torch.float32).to(q.dtype)
        nearby = weights[..., : 2 * window].reshape(batch, blocks, window * heads, -1)
        out = (nearby @ near).view(q.shape)
        if rows is None:
            return out, out
        beyond = weights[..., 2 * window : -1]
        out = out + (beyond.reshape(batch, length * heads, -1) @ rows).view(q.shape)
        return out, beyond.detach().mean(2)

    def out_of_window(self, blocks: int, window: int) -> Tensor:
        """(blocks, W, 2W): which of the previous and own block's keys a query does not see."""
        query = torch.arange(window, device=self.device)[:, None]
        key = torch.arange(2 * window, device=self.device)
        outside = ((key <= query) | (key > query + window)).expand(blocks, -1, -1)
        first = torch.arange(blocks, device=self.device)[:, None, None] == 0
        return outside | (first & (key < window))


def _shifted(groups: Tensor, filling: float) -> Tensor:
    """Groups (B, R, 4, width) moved one row on; the first row's are `filling`."""
    first = torch.full_like(groups[:, :1], filling)
    return torch.cat([first, groups[:, :-1]], 1)
