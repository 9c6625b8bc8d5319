"""The executor of Metal text itself: right kernels run right, wrong ones are named."""

import re
import sys

import mlx.core as mx
import numpy as np
import pytest
from metalsim import MetalError, check, metal_kernel, options_of, record
from metalsim.kernel import REAL
from metalsim.text import to_cpp

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="kernels run on Metal there")

# y = W x with W of 2-bit codes [N, K / 16], one scale and base per 32; x is staged in pieces.
SOURCE = """
    constexpr int ROWS = 4;
    threadgroup float xs[CHUNK];
    uint lane = thread_index_in_simdgroup;
    uint sg = simdgroup_index_in_threadgroup;
    uint row0 = (threadgroup_position_in_grid.x * 2 + sg) * ROWS;
    float acc[ROWS] = {0.0};
    for (uint k0 = 0; k0 < K; k0 += CHUNK) {
        for (uint i = thread_index_in_threadgroup; i < CHUNK; i += 64) {
            xs[i] = k0 + i < K ? float(x[k0 + i]) : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint j = lane; j < CHUNK / 16 && k0 + 16 * j < K; j += 32) {
            const threadgroup float4* v = (const threadgroup float4*)(xs + 16 * j);
            float total = dot(v[0] + v[1] + v[2] + v[3], float4(1.0f));
            for (int r = 0; r < ROWS; r++) {
                uint block = k0 / 16 + j;
                uint q = w[(row0 + r) * (K / 16) + block];
                float s = 0.0f;
                for (int i = 0; i < 4; i++) {
                    s += dot(v[i], float4(uint4(q, q >> 2, q >> 4, q >> 6) & 3u));
                    q >>= 8;
                }
                uint g = (row0 + r) * (K / 32) + block / 2;
                acc[r] += float(scale[g]) * s + float(base[g]) * total;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int r = 0; r < ROWS; r++) {
        float y = simd_sum(acc[r]);
        if (lane == 0) {
            out[row0 + r] = static_cast<T>(y);
        }
    }
"""
N, K = 64, 1056
RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 4, (N, K)).astype(np.uint32)
SCALE = RNG.uniform(0.01, 0.1, (N, K // 32)).astype(np.float16)
BASE = RNG.uniform(-0.2, 0.0, (N, K // 32)).astype(np.float16)
X = RNG.standard_normal(K).astype(np.float16)
PACKED = (CODES.reshape(N, K // 16, 16) << (2 * np.arange(16, dtype=np.uint32))).sum(-1)
W = CODES * np.repeat(SCALE.astype(np.float64), 32, 1) + np.repeat(BASE.astype(np.float64), 32, 1)
INPUTS = [mx.array(a) for a in (X, PACKED.astype(np.uint32), SCALE, BASE)]


def matvec(source: str, dtype: mx.Dtype = mx.float32, **options) -> np.ndarray:
    kernel = metal_kernel("matvec2", ["x", "w", "scale", "base"], ["out"], source)
    with options_of(**options):
        (y,) = kernel(
            inputs=INPUTS,
            template=[("T", dtype), ("K", K), ("CHUNK", 512)],
            grid=(N // 8 * 64, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(N,)],
            output_dtypes=[dtype],
        )
    return np.array(y.astype(mx.float32))


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_a_right_kernel(checked, order):
    want = W @ X.astype(np.float64)
    got = matvec(SOURCE, checked=checked, order=order)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def edit(old: str, new: str, last: bool = False) -> str:
    assert old in SOURCE
    at = SOURCE.rindex(old) if last else SOURCE.index(old)
    return SOURCE[:at] + new + SOURCE[at + len(old) :]


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SUM = "float y = simd_sum(acc[r]);"
WRONG = {
    "a race before reading": (edit(BARRIER, ""), "data race on threadgroup memory"),
    "a race after reading": (edit(BARRIER, "", last=True), "data race on threadgroup memory"),
    "a barrier too weak": (edit("mem_threadgroup)", "mem_none)"), "data race"),
    "past the end of x": (edit("k0 + i < K ? float(x[k0 + i]) : 0.0f", "float(x[k0 + i])"), "read"),
    "past the end of w": (edit("&& k0 + 16 * j < K", ""), "read"),
    "two lanes write": (edit("if (lane == 0) {", "if (lane < 2) { y += lane;"), "two threads"),
    "past a fixed array": (edit("xs[i] =", "xs[i + 16] ="), "index outside a fixed-size array"),
    "rows left out": (edit("row0 + r] =", "(row0 + r) / 2] ="), "never written"),
    "a barrier in a branch": (edit(BARRIER, f"if (sg == 0) {{ {BARRIER} }}"), "barrier"),
    "a lane that is gone": (
        edit(SUM, "if (lane > 20) return; float y = simd_shuffle_down(acc[r], 8);"),
        "inactive lane",
    ),
    "a shift of 32": (edit("q >>= 8", "q >>= 32 + lane"), "shift"),
    "a misaligned vector": (edit("(xs + 16 * j)", "(xs + 16 * j + 1)"), "misaligned"),
    "a loop without end": (edit("k0 += CHUNK", "k0 += 0"), "timed out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel(name):
    source, message = WRONG[name]
    with pytest.raises(MetalError, match=message):
        matvec(source, checked=True, timeout=1)


def test_unset_threadgroup_memory_is_nan():
    assert np.isnan(matvec(edit("i < CHUNK; i += 64", "i < CHUNK - 64; i += 64"))).any()


def test_half_rounds_after_every_operation():
    a, b, c = (RNG.standard_normal(256).astype(np.float16) for _ in range(3))
    kernel = metal_kernel(
        *("half", ["a", "b", "c"], ["out"]),
        "uint i = thread_position_in_grid.x; out[i] = a[i] * b[i] + c[i];",
    )
    (got,) = kernel(
        inputs=[mx.array(x) for x in (a, b, c)],
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(256,)],
        output_dtypes=[mx.float16],
    )
    assert np.array_equal(np.array(got), a * b + c)


REFUSED = {
    "threadgroup to device": (
        "threadgroup float b[32]; b[0] = x[0]; device float* p = b; out[0] = p[0];",
        "address space|cannot initialize",
    ),
    "a plain pointer": ("float v[2] = {1, 2}; float* p = v; out[0] = p[1];", "explicit address"),
    "a double": ("double d = x[0]; out[0] = d;", "'double' is not supported"),
    "max of float and int": ("out[0] = max(x[0], 0);", "ambiguous"),
    "a lambda": ("auto f = [](float a) { return a; }; out[0] = f(x[0]);", "lambda"),
}


def test_more_buffers_than_metal_takes():
    def launched(count: int) -> mx.array:
        names = [f"x{i}" for i in range(count)]
        kernel = metal_kernel("k", names, ["out"], "out[0] = x1[0] + x0_shape[0];")
        sizes = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
        outputs = {"output_shapes": [(1,)], "output_dtypes": [mx.float32]}
        return kernel(inputs=[mx.ones((16,))] * count, **sizes, **outputs)[0]

    assert launched(29).item() == 17  # with the shape and the output 31
    with pytest.raises(MetalError, match="32 buffers: the limit is 31"):
        launched(30)


def recorded(source: str, dtype: mx.Dtype = mx.float32):
    return record(
        REAL("k", ["x"], ["out"], source),
        [mx.zeros((64,), dtype)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[dtype],
    )


@pytest.mark.parametrize("name", REFUSED)
def test_refused_text(name):
    source, message = REFUSED[name]
    assert re.search(message, "\n".join(check(recorded(source))))


def test_refused_bfloat():
    said = check(recorded("float v = x[0]; out[0] = v;", mx.bfloat16))
    assert "implicit conversion to bfloat" in said[0]


def test_an_array_that_begins_no_statement():
    """Behind a macro, say: it would be taken for an array of each lane."""
    with pytest.raises(ValueError, match="must follow a semicolon"):
        to_cpp("DECLARE\n threadgroup float b[32]; b[0] = x[0];")


def test_accepted_text():
    source = (
        "const device float4* v = (const device float4*)x; float4 a = v[0]; out[0] = a.x * 0.5;"
    )
    assert check(recorded(source)) == []
