"""Each kernel alone, at Flash's shapes, beside two rivals on the same device in the same run.

A time is that of one call in a chain in which each waits for the one before; the experts change from
call to call, so that weights come from memory and not from a cache. Rivals of the experts' kernels:
decode what is chosen and multiply (what runs without kernels), and MLX's own `gather_qmm`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

import mlx.core as mx

from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dialect, dispatch, read_speed, self_check
from ds4mlx.custom_kernels.layer.hyper_pre import MIXES
from ds4mlx.custom_kernels.products import experts_down, experts_up
from ds4mlx.custom_kernels.products.dense import product
from ds4mlx.custom_kernels.products.swiglu import swiglu
from ds4mlx.custom_kernels.random_weights import random_planes, random_words
from ds4mlx.errors import DataError
from ds4mlx.formats import FORMATS
from ds4mlx.model.hyper import HyperConnection
from ds4mlx.model.linear import RMSNorm
from ds4mlx.model.moe import RoutedExperts, Router
from ds4mlx.precision import keep_float32

FLASH = ModelConfig()
PAIRS = (("iq2_xxs", "q2_k"), ("q4_k", "q4_k"), ("mxfp4", "mxfp4"))
DENSE = {
    "wq_b": (32768, 1024),
    "wo_b": (4096, 8192),
    "shared w1": (2048, 4096),
    "head": (129280, 4096),
}
CHAIN, REPEATS = 32, 3
MANY = (512, 4096)  # tokens of a prefill
LIMIT = FLASH.swiglu_limit
ROTATED = 4e8  # bytes of copies that take turns


@dataclass
class Row:
    """One measurement: seconds a call; bytes of weights or operations it stands for, if any."""

    kernel: str
    shape: str
    seconds: float
    nbytes: float = 0
    flops: float = 0

    def as_dict(self, read: float, matmul: float) -> dict:
        """For JSON: microseconds, and GB/s or TFLOP/s with their share of what the device can."""
        entry = {"kernel": self.kernel, "shape": self.shape, "us": round(self.seconds * 1e6, 2)}
        if self.nbytes:
            rate = self.nbytes / self.seconds
            entry |= {"gb_per_s": round(rate / 1e9, 1), "share_of_read": round(rate / read, 4)}
        if self.flops:
            rate = self.flops / self.seconds
            entry |= {"tflops": round(rate / 1e12, 2), "share_of_matmul": round(rate / matmul, 4)}
        return entry


def measure(call: Callable[[int, mx.array], mx.array], x: mx.array, chain: int = CHAIN) -> float:
    """Seconds of call(i, x), i = 0.. in a chain; the best of a few."""
    times = []
    for _ in range(1 + REPEATS):  # the first compiles
        out, begun = x, time.perf_counter()
        for i in range(chain):
            out = call(i, mx.depends([x], [out])[0])
        mx.eval(out)
        times.append((time.perf_counter() - begun) / chain)
    return min(times[1:])


def read_bandwidth() -> float:
    """Bytes a second of reading an array far larger than any cache."""
    words = random_words((1 << 28,), 1)
    mx.eval(words)
    return words.nbytes / measure(lambda i, x: read_speed.read_all(x), words, 8)


def readable_bandwidth() -> float | None:
    """The same, or None where there is no GPU, or its kernel is not good on this one."""
    target = dialect.target()
    if target is None or not self_check.good(target, ["read_speed"], mx.float32):
        return None
    rate = read_bandwidth()
    mx.clear_cache()
    return rate


def matmul_rate() -> float:
    """Operations a second of MLX's bfloat16 product of large square matrices."""
    n = 8192
    a, b = (mx.random.normal((n, n)).astype(mx.bfloat16) for _ in range(2))
    mx.eval(a, b)
    return 2 * n**3 / measure(lambda i, x: x @ b.T, a, 4)


def choices(tokens: int, experts: int, topk: int) -> mx.array:
    """Different experts of every token and call, int32 (calls, tokens, k)."""
    calls = CHAIN if tokens <= dispatch.FEW else 4
    order = mx.argsort(mx.random.uniform(shape=(calls, tokens, experts)), axis=-1)
    return mx.contiguous(order[..., :topk]).astype(mx.int32)


