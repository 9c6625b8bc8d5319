"""DeepSeek-V4 forward pass in NumPy, float64 by default (own code, prefill only).

    model = RefModel("checkpoint dir", mode="exact")      # or kvsim / fullsim
    logits, rec = model.forward(ids)                       # [T, vocab], intermediates

Written for clarity, not speed; whole prompt at once, no cache.  Modes:
  exact    no rounding of activations
  kvsim    cache-side rounding: KV rows FP8 (groups of 64), indexer q/k Hadamard + FP4 (groups of 32)
  fullsim  kvsim, and the input of every FP8 / FP4 matrix rounded to FP8 (groups of 128)
"""

import numpy as np

import v4format as fmt

NOT_ROUNDED = ("wo_a", "compressor.wkv", "compressor.wgate", "weights_proj", "gate", "head")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def fake_fp8(x, group):
    """Round groups of the last axis to E4M3 with a power-of-two scale."""
    g = x.reshape(*x.shape[:-1], -1, group)
    n = fmt.pow2_exponent_at_least(np.maximum(np.abs(g).max(-1, keepdims=True), 1e-4) / 448)
    s = np.ldexp(1.0, n)
    return (fmt.E4M3[fmt.encode_e4m3(g / s)] * s).reshape(x.shape).astype(x.dtype)


def fake_fp4(x, group=32):
    g = x.reshape(*x.shape[:-1], -1, group)
    n = fmt.pow2_exponent_at_least(np.maximum(np.abs(g).max(-1, keepdims=True), 6 * 2.0**-126) / 6)
    s = np.ldexp(1.0, n)
    return (fmt.E2M1[fmt.encode_e2m1(g / s)] * s).reshape(x.shape).astype(x.dtype)


def hadamard(x):
    n, h = x.shape[-1], 1
    while h < n:
        y = x.reshape(*x.shape[:-1], n // (2 * h), 2, h)
        x = np.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], axis=-2).reshape(
            x.shape
        )
        h *= 2
    return x * n**-0.5


