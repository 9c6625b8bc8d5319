"""On-disk format of a DeepSeek-V4 (Flash layout) Hugging Face checkpoint.

Own code: tensor inventory, number codecs (E4M3, E8M0, E2M1, BF16) and a small
safetensors reader / writer.  NumPy only, so checkpoints are reproducible
without torch and byte for byte identical for a given seed.
"""

import json
import os
import struct

import numpy as np

BLOCK = 128  # FP8 weights: one scale per 128 x 128 tile
FP4_GROUP = 32  # FP4 weights: one scale per row and 32 inputs


# ------------------------------------------------------------------ inventory
def ceil_div(a, b):
    return -(-a // b)


def linear_fp8(name, n_out, n_in):
    return [
        (name + ".weight", "F8_E4M3", (n_out, n_in)),
        (name + ".scale", "F8_E8M0", (ceil_div(n_out, BLOCK), ceil_div(n_in, BLOCK))),
    ]


def linear_fp4(name, n_out, n_in):
    assert n_in % FP4_GROUP == 0, (name, n_in)
    return [
        (name + ".weight", "I8", (n_out, n_in // 2)),
        (name + ".scale", "F8_E8M0", (n_out, n_in // FP4_GROUP)),
    ]


def compressor_inventory(prefix, hidden, width, ratio):
    cols = width * (2 if ratio == 4 else 1)
    return [
        (prefix + ".ape", "F32", (ratio, cols)),
        (prefix + ".wkv.weight", "BF16", (cols, hidden)),
        (prefix + ".wgate.weight", "BF16", (cols, hidden)),
        (prefix + ".norm.weight", "BF16", (width,)),
    ]


def block_inventory(cfg, prefix, index):
    """Tensors of block `index` (the MTP block follows the last main layer)."""
    d, hd, heads = cfg["hidden_size"], cfg["head_dim"], cfg["num_attention_heads"]
    qr, groups, orank = cfg["q_lora_rank"], cfg["o_groups"], cfg["o_lora_rank"]
    inter, hc = cfg["moe_intermediate_size"], cfg["hc_mult"]
    ratio = cfg["compress_ratios"][index]
    n_exp, k = cfg["n_routed_experts"], cfg["num_experts_per_tok"]
    a, f = prefix + ".attn", prefix + ".ffn"
    out = [(a + ".attn_sink", "F32", (heads,))]
    out += linear_fp8(a + ".wq_a", qr, d)
    out += [(a + ".q_norm.weight", "BF16", (qr,))]
    out += linear_fp8(a + ".wq_b", heads * hd, qr)
    out += linear_fp8(a + ".wkv", hd, d)
    out += [(a + ".kv_norm.weight", "BF16", (hd,))]
    out += linear_fp8(a + ".wo_a", groups * orank, heads * hd // groups)
    out += linear_fp8(a + ".wo_b", d, groups * orank)
    if ratio:
        out += compressor_inventory(a + ".compressor", d, hd, ratio)
    if ratio == 4:
        ih, iw = cfg["index_n_heads"], cfg["index_head_dim"]
        out += linear_fp8(a + ".indexer.wq_b", ih * iw, qr)
        out += [(a + ".indexer.weights_proj.weight", "BF16", (ih, d))]
        out += compressor_inventory(a + ".indexer.compressor", d, iw, ratio)
    out += [
        (prefix + ".attn_norm.weight", "BF16", (d,)),
        (prefix + ".ffn_norm.weight", "BF16", (d,)),
        (f + ".gate.weight", "BF16", (n_exp, d)),
    ]
    if index < cfg["num_hash_layers"]:
        out += [(f + ".gate.tid2eid", "I64", (cfg["vocab_size"], k))]
    else:
        out += [(f + ".gate.bias", "F32", (n_exp,))]
    for e in range(n_exp):
        for part, (o, i) in (("w1", (inter, d)), ("w2", (d, inter)), ("w3", (inter, d))):
            out += linear_fp4(f"{f}.experts.{e}.{part}", o, i)
    for part, (o, i) in (("w1", (inter, d)), ("w2", (d, inter)), ("w3", (inter, d))):
        out += linear_fp8(f"{f}.shared_experts.{part}", o, i)
    for site in ("attn", "ffn"):
        out += [
            (f"{prefix}.hc_{site}_fn", "F32", ((2 + hc) * hc, hc * d)),
            (f"{prefix}.hc_{site}_base", "F32", ((2 + hc) * hc,)),
            (f"{prefix}.hc_{site}_scale", "F32", (3,)),
        ]
    return out


def head_inventory(cfg, prefix):
    hc = cfg["hc_mult"]
    return [
        (prefix + "hc_head_fn", "F32", (hc, hc * cfg["hidden_size"])),
        (prefix + "hc_head_base", "F32", (hc,)),
        (prefix + "hc_head_scale", "F32", (1,)),
    ]


def inventory(cfg):
    """List of shards; a shard is a list of (name, dtype, shape)."""
    d, vocab, n = cfg["hidden_size"], cfg["vocab_size"], cfg["num_hidden_layers"]
    shards = [[("embed.weight", "BF16", (vocab, d))]]
    shards += [block_inventory(cfg, f"layers.{i}", i) for i in range(n)]
    shards += [
        head_inventory(cfg, "")
        + [("norm.weight", "BF16", (d,)), ("head.weight", "BF16", (vocab, d))]
    ]
    for m in range(cfg["num_nextn_predict_layers"]):
        p = f"mtp.{m}"
        shards += [
            block_inventory(cfg, p, n + m)
            + linear_fp8(p + ".e_proj", d, d)
            + linear_fp8(p + ".h_proj", d, d)
            + [(f"{p}.{x}.weight", "BF16", (d,)) for x in ("enorm", "hnorm", "norm")]
            + head_inventory(cfg, p + ".")
        ]
    return shards


ITEM = {
    "F32": 4,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "F64": 8,
    "I16": 2,
    "F16": 2,
}


def nbytes(dtype, shape):
    return ITEM[dtype] * int(np.prod(shape, dtype=np.int64))


# --------------------------------------------------------------------- codecs
def e4m3_table():
    v = np.zeros(256, dtype=np.float64)
    for c in range(256):
        e, m = (c >> 3) & 15, c & 7
        x = m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        v[c] = -x if c & 128 else x
    v[0x7F] = v[0xFF] = np.nan
    return v


E4M3 = e4m3_table()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float64)
E2M1 = np.concatenate([E2M1, -E2M1])


def nearest_even_code(x, grid):
    """Index of the grid entry nearest to |x|; a tie goes to the even index.

    `grid` is ascending and its index parity equals the mantissa parity, which
    holds for both E4M3 (0..0x7e) and E2M1 (0..7)."""
    a = np.abs(x)
    hi = np.clip(np.searchsorted(grid, a, side="left"), 1, len(grid) - 1)
    lo = hi - 1
    mid = (grid[lo] + grid[hi]) / 2
    return np.where(a < mid, lo, np.where(a > mid, hi, np.where(lo % 2 == 0, lo, hi)))


def encode_e4m3(x):
    return (nearest_even_code(x, E4M3[:0x7F]) | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def encode_e2m1(x):
    return (nearest_even_code(x, E2M1[:8]) | np.where(np.signbit(x), 8, 0)).astype(np.uint8)


def pow2_exponent_at_least(x):
    """Smallest integer n with 2**n >= x (x > 0)."""
    m, e = np.frexp(x)
    return np.where(m == 0.5, e - 1, e)


def decode_e8m0(code):
    return np.ldexp(1.0, code.astype(np.int64) - 127)


def quantise_fp8(w):
    """float [o, i] -> (E4M3 codes [o, i], E8M0 codes [o/128, i/128])."""
    o, i = w.shape
    ob, ib = ceil_div(o, BLOCK), ceil_div(i, BLOCK)
    pad = np.zeros((ob * BLOCK, ib * BLOCK))
    pad[:o, :i] = w
    t = pad.reshape(ob, BLOCK, ib, BLOCK)
    n = pow2_exponent_at_least(np.maximum(np.abs(t).max(axis=(1, 3)), 1e-12) / 448.0)
    codes = encode_e4m3(t / np.ldexp(1.0, n)[:, None, :, None])
    return codes.reshape(ob * BLOCK, ib * BLOCK)[:o, :i].copy(), (n + 127).astype(np.uint8)


def dequantise_fp8(codes, scale):
    o, i = codes.shape
    s = np.repeat(np.repeat(decode_e8m0(scale), BLOCK, 0)[:o], BLOCK, 1)[:, :i]
    return E4M3[codes] * s


def quantise_fp4(w):
    """float [o, i] -> (packed bytes [o, i/2], E8M0 codes [o, i/32]); low nibble = even column."""
    o, i = w.shape
    t = w.reshape(o, i // FP4_GROUP, FP4_GROUP)
    n = pow2_exponent_at_least(np.maximum(np.abs(t).max(axis=2), 1e-12) / 6.0)
    c = encode_e2m1(t / np.ldexp(1.0, n)[..., None]).reshape(o, i)
    return (c[:, 0::2] | (c[:, 1::2] << 4)).astype(np.uint8), (n + 127).astype(np.uint8)


def dequantise_fp4(packed, scale):
    packed = packed.view(np.uint8)
    o, half = packed.shape
    v = np.empty((o, half * 2))
    v[:, 0::2] = E2M1[packed & 15]
    v[:, 1::2] = E2M1[packed >> 4]
    return v * np.repeat(decode_e8m0(scale), FP4_GROUP, axis=1)


def to_bf16(x):
    """float -> uint16 bit patterns, round to nearest even."""
    b = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------- safetensors
NP = {
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "F16": np.float16,
}


def write_safetensors(path, tensors, metadata=None):
    """tensors: list of (name, dtype string, ndarray holding the raw storage)."""
    head, pos = {}, 0
    if metadata:
        head["__metadata__"] = metadata
    for name, dtype, arr in tensors:
        size = arr.size * ITEM[dtype]
        assert arr.dtype.itemsize == ITEM[dtype], (name, dtype, arr.dtype)
        head[name] = {"dtype": dtype, "shape": list(arr.shape), "data_offsets": [pos, pos + size]}
        pos += size
    blob = json.dumps(head, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(blob)))
        f.write(blob)
        for _, _, arr in tensors:
            f.write(np.ascontiguousarray(arr).tobytes())
    return pos


def read_safetensors(path):
    """{name: (dtype string, raw ndarray)}"""
    with open(path, "rb") as f:
        raw = f.read()
    n = struct.unpack("<Q", raw[:8])[0]
    out = {}
    for name, t in json.loads(raw[8 : 8 + n]).items():
        if name == "__metadata__":
            continue
        a, b = t["data_offsets"]
        out[name] = (
            t["dtype"],
            np.frombuffer(
                raw, NP[t["dtype"]], count=(b - a) // ITEM[t["dtype"]], offset=8 + n + a
            ).reshape(t["shape"]),
        )
    return out


def load_checkpoint(path):
    """(config, {name: float64 / int64 array}) with every quantised weight decoded exactly."""
    cfg = json.load(open(os.path.join(path, "config.json")))
    index = json.load(open(os.path.join(path, "model.safetensors.index.json")))
    raw = {}
    for shard in sorted(set(index["weight_map"].values())):
        raw.update(read_safetensors(os.path.join(path, shard)))
    assert set(raw) == set(index["weight_map"]), "index and shards disagree"
    out = {}
    for name, (dtype, arr) in raw.items():
        if dtype == "F8_E8M0":
            continue
        if dtype in ("F8_E4M3", "I8"):
            scale = raw[name[: -len("weight")] + "scale"][1]
            out[name] = (
                dequantise_fp8(arr, scale) if dtype == "F8_E4M3" else dequantise_fp4(arr, scale)
            )
        elif dtype == "BF16":
            out[name] = from_bf16(arr).astype(np.float64)
        elif dtype == "F32":
            out[name] = arr.astype(np.float64)
        else:
            out[name] = arr
    return cfg, out


if __name__ == "__main__":
    import sys

    config = json.load(open(sys.argv[1]))
    rows = [t for s in inventory(config) for t in s]
    print(len(rows), "tensors,", sum(nbytes(d, s) for _, d, s in rows), "bytes")
