"""What the recording mode notes of launches, and of MLX's own operations around them."""

import mlx.core as mx
import pytest

from ds4mlx.bench.synth import synth_model
from ds4mlx.config import ModelConfig
from ds4mlx.custom_kernels import dialect, dispatch, graph
from ds4mlx.custom_kernels.layer import index_scores, index_select
from ds4mlx.custom_kernels.layer.buffers import Grown, joined
from ds4mlx.custom_kernels.layer.row_layout import RowLayout
from ds4mlx.custom_kernels.products import experts_up
from ds4mlx.custom_kernels.products.columns import whole
from ds4mlx.custom_kernels.random_weights import random_planes
from ds4mlx.custom_kernels.recorder import Spec, zeros
from ds4mlx.custom_kernels.recording import recording

KERNEL = dialect.Kernel("twice", ["x", "rows"], ["y", "z"], "")


def launch(x, rows, reads=None):
    outputs = [((2, 3), mx.bfloat16), ((1 << 20, 1 << 20), mx.float32)]
    sizes = {"groups": (7, 1, 2), "threads": 64, "template": [("N", 3)]}
    return KERNEL([x, rows], outputs, reads=reads, **sizes)


@pytest.mark.parametrize("target", ["metal", "cuda"])
def test_a_launch_is_noted_and_costs_nothing(target):
    x, rows = mx.zeros((4,), mx.uint8), zeros(Spec((1 << 20, 1 << 20), mx.float32))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with recording(target) as launches:
        assert dialect.target() == target and dispatch.in_use()
        small, large = launch(x, rows, lambda: {"rows": 0.25})
        mx.eval(small, large)
    assert mx.get_peak_memory() < before + (1 << 20)
    assert (small.shape, small.dtype, large.dtype) == ((2, 3), mx.bfloat16, mx.float32)
    assert not mx.any(small).item()
    (noted,) = launches
    assert noted.name == "twice" and noted.threadgroups == (7, 1, 2) and noted.threads == 64
    assert [(each.shape, each.nbytes) for each in noted.inputs] == [
        ((4,), 4),
        ((1 << 20, 1 << 20), 1 << 42),
    ]
    assert noted.read == 4 + (1 << 40) and noted.written == noted.moved - noted.read
    assert noted.written == 12 + (1 << 42) and noted.largest == 1 << 42
    assert dialect.target() is None and not dispatch.in_use()


def test_shares_are_those_of_inputs():
    x = mx.zeros((4,))
    with recording(), pytest.raises(AssertionError):
        launch(x, x, lambda: {"columns": 0.5})


def test_compiled_functions_keep_no_recording():
    launched = []

    def called(x):
        launched.append(dispatch.in_use())
        return x + 1

    compiled = mx.compile(called)
    with recording():
        compiled(mx.zeros((2,)))
    mx.eval(compiled(mx.zeros((2,))), compiled(mx.zeros((2,))))
    assert launched == [True, False]


@pytest.mark.parametrize(("tokens", "share"), [(1, 2 / 8), (3, 6 / 8), (8, 1)])
def test_of_a_stack_only_what_is_chosen_is_read(tokens, share):
    gate, up = (random_planes("q4_k", (8, 64, 256), seed) for seed in (1, 2))
    x, experts = mx.zeros((tokens, 256)), mx.zeros((tokens, 2), mx.int32)
    with recording() as launches:
        experts_up.experts_up("q4_k", gate, up, x, experts, mx.zeros((tokens, 2)), 1.0)
    stacks = sum(plane.nbytes for side in (gate, up) for plane in side.values())
    rest = sum(each.nbytes for each in launches[0].inputs) - stacks
    assert launches[0].read == rest + share * stacks


def made(*shape, dtype=mx.float32):
    array = mx.zeros(shape, dtype)
    mx.eval(array)
    return array


W, X, I = made(8, 64, 32), made(2, 1, 32), mx.array([1, 2])
GRAPHS = {
    "sum": (lambda: X + W[:2], [("Add", X.nbytes + W.nbytes // 4, W.nbytes // 4)]),
    "views": (lambda: W[2:4].T.reshape(4, 16, 64)[:, None], []),
    "rows": (lambda: W[I], [("Gather", 2 * 64 * 32 * 4 + 8, 2 * 64 * 32 * 4)]),
    "scalar": (lambda: W * 3, [("Multiply", W.nbytes + 4, W.nbytes)]),
    "slice": (lambda: W[:2] * W[2:4], [("Multiply", W.nbytes // 2, W.nbytes // 4)]),
    "appended": (
        lambda: mx.concatenate([W, W[:1]]),
        [("Concatenate", W.nbytes * 9 // 8, W.nbytes * 9 // 8)],
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_operations_of_a_graph(name):
    make, want = GRAPHS[name]
    output = make()
    listed = graph.operations(output)
    assert [(each.name, each.read, each.written) for each in listed] == want
    assert graph.kinds(output) == {kind: 1 for kind, *_ in want}


def test_a_product_reads_the_matrices_that_are_chosen():
    planes = mx.quantize(W, group_size=32, bits=4)
    mx.eval(planes)
    options = {"transpose": True, "group_size": 32, "bits": 4}
    listed = graph.operations(mx.gather_qmm(X, *planes, rhs_indices=I, **options))
    (product,) = [each for each in listed if each.name == "GatherQMM"]
    rest = X.nbytes + product.inputs[-1].nbytes + product.inputs[-2].nbytes
    assert product.read == rest + sum(plane.nbytes for plane in planes) // 4


def test_what_mlx_does_not_tell_raises():
    with pytest.raises(ValueError, match="Contiguous"):
        graph.operations(mx.contiguous(W.T))


def test_operations_around_launches_are_listed():
    config = ModelConfig(
        hidden_size=256,
        num_hidden_layers=1,
        vocab_size=64,
        n_routed_experts=8,
        num_hash_layers=0,
        moe_intermediate_size=256,
        compress_ratios=[0, 0],
    )
    model = synth_model(config, "q2", mx.float32)
    with recording() as launches:
        logits = model(mx.array([[1, 2]]), cache=model.make_cache())
    names = [each.name for each in launches]
    assert {"router", "hyper_mixes", "hyper_post"} <= set(names)
    assert graph.kinds(logits)["Matmul"] > 0
    assert graph.kinds(logits)["CustomKernel"] == 0


def test_of_the_rows_only_the_visible_ones_are_read():
    """Of 16 settled rows in a buffer of 64, and of the scores of 25 visible ones."""
    form = RowLayout("index", 128, 17, mx.uint32)
    rows = Grown(made(64, 17, dtype=mx.uint32), joined([made(32, 17, dtype=mx.uint32)])[0])
    place = mx.array([[101, 0, 16, 0, 0, 0, 0, 0]], mx.int32)
    sides = {"heads": 4, "layout": form, "dtype": mx.bfloat16}
    with recording() as launches:
        products = whole(made(1, 512)), whole(made(1, 4))
        scores = index_scores.by_kernel(*products, [rows], place, made(1, 4, 2, 32), **sides)
        index_select.by_kernel(scores, place, 8, 4)
    scored, selected = launches
    rest = sum(spec.nbytes for spec in scored.inputs) - rows.full.nbytes
    assert scored.read == rest + 16 * 68
    assert selected.read == 25 * 4 + place.nbytes