class RefModel:
    def __init__(self, path, mode="exact", dtype=np.float64, angle_dtype=np.float64):
        assert mode in ("exact", "kvsim", "fullsim")
        self.mode, self.dtype, self.angle_dtype = mode, dtype, angle_dtype
        self.cfg, weights = fmt.load_checkpoint(path)
        self.w = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in weights.items()}
        self.rec = {}

    # ---------------------------------------------------------- small pieces
    def note(self, key, value):
        self.rec[key] = value

    def linear(self, x, name):
        if self.mode == "fullsim" and not name.endswith(NOT_ROUNDED):
            x = fake_fp8(x, 128)
        return x @ self.w[name + ".weight"].T

    def rms(self, x, name=None):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.cfg["rms_norm_eps"])
        return y if name is None else y * self.w[name + ".weight"]

    def frequencies(self, ratio):
        """One angle per channel pair.  Layers with a compressor use the long base and YaRN.

        The official code forms this table and the angles in float32 (angle_dtype=np.float32)."""
        c, dim, real = self.cfg, self.cfg["qk_rope_head_dim"], self.angle_dtype
        base = c["compress_rope_theta"] if ratio else c["rope_theta"]
        f = 1 / real(base) ** (np.arange(0, dim, 2, dtype=real) / real(dim))
        y = c["rope_scaling"]
        if ratio and y["original_max_position_embeddings"] > 0:

            def channel(
                turns,
            ):  # channel index that makes `turns` full turns over the original length
                return (
                    dim
                    * np.log(y["original_max_position_embeddings"] / (turns * 2 * np.pi))
                    / (2 * np.log(base))
                )

            low = max(np.floor(channel(y["beta_fast"])), 0)
            high = min(np.ceil(channel(y["beta_slow"])), dim - 1)
            if low == high:
                high += 0.001
            fast = 1 - np.clip(
                (np.arange(dim // 2, dtype=real) - real(low)) / real(high - low), 0, 1
            )
            f = f / real(y["factor"]) * (1 - fast) + f * fast
        return f

    def rotate(self, x, positions, freq, sign=1):
        """Turn channel pairs (2i, 2i+1) of the last 2*len(freq) channels; x is [T, ..., width]."""
        rd = 2 * len(freq)
        ang = sign * np.multiply.outer(np.asarray(positions, self.angle_dtype), freq).astype(
            np.float64
        )
        ang = ang.reshape(len(positions), *([1] * (x.ndim - 2)), rd // 2)
        cos, sin = np.cos(ang).astype(x.dtype), np.sin(ang).astype(x.dtype)
        a, b = x[..., -rd::2], x[..., -rd + 1 :: 2]
        y = x.copy()
        y[..., -rd::2] = a * cos - b * sin
        y[..., -rd + 1 :: 2] = a * sin + b * cos
        return y

    def round_kv(self, rows):
        """FP8-round the channels that carry no position."""
        if self.mode == "exact" or not len(rows):
            return rows
        nope = self.cfg["head_dim"] - self.cfg["qk_rope_head_dim"]
        return np.concatenate([fake_fp8(rows[..., :nope], 64), rows[..., nope:]], -1)

    def round_index(self, rows):
        return rows if self.mode == "exact" or not len(rows) else fake_fp4(hadamard(rows))

    # ------------------------------------------------------------ compression
    def compress(self, x, prefix, ratio, width, freq):
        """One row per complete group of `ratio` tokens, [T // ratio, width]."""
        groups = len(x) // ratio
        if not groups:
            return np.zeros((0, width), x.dtype)
        used = x[: groups * ratio]
        kv = self.linear(used, prefix + ".wkv").reshape(groups, ratio, -1)
        gate = (
            self.linear(used, prefix + ".wgate").reshape(groups, ratio, -1)
            + self.w[prefix + ".ape"]
        )
        if ratio == 4:  # two series: the earlier half reaches back one group
            kv, gate = self.overlap(kv, width, 0.0), self.overlap(gate, width, -np.inf)
        rows = self.rms((kv * softmax(gate, 1)).sum(1), prefix + ".norm")
        return self.rotate(rows, np.arange(groups) * ratio, freq)

    def overlap(self, t, width, fill):
        previous = np.concatenate([np.full_like(t[:1], fill), t[:-1]])[..., :width]
        return np.concatenate([previous, t[..., width:]], 1)

    def visible(self, n_tokens, ratio):
        """[T, T // ratio]: a group is visible from its own last token on."""
        return np.arange(n_tokens // ratio)[None] < ((np.arange(n_tokens) + 1) // ratio)[:, None]

    def index_scores(self, x, qr, prefix, freq):
        c, n = self.cfg, len(x)
        heads, width = c["index_n_heads"], c["index_head_dim"]
        keys = self.round_index(self.compress(x, prefix + ".compressor", 4, width, freq))
        q = self.linear(qr, prefix + ".wq_b").reshape(n, heads, width)
        q = self.round_index(self.rotate(q, np.arange(n), freq))
        w = self.linear(x, prefix + ".weights_proj") * (width * heads) ** -0.5
        hits = np.maximum(np.einsum("thd,gd->thg", q, keys), 0)
        return np.einsum("thg,th->tg", hits, w), keys

    def select(self, scores, mask):
        """Mask of the index_topk best visible groups per token."""
        k = self.cfg["index_topk"]
        s = np.where(mask, scores, -np.inf)
        if s.shape[1] <= k:
            return mask
        keep = np.zeros_like(mask)
        np.put_along_axis(keep, np.argsort(-s, axis=1, kind="stable")[:, :k], True, 1)
        return keep & mask

    # -------------------------------------------------------------- attention
    def window(self, n):
        t = np.arange(n)
        return (t[None] <= t[:, None]) & (t[None] > t[:, None] - self.cfg["sliding_window"])

    def attend(self, q, kv, mask, sink, index):
        logits = np.einsum("thd,kd->thk", q, kv) * self.cfg["head_dim"] ** -0.5
        logits = np.where(mask[:, None], logits, -np.inf)
        top = logits.max(-1, keepdims=True)
        p = np.exp(logits - top)
        p /= p.sum(-1, keepdims=True) + np.exp(sink[None, :, None] - top)
        self.note(
            f"attention.{index}", p
        )  # the window's rows of all positions, then compressed ones
        return np.einsum("thk,kd->thd", p, kv)

    def attention(self, x, prefix, index):
        c, n = self.cfg, len(x)
        heads, hd, ratio = c["num_attention_heads"], c["head_dim"], c["compress_ratios"][index]
        a, pos, freq = prefix + ".attn", np.arange(n), self.frequencies(ratio)
        qr = self.rms(self.linear(x, a + ".wq_a"), a + ".q_norm")
        self.note(f"query_latent.{index}", qr)
        q = self.rotate(self.rms(self.linear(qr, a + ".wq_b").reshape(n, heads, hd)), pos, freq)
        kv = self.round_kv(
            self.rotate(self.rms(self.linear(x, a + ".wkv"), a + ".kv_norm"), pos, freq)
        )
        self.note(f"window_kv.{index}", kv)
        mask = self.window(n)
        if ratio:
            rows = self.round_kv(self.compress(x, a + ".compressor", ratio, hd, freq))
            self.note(f"compressed_kv.{index}", rows)
            seen = self.visible(n, ratio)
            self.note(f"visible.{index}", seen)
            if ratio == 4:
                scores, keys = self.index_scores(x, qr, a + ".indexer", freq)
                self.note(f"index_kv.{index}", keys)
                self.note(f"index_scores.{index}", np.where(seen, scores, -np.inf))
                seen = self.select(scores, seen)
                self.note(f"selected.{index}", seen)
            kv, mask = np.concatenate([kv, rows]), np.concatenate([mask, seen], 1)
        o = self.attend(q, kv, mask, self.w[a + ".attn_sink"], index)
        o = self.rotate(o, pos, freq, -1)  # values carry their position too: take it back
        groups = c["o_groups"]
        wo_a = self.w[a + ".wo_a.weight"].reshape(groups, c["o_lora_rank"], -1)
        low = np.einsum("tgi,goi->tgo", o.reshape(n, groups, -1), wo_a).reshape(n, -1)
        return self.linear(low, a + ".wo_b")

    # -------------------------------------------------------------------- MoE
    def route(self, x, ids, prefix, index):
        c = self.cfg
        logits = self.linear(x, prefix + ".gate")
        self.note(f"router_logits.{index}", logits)
        score = np.sqrt(np.logaddexp(logits, 0))
        self.note(f"router_affinity.{index}", score)
        if index < c["num_hash_layers"]:
            chosen = self.w[prefix + ".gate.tid2eid"][ids]
        else:
            biased = score + self.w[prefix + ".gate.bias"]
            self.note(f"router_scores.{index}", biased)
            chosen = np.argsort(-biased, axis=1, kind="stable")[:, : c["num_experts_per_tok"]]
        weight = np.take_along_axis(score, chosen, 1)
        return chosen, weight / weight.sum(1, keepdims=True) * c["routed_scaling_factor"]

    def hidden(self, x, name, weight=None):
        """What an expert multiplies by its w2."""
        lim = self.cfg["swiglu_limit"]
        gate = np.minimum(self.linear(x, name + ".w1"), lim)
        up = np.clip(self.linear(x, name + ".w3"), -lim, lim)
        h = gate * sigmoid(gate) * up
        return h if weight is None else h * weight

    def moe(self, x, ids, prefix, index):
        chosen, weight = self.route(x, ids, prefix, index)
        self.note(f"experts.{index}", chosen)
        self.note(f"expert_weights.{index}", weight)
        shared = prefix + ".shared_experts"
        y = self.linear(self.hidden(x, shared), shared + ".w2")
        self.note(f"shared_out.{index}", y.copy())
        each = np.zeros((*chosen.shape, y.shape[-1]), y.dtype)
        hidden = np.zeros((*chosen.shape, self.cfg["moe_intermediate_size"]), y.dtype)
        for e in range(self.cfg["n_routed_experts"]):
            t, slot = np.nonzero(chosen == e)
            if len(t):
                name = f"{prefix}.experts.{e}"
                hidden[t, slot] = self.hidden(x[t], name, weight[t, slot, None])
                each[t, slot] = self.linear(hidden[t, slot], name + ".w2")
                y[t] += each[t, slot]
        self.note(f"expert_hidden.{index}", hidden)
        self.note(f"expert_out.{index}", each)
        return y

    # ------------------------------------------------------------ connections
    def mixing(self, streams, prefix):
        """(pre, post, comb) of a hyper-connection site; streams [T, hc, D]."""
        c, hc = self.cfg, self.cfg["hc_mult"]
        flat = self.rms(streams.reshape(len(streams), -1))
        m = flat @ self.w[prefix + "_fn"].T
        s, b, eps = self.w[prefix + "_scale"], self.w[prefix + "_base"], c["hc_eps"]
        pre = sigmoid(m[:, :hc] * s[0] + b[:hc]) + eps
        post = 2 * sigmoid(m[:, hc : 2 * hc] * s[1] + b[hc : 2 * hc])
        comb = softmax((m[:, 2 * hc :] * s[2] + b[2 * hc :]).reshape(-1, hc, hc), -1) + eps
        comb = comb / (comb.sum(1, keepdims=True) + eps)
        for _ in range(c["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(2, keepdims=True) + eps)
            comb = comb / (comb.sum(1, keepdims=True) + eps)
        return pre, post, comb

    def merge(self, streams, out, post, comb):
        return post[..., None] * out[:, None] + np.einsum("tij,tid->tjd", comb, streams)

    def block(self, streams, ids, prefix, index):
        for site, run in (
            ("attn", lambda x: self.attention(x, prefix, index)),
            ("ffn", lambda x: self.moe(x, ids, prefix + ".ffn", index)),
        ):
            pre, post, comb = self.mixing(streams, f"{prefix}.hc_{site}")
            collapsed = np.einsum("ti,tid->td", pre, streams)
            for name, value in (("pre", pre), ("post", post), ("comb", comb)):
                self.note(f"{site}_{name}.{index}", value)
            self.note(f"{site}_streams.{index}", streams)
            self.note(f"{site}_collapsed.{index}", collapsed)
            normed = self.rms(collapsed, f"{prefix}.{site}_norm")
            self.note(f"{site}_in.{index}", normed)
            out = run(normed)
            self.note(f"{site}_out.{index}", out)
            streams = self.merge(streams, out, post, comb)
        self.note(f"streams.{index}", streams)
        return streams

    def logits(self, streams, prefix, norm):
        flat = self.rms(streams.reshape(len(streams), -1))
        pre = (
            sigmoid(
                flat @ self.w[prefix + "hc_head_fn"].T * self.w[prefix + "hc_head_scale"]
                + self.w[prefix + "hc_head_base"]
            )
            + self.cfg["hc_eps"]
        )
        collapsed = np.einsum("ti,tid->td", pre, streams)
        self.note(f"{prefix}head_pre", pre)
        self.note(f"{prefix}head_collapsed", collapsed)
        normed = self.rms(collapsed, norm)
        self.note(f"{prefix}head_in", normed)
        return self.linear(normed, "head")

    # ----------------------------------------------------------------- whole
    def forward(self, ids):
        ids = np.asarray(ids)
        self.rec = {}
        streams = np.repeat(self.w["embed.weight"][ids][:, None], self.cfg["hc_mult"], 1)
        for i in range(self.cfg["num_hidden_layers"]):
            streams = self.block(streams, ids, f"layers.{i}", i)
        return self.logits(streams, "", "norm"), self.rec

    def mtp(self, streams, next_ids):
        """Draft logits: position t joins the main model's streams[t] with the embedding of token t+1."""
        n = self.cfg["num_hidden_layers"]
        e = self.linear(
            self.rms(self.w["embed.weight"][np.asarray(next_ids)], "mtp.0.enorm"), "mtp.0.e_proj"
        )
        x = e[:, None] + self.linear(self.rms(streams, "mtp.0.hnorm"), "mtp.0.h_proj")
        return self.logits(self.block(x, np.asarray(next_ids), "mtp.0", n), "mtp.0.", "mtp.0.norm")
