"""Random values for the tensors of a checkpoint, by seed and name.

They are chosen so that every mechanism of the model has a visible effect on the logits: sinks, router
biases, SwiGLU clamps, block scales, norms, HC mixing, the window, both compressors and the indexer's
selection.
"""

import zlib

import numpy as np
import v4format as fmt


def rng_for(seed, name):
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def rough_matrix(rng, shape, std):
    """Gaussian matrix whose scale varies by row, by 128-column block and by 32-column group."""
    o, i = shape
    w = rng.standard_normal(shape) * std
    w *= np.exp(0.15 * rng.standard_normal((o, 1)))
    for width, spread in ((128, 0.3), (32, 0.25)):
        w *= np.repeat(
            np.exp(spread * rng.standard_normal((fmt.ceil_div(o, 128), fmt.ceil_div(i, width)))),
            128,
            axis=0,
        )[:o].repeat(width, axis=1)[:, :i]
    return w * (std / w.std())


# Standard deviation of y = W x for x of unit variance, by the last part of the name.
GAIN = {
    "wq_a": 1.0,
    "wq_b": 1.0,
    "wkv": 1.0,
    "wo_a": 2.0,
    "wo_b": 0.9,
    "wgate": 1.3,
    "weights_proj": 1.0,
    "e_proj": 1.0,
    "h_proj": 1.0,
    "gate": 1.6,
    "w1": 4.0,
    "w3": 4.0,
    "w2": 0.065,
    "head": 2.0,
}


def values(cfg, seed, name, dtype, shape):
    rng = rng_for(seed, name)
    parts = name.split(".")
    leaf = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
    hc = cfg["hc_mult"]
    if name == "embed.weight":
        return rng.standard_normal(shape) + common_direction(cfg, seed)
    if leaf.endswith("norm"):
        base = {"kv_norm": 1.4, "q_norm": 1.1}.get(leaf, 1.0)
        if name.endswith("attn.compressor.norm.weight"):  # few rows compete with a whole window
            base = (
                1.5
                if cfg["compress_ratios"][int(parts[1])] == 4
                else 2.0
                if cfg["sliding_window"] < 64
                else 3.0
            )
        if ".indexer." in name:
            base = hot_channels(cfg, seed, name)
        return base * np.exp(0.25 * rng.standard_normal(shape))
    if leaf == "attn_sink":
        return rng.normal(np.log(cfg["sliding_window"]) - 0.3, 1.0, shape)
    if leaf == "ape":
        return rng.normal(0.0, 0.8, shape)
    if leaf == "tid2eid":
        scores = rng.random((shape[0], cfg["n_routed_experts"]))
        return np.argsort(scores, axis=1)[:, : shape[1]].astype(np.int64)
    if parts[-1] == "bias":  # router correction: moves the choice, not the weight
        return rng.normal(0.0, 0.25, shape)
    if leaf.startswith("hc_"):
        what = leaf.rsplit("_", 1)[1]
        if what == "fn":
            return rng.standard_normal(shape) / np.sqrt(shape[1])
        if what == "scale":
            return rng.uniform(0.4, 0.9, shape)
        base = rng.normal(0.0, 1.2, shape)
        if shape[0] > hc:  # pre, post and the mixing matrix: keep the streams apart
            base[2 * hc :] += 2.0 * np.eye(hc).ravel()
        return base
    w = rough_matrix(rng, shape, GAIN[leaf] / np.sqrt(shape[1]))
    if leaf == "weights_proj":
        w += 2.0 * common_direction(cfg, seed) / shape[1]
    if name.endswith("indexer.wq_b.weight"):
        w *= np.tile(hot_channels(cfg, seed, name), cfg["index_n_heads"])[:, None]
    return w


def hot_channels(cfg, seed, name):
    """A few strong channels in the indexer's queries and keys.  Scores then spread widely compared with the
    FP4 noise (decisive selection), and the Hadamard rotation before FP4 has something to do."""
    n = cfg["index_head_dim"]
    gain = np.full(n, 0.3)
    gain[
        rng_for(seed, "hot channels " + name.split(".indexer.")[0]).choice(
            n, n // 10, replace=False
        )
    ] = 3.0
    return gain


def common_direction(cfg, seed):
    """A direction shared by all embeddings.  The indexer's head weights lean on it and so are mostly
    positive; otherwise scores of exactly 0 (all ReLUs shut) would tie at the selection boundary."""
    return 0.8 * rng_for(seed, "common direction").standard_normal(cfg["hidden_size"])


def logical_shape(dtype, shape):
    return (shape[0], shape[1] * 2) if dtype == "I8" else shape
