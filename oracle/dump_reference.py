#!/usr/bin/env python3
"""Write reference outputs of a checkpoint: one .safetensors and a JSON manifest.

    python dump_reference.py CHECKPOINT --out DIR ...

Computed by refmodel.py (float64, NumPy only), which agrees with the official code and with transformers to float32 noise.

Prompts are prefixes of a few random token sequences, so one table of logits per
sequence serves them all: a prompt of n tokens must give the first n rows, however
it is cut into prefill and decode.  Of `--tries` random sequences the one is kept
whose discrete choices (expert top-k, indexer top-k) are decided by the widest
margins, so that a correct float32 implementation makes the same choices (for the
sequence that is continued greedily, variety of the continuation counts as well).
"""

import argparse
import hashlib
import json
import os
import time

import numpy as np

import v4format as fmt

SELECTED = [3, 16, 127, 128, 255, 299]
TAIL = 8


# ------------------------------------------------------------------- engines
class Own:
    def __init__(self, path, mode):
        from refmodel import RefModel

        self.m = RefModel(path, mode)
        self.cfg = self.m.cfg

    def prefill(self, ids, record=False):
        logits, rec = self.m.forward(ids)
        for k in [k for k in rec if k.startswith("selected.")]:
            rec["topk." + k.split(".")[1]] = np.where(rec[k], np.arange(rec[k].shape[1]), -1)
        return logits, dict(rec)

    def greedy(self, ids, steps):
        seq, rows = list(ids), []
        for _ in range(steps):
            rows.append(self.m.forward(seq)[0][-1])
            seq.append(int(rows[-1].argmax()))
        return seq, np.stack(rows)

    def mtp(self, streams, next_ids):
        return self.m.mtp(streams, next_ids)


ENGINES = {"own": Own}


# ------------------------------------------------------------------- margins
def selection_gap(scores, k):
    """[T] distance between the last kept and the first dropped finite score, in row standard deviations."""
    gap = np.full(len(scores), np.inf)
    for t, row in enumerate(scores):
        s = np.sort(row[np.isfinite(row)])[::-1]
        if len(s) > k:
            gap[t] = (s[k - 1] - s[k]) / max(s.std(), 1e-12)
    return gap


def gaps(cfg, rec):
    out = {}
    for key, scores in rec.items():
        kind, _, layer = key.partition(".")
        if kind == "index_scores" and scores.size:
            out[f"topk_gap.{layer}"] = selection_gap(scores, cfg["index_topk"])
        if kind == "router_scores":
            out[f"expert_gap.{layer}"] = selection_gap(scores, cfg["num_experts_per_tok"])
    return out


def smallest(g):
    return float(min((v.min() for v in g.values()), default=np.inf))


def choose_prompt(engine, length, seed, tries, greedy=None):
    """(margin, draw number, ids).  With greedy = (n, steps) the continuation of the first n tokens should also be
    varied and decided by clear margins."""
    found = []
    for n in range(tries):
        ids = np.random.default_rng([seed, length, n]).integers(0, engine.cfg["vocab_size"], length)
        _, rec = engine.prefill(ids, record=True)
        found.append((smallest(gaps(engine.cfg, rec)), n, ids))
        if found[-1][0] > 1e-2 and not greedy:
            break
    found.sort(key=lambda f: -f[0])
    if not greedy:
        return found[0]

    def quality(f):
        seq, rows = engine.greedy(list(f[2][: greedy[0]]), greedy[1])
        top = np.sort(rows, axis=1)
        return f[0] > 5e-5, (top[:, -1] - top[:, -2]).min() > 0.01, len(set(seq[greedy[0] :]))

    return max(found, key=quality)


# ------------------------------------------------------------------- writing
def log_softmax(x):
    x = x.astype(np.float64)
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def compare(exact, other):
    p, q = log_softmax(exact), log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return {
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float((exact.argmax(-1) == other.argmax(-1)).mean()),
        "abs_dlogit_mean": float(np.abs(exact - other).mean()),
        "abs_dlogit_max": float(np.abs(exact - other).max()),
    }


class Writer:
    def __init__(self):
        self.rows, self.about = [], {}

    def put(self, name, array, about=None, half=False):
        array = np.ascontiguousarray(array)
        if array.dtype.kind == "f":
            dtype, array = (
                ("F16", array.astype(np.float16)) if half else ("F32", array.astype(np.float32))
            )
        else:
            dtype = (
                "I32"
                if array.size == 0 or abs(array).max() > 32000 or name.endswith("ids")
                else "I16"
            )
            array = array.astype(fmt.NP[dtype])
        self.rows.append((name, dtype, array))
        if about:
            self.about.setdefault(name.split("/", 2)[-1].split(".")[0], about)