class Experts:
    """A layer of Flash's experts in a pair of formats, and choices of them that differ each call."""

    def __init__(self, formats: tuple[str, str], tokens: int, config: ModelConfig = FLASH):
        self.formats, self.tokens, self.config = formats, tokens, config
        self.module = RoutedExperts(config)
        for seed, name in enumerate(("w1", "w3", "w2")):
            stack, kind = self.module[name], formats[name == "w2"]
            stack.store(kind)
            for expert_plane, array in random_planes(kind, stack._shape, seed).items():
                stack[expert_plane] = array
            mx.eval(stack.parameters())
        k, count = config.num_experts_per_tok, config.n_routed_experts
        self.chosen = choices(tokens, count, k)
        self.weights = mx.random.uniform(0.1, 0.4, (tokens, k))
        self.x = mx.random.normal((tokens, config.hidden_size)).astype(mx.bfloat16)
        mx.eval(self.chosen, self.weights, self.x)

    def pieces(self, name: str) -> float:
        """Bytes of one expert's matrix."""
        _, rows, columns = self.module[name]._shape
        return FORMATS[self.module[name].format].bits / 8 * rows * columns

    @cached_property
    def hidden(self) -> mx.array:
        """Random values as the first launch gives to the second, bfloat16 (tokens * k, H)."""
        rows = self.chosen[0].size
        return mx.random.normal((rows, self.config.moe_intermediate_size)).astype(mx.bfloat16)

    def up(self, i: int, x: mx.array, eight: bool = False) -> mx.array:
        """The first launch of a few tokens: gate and up."""
        planes = self.module.w1.planes, self.module.w3.planes
        return experts_up.experts_up(
            self.formats[0], *planes, x, self.chosen[i], self.weights, LIMIT, eight
        )

    def down(self, i: int, hidden: mx.array, eight: bool = False) -> mx.array:
        """The second launch: down, summed over the experts."""
        planes = self.module.w2.planes
        return experts_down.experts_down(self.formats[1], planes, hidden, self.chosen[i], eight)

    def whole(self, i: int, x: mx.array) -> mx.array:
        """The experts of a layer as the model runs them."""
        return self.module(x, self.chosen[i], self.weights)


def experts_few() -> Iterator[Row]:
    """Decode: one token, six experts."""
    for formats in PAIRS:
        layer = Experts(formats, 1)
        k, (up, down) = FLASH.num_experts_per_tok, (layer.pieces("w1"), layer.pieces("w2"))
        seconds = measure(layer.up, layer.x)
        yield Row("experts up", f"{formats[0]}, 1 token", seconds, 2 * k * up)
        seconds = measure(layer.down, layer.hidden)
        yield Row("experts down", f"{formats[1]}, 1 token", seconds, k * down)
        name, total = f"{'/'.join(formats)}, 1 token", k * (2 * up + down)
        yield Row("experts, both launches", name, measure(layer.whole, layer.x), total)
        if formats[0] != "mxfp4":
            with dispatch.eight_bit_activations():
                seconds = measure(layer.whole, layer.x)
            yield Row("experts, 8-bit activations", name, seconds, total)
        with dispatch.plain_operations():
            seconds = measure(layer.whole, layer.x, 4)
        yield Row("rival: decode, multiply", name, seconds, total)
    for bits in (2, 4):
        yield rival(bits, 1)


def experts_many() -> Iterator[Row]:
    """Prefill: tokens sorted by expert."""
    per_token = 2 * 3 * FLASH.hidden_size * FLASH.moe_intermediate_size * FLASH.num_experts_per_tok
    for tokens in MANY:
        for formats in PAIRS:
            layer = Experts(formats, tokens)
            name = f"{'/'.join(formats)}, {tokens} tokens"
            seconds = measure(layer.whole, layer.x, 4)
            yield Row("experts, sorted", name, seconds, flops=per_token * tokens)
        yield rival(2, tokens)
        yield rival(4, tokens)