def put_details(w, prefix, cfg, rec):
    n = len(next(v for k, v in rec.items() if k.startswith("streams.")))
    rows = [t for t in SELECTED if t < n]
    w.put(
        prefix + "selected_positions",
        np.array(rows),
        "positions of the rows of streams, attn_out and ffn_out",
    )
    for i in range(cfg["num_hidden_layers"]):
        s = rec[f"streams.{i}"]
        w.put(
            f"{prefix}streams.{i}",
            s[rows],
            "residual streams after layer i [selected, hc_mult, hidden]",
        )
        w.put(
            f"{prefix}streams_rms.{i}",
            np.sqrt((s**2).mean(-1)),
            "RMS of every stream at every position [T, hc_mult]",
        )
        w.put(
            f"{prefix}streams_mean.{i}",
            s.mean(-1),
            "mean of every stream at every position [T, hc_mult]",
        )
        for kind in ("attn_out", "ffn_out"):
            w.put(
                f"{prefix}{kind}.{i}",
                rec[f"{kind}.{i}"][rows[-4:]],
                f"output of the {'attention' if kind[0] == 'a' else 'MoE'} block before the hyper-connection "
                "merge, last 4 selected positions [4, hidden]",
            )
        w.put(
            f"{prefix}window_kv.{i}",
            rec[f"window_kv.{i}"][-4:],
            "KV rows of the last 4 tokens, normed, rotated (and rounded in kvsim / fullsim) [4, head_dim]",
        )
        if f"compressed_kv.{i}" in rec and rec[f"compressed_kv.{i}"].size:
            w.put(
                f"{prefix}compressed_kv.{i}",
                rec[f"compressed_kv.{i}"],
                "compressed KV rows, normed, rotated (and rounded) [T // ratio, head_dim]",
            )
        if f"index_kv.{i}" in rec and rec[f"index_kv.{i}"].size:
            w.put(
                f"{prefix}index_kv.{i}",
                rec[f"index_kv.{i}"],
                "indexer key rows; plain in exact mode, Hadamard-rotated and FP4-rounded otherwise [T // 4, index_head_dim]",
            )
            t = np.sort(rec[f"topk.{i}"], axis=1)[:, ::-1][:, : cfg["index_topk"]]
            t = np.sort(np.where(t < 0, 1 << 14, t), axis=1)
            w.put(
                f"{prefix}topk.{i}",
                np.where(t == 1 << 14, -1, t),
                "compressed rows kept by the indexer, ascending, -1 = none [T, min(index_topk, T // 4)]",
            )
        order = np.argsort(rec[f"experts.{i}"], axis=1, kind="stable")
        w.put(
            f"{prefix}experts.{i}",
            np.take_along_axis(rec[f"experts.{i}"], order, 1),
            "chosen experts, ascending [T, k]",
        )
        w.put(
            f"{prefix}expert_weights.{i}",
            np.take_along_axis(rec[f"expert_weights.{i}"], order, 1),
            "their weights (sum = routed_scaling_factor) [T, k]",
        )
    for key, value in gaps(cfg, rec).items():
        w.put(
            prefix + key,
            np.where(np.isfinite(value), value, 1e9),
            "margin of the discrete choice per position, in standard deviations of its scores; 1e9 = nothing to choose [T]",
        )