def rival(bits: int, tokens: int) -> Row:
    """The same products by MLX's gather_qmm on affine codes with one scale per 64 columns."""
    layer = Experts(("bf16", "bf16"), tokens, FLASH.model_copy(update={"n_routed_experts": 8}))
    count, k = FLASH.n_routed_experts, FLASH.num_experts_per_tok
    width, inner = FLASH.hidden_size, FLASH.moe_intermediate_size
    stacks = []
    for seed, (rows, columns) in enumerate(((inner, width), (inner, width), (width, inner))):
        codes = random_words((count, rows, columns * bits // 32), seed)
        scale = mx.full((count, rows, columns // 64), 0.5 / columns, mx.bfloat16)
        stacks.append((codes, scale, -scale))
    chosen = choices(tokens, count, k)
    mx.eval(stacks, chosen)
    options = {"transpose": True, "group_size": 64, "bits": bits}

    def call(i: int, x: mx.array) -> mx.array:
        flat = chosen[i].flatten()
        order = mx.argsort(flat) if tokens > dispatch.FEW else mx.arange(flat.size)
        ordered = {"rhs_indices": flat[order], "sorted_indices": tokens > dispatch.FEW, **options}
        rows = x[order // k][:, None]
        gate, up = (mx.gather_qmm(rows, *stacks[s], **ordered) for s in (0, 1))
        hidden = layer.weights.flatten()[order][:, None, None] * swiglu(gate, up, 10.0)
        out = mx.gather_qmm(hidden.astype(x.dtype), *stacks[2], **ordered)
        return out[mx.argsort(order)].reshape(tokens, k, -1).astype(mx.float32).sum(1)

    seconds = measure(call, layer.x, CHAIN if tokens == 1 else 2)
    nbytes = 3 * k * width * inner * (bits + 0.5) / 8
    flops = 2 * 3 * k * width * inner * tokens
    name = f"{bits} bits, {tokens} token{'s' * (tokens > 1)}"
    return Row("rival: gather_qmm", name, seconds, *((nbytes, 0) if tokens == 1 else (0, flops)))


def dense() -> Iterator[Row]:
    """Q8_0 matrices, one token and many; copies take turns, so that none stays in a cache."""
    q8_0 = FORMATS["q8_0"]
    for name, shape in DENSE.items():
        size = q8_0.bits / 8 * shape[0] * shape[1]
        copies = [random_planes("q8_0", shape, i) for i in range(1 + int(ROTATED // size))]
        mx.eval(copies)
        call = lambda i, x, c=copies: product("q8_0", c[i % len(c)], x)
        title = f"{name} {shape[0]}x{shape[1]}"
        for tokens in (1, MANY[-1]) if name != "head" else (1,):
            x = mx.random.normal((tokens, shape[1])).astype(mx.bfloat16)
            mx.eval(x)
            if tokens == 1:
                yield Row("q8_0 matvec", title, measure(call, x), size)
                with dispatch.plain_operations():
                    yield Row("rival: decode, multiply", title, measure(call, x, 4), size)
            else:
                flops = 2 * tokens * shape[0] * shape[1]
                yield Row("q8_0 matmul", title, measure(call, x, 4), flops=flops)


def small() -> Iterator[Row]:
    """The router and the hyper-connection, one token; with kernels and without."""
    router, site = Router(FLASH, FLASH.num_hash_layers), HyperConnection(FLASH)
    router.weight = mx.random.normal(router.weight.shape).astype(mx.bfloat16) * 0.02
    site.fn = mx.random.normal((MIXES, site.fn.shape[1])) * 0.01
    streams = mx.random.normal((1, 4, FLASH.hidden_size)).astype(mx.bfloat16)
    x, ids = streams[:, 0], mx.zeros((1,), mx.int32)
    norm = RMSNorm(FLASH.hidden_size, FLASH.rms_norm_eps)
    mx.eval(router.parameters(), site.parameters(), streams)
    _, post, comb = site.before(streams, norm)
    mx.eval(post, comb)
    calls = {
        "router": (lambda i, v: router(v, ids)[1], x),
        "hyper-connection, before": (lambda i, v: site.before(v, norm)[0], streams),
        "hyper-connection, after": (lambda i, v: site.merge(v, x, post, comb), streams),
    }
    for name, (call, start) in calls.items():
        yield Row(name, "1 token", measure(call, start))
        with dispatch.plain_operations():
            yield Row(f"rival: plain, {name}", "1 token", measure(call, start, 4))


def bench(note: Callable[[str], None]) -> dict:
    """Measure everything; `note` is told what is being measured. Raises DataError without a GPU."""
    if dialect.target() is None:
        raise DataError("kernels run on a GPU, and MLX has none here")
    keep_float32()
    read, matmul = read_bandwidth(), matmul_rate()
    rows: list[dict] = []
    with dispatch.kernels():  # on Metal too
        for part in (experts_few, dense, small, experts_many):
            for row in part():
                rows.append(row.as_dict(read, matmul))
                note(f"{row.kernel}, {row.shape}: {row.seconds * 1e6:.1f} us")
                mx.clear_cache()
    return {
        "device": str(mx.device_info()["device_name"]),
        "mlx": version("mlx"),
        "read_gb_per_s": round(read / 1e9, 1),
        "matmul_tflops": round(matmul / 1e12, 1),
        "chain": CHAIN,
        "rows": rows,
    }


def table(report: dict) -> str:
    """What `bench` reports, for people."""
    head = f"{report['device']}: reads {report['read_gb_per_s']} GB/s, multiplies bfloat16 at "
    lines = [f"{head}{report['matmul_tflops']} TFLOP/s", ""]
    lines.append(f"{'kernel':<32} {'shape':<32} {'us':>9} {'GB/s':>8} {'TFLOP/s':>8} {'share':>7}")
    for row in report["rows"]:
        share = row.get("share_of_read", row.get("share_of_matmul"))
        rate, flops = row.get("gb_per_s", ""), row.get("tflops", "")
        shown = "" if share is None else f"{share:.1%}"
        line = f"{row['kernel']:<32} {row['shape']:<32} {row['us']:>9.1f} {rate:>8} {flops:>8}"
        lines.append(f"{line} {shown:>7}")
    return "\n".join(lines)