def dump(path, out, engine, sequences, greedy, modes, seed, tries, details, full):
    """sequences: [(length, [prompt lengths])]; details, full: sets of "mode:length"."""
    os.makedirs(out, exist_ok=True)
    cfg = json.load(open(os.path.join(path, "config.json")))
    w, t0 = Writer(), time.time()
    manifest = {
        "checkpoint_config": {
            k: cfg[k]
            for k in (
                "compress_ratios",
                "num_hash_layers",
                "sliding_window",
                "index_topk",
                "hidden_size",
                "head_dim",
                "vocab_size",
            )
        },
        "engine": engine,
        "seed": seed,
        "files_sha256": {
            f: hashlib.sha256(open(os.path.join(path, f), "rb").read()).hexdigest()
            for f in sorted(os.listdir(path))
            if f.endswith(".safetensors")
        },
        "modes": {
            "exact": "no rounding of activations (float32 arithmetic)",
            "kvsim": "KV rows FP8 (groups of 64, power-of-two scale) and indexer q/k Hadamard + FP4 (groups of 32)",
            "fullsim": "kvsim + FP8 input rounding (groups of 128) before every FP8/FP4 matrix",
            "bf16": "fullsim with bfloat16 tensors between operations (the official GPU path, emulated)",
        },
        "prompts": {},
        "sequences": {},
        "greedy": {},
    }
    exact = ENGINES[engine](path, "exact")
    ids_of, table = {}, {}
    for n, cuts in sequences:
        gap, draw, ids_of[f"s{n}"] = choose_prompt(
            exact, n, seed, tries, greedy if greedy[0] in cuts else None
        )
        manifest["sequences"][f"s{n}"] = {
            "length": n,
            "draw": draw,
            "smallest_choice_margin": gap if np.isfinite(gap) else None,
        }
        for c in cuts:
            manifest["prompts"][f"p{c}"] = {"sequence": f"s{n}", "length": c}
        w.put(f"s{n}/ids", ids_of[f"s{n}"], "token ids of the sequence [T]")
    for mode in modes:
        e = exact if mode == "exact" else ENGINES[engine](path, mode)
        for n, cuts in sequences:
            name, prefix = f"s{n}", f"s{n}/{mode}/"
            logits, _ = e.prefill(ids_of[name])
            if mode == "exact":
                table[name] = logits
                w.put(prefix + "logits", logits, "logits after every token [T, vocab]")
            else:
                manifest["sequences"][name].setdefault("versus_exact", {})[mode] = compare(
                    table[name], logits
                )
                w.put(prefix + "top1", logits.argmax(-1), "argmax of the logits [T]")
                if f"{mode}:{n}" in full:
                    w.put(prefix + "logits", logits, half=True)
                else:
                    rows = sorted({t for c in cuts for t in range(max(0, c - TAIL), c)})
                    w.put(prefix + "rows", np.array(rows), "which rows logits_rows holds")
                    w.put(
                        prefix + "logits_rows",
                        logits[rows],
                        "logits of some rows, float16",
                        half=True,
                    )
            for c in cuts:
                part, rec = e.prefill(ids_of[name][:c], record=f"{mode}:{c}" in details)
                key = "prefill_versus_sequence_max_abs" + ("" if mode == "exact" else "_" + mode)
                manifest["prompts"][f"p{c}"][key] = float(np.abs(part - logits[:c]).max())
                if not f"{mode}:{c}" in details:
                    continue
                put_details(w, f"p{c}/{mode}/", cfg, rec)
                if cfg["num_nextn_predict_layers"] and c > 1:
                    last = rec[f"streams.{cfg['num_hidden_layers'] - 1}"]
                    m = e.mtp(last[:-1], ids_of[name][1:c])
                    w.put(
                        f"p{c}/{mode}/mtp_top1",
                        m.argmax(-1),
                        "argmax of the MTP logits; position t joins streams[t] with token t+1 [T - 1]",
                    )
                    w.put(
                        f"p{c}/{mode}/mtp_logits_tail",
                        m[-TAIL:],
                        f"MTP logits of the last {TAIL} positions",
                    )
        n, steps = greedy
        base = ids_of[manifest["prompts"][f"p{n}"]["sequence"]][:n]
        seq, rows = e.greedy(list(base), steps)
        w.put(
            f"greedy/{mode}/ids",
            np.array(seq[n:]),
            f"greedy continuation of p{n}, {steps} tokens by cached decode",
        )
        margin = np.sort(rows, axis=1)
        info = manifest["greedy"]
        info.update(prompt=f"p{n}", steps=steps)
        info[mode] = {
            "smallest_top1_margin": float((margin[:, -1] - margin[:, -2]).min()),
            "distinct_tokens": len(set(seq[n:])),
        }
        if mode == "exact":
            w.put(
                "greedy/exact/logits",
                rows,
                f"logits that chose each of the {steps} tokens [{steps}, vocab]",
            )
            whole, _ = e.prefill(np.array(seq[:-1]))
            info[mode]["cached_decode_versus_prefill_max_abs"] = float(
                np.abs(whole[n - 1 :] - rows).max()
            )
    size = fmt.write_safetensors(
        os.path.join(out, "reference.safetensors"), w.rows, {"format": "np"}
    )
    manifest["tensors"] = w.about
    manifest["bytes"] = size
    manifest["seconds"] = round(time.time() - t0, 1)
    with open(os.path.join(out, "manifest.json"), "w") as f:
        json.dump(manifest, f, indent=1)
        f.write("\n")
    return manifest


if __name__ == "__main__":
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("checkpoint")
    ap.add_argument("--out", required=True)
    ap.add_argument("--engine", choices=sorted(ENGINES), default="own")
    ap.add_argument(
        "--sequences",
        nargs="+",
        default=["129:1,5,32,127,128,129", "700:300,700"],
        help="LENGTH:PROMPT_LENGTH,... one or more",
    )
    ap.add_argument("--greedy", default="300:32", help="PROMPT_LENGTH:STEPS")
    ap.add_argument("--modes", default="exact,kvsim,fullsim,bf16")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--tries", type=int, default=24)
    ap.add_argument(
        "--details",
        default="exact:300,kvsim:129",
        help="MODE:PROMPT_LENGTH,... whose intermediates are stored",
    )
    ap.add_argument(
        "--full",
        default="kvsim:129,fullsim:129,bf16:129",
        help="MODE:LENGTH,... of rounded modes whose logits are stored for the whole sequence",
    )
    a = ap.parse_args()
    modes = [m for m in a.modes.split(",") if not (m == "bf16" and a.engine == "own")]
    seqs = [
        (int(n), [int(c) for c in cuts.split(",")])
        for n, cuts in (s.split(":") for s in a.sequences)
    ]
    r = dump(
        a.checkpoint,
        a.out,
        a.engine,
        seqs,
        tuple(int(x) for x in a.greedy.split(":")),
        modes,
        a.seed,
        a.tries,
        set(a.details.split(",")),
        set(a.full.split(",")),
    )
    print(
        json.dumps(
            {k: r[k] for k in ("prompts", "sequences", "greedy", "bytes", "seconds")}, indent=1
        )
    )
