"""Checkpoints and models that many tests read; checkpoints are made once, for all workers of a run."""

import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Before NumPy and MLX are loaded: plain values are multiplied in a fifth of the time where there is
# OpenBLAS, one thread for every worker. DS4MLX_OPENBLAS=0 takes MLX's own BLAS, as the nightly run does.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("DS4MLX_OPENBLAS", "1")

import ahead
import make_checkpoint
import mlx.core as mx
import pytest
import reference
from hypothesis import settings

from ds4mlx import Model, ModelConfig, load
from ds4mlx.bench.synthetic_state import SMALL as SMALL_STATE
from ds4mlx.convert import convert
from ds4mlx.custom_kernels import dialect, self_check
from ds4mlx.engine.decoding import Decoding
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.engine.sequence import Sequence
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.text.tokenizer import Tokenizer

# Started in the background of a script the tests would have Ctrl-C ignored, and so would all commands
# that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where bytecode is not written beside the sources, every process that the tests start would compile all
# that it imports.
if sys.dont_write_bytecode:
    sys.pycache_prefix = str(Path(tempfile.gettempdir()) / "ds4mlx-bytecode")
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The first example may compile kernels; --hypothesis-profile=search tries other examples every time.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


# The smallest model with all three kinds of attention: for tests that take many steps.
SMALL = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0],
    "num_attention_heads": 2,
    "o_groups": 1,
    "n_routed_experts": 4,
    "index_n_heads": 4,
    "index_topk": 8,
    "vocab_size": 288,
}
TALKER = {
    **SMALL,
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4, 0],
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_topk": 32,
    "sliding_window": 32,
    "vocab_size": ModelConfig.from_file(EMBEDDED / "config.json").vocab_size,
    "max_position_embeddings": 65536,
}


@pytest.fixture(autouse=True)
def no_self_check(monkeypatch):
    """No test but those of the self-check waits for kernels to be compared, or writes of it."""
    monkeypatch.setattr(self_check, "good", lambda target, kernels, dtype: target == "cuda")
    monkeypatch.setattr(self_check, "check", lambda *asked, **options: None)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """`shared(name, make)`: the path on which `make(path)` was called by the first worker to ask."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def once(name, make):
        path = base / "shared" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if not lock.read():
                make(path)
                lock.write("made")
        return path

    return once


def checkpoint(seed, changes=None):
    """A maker of a random official checkpoint with the shapes of the tiny one, or changed ones."""

    def make(path):
        make_checkpoint.make(str(path), seed, "tiny", changes)

    return make


def conversion(source, recipe="official"):
    """A maker of a checkpoint's conversion with a recipe that keeps every value."""

    def make(path):
        convert(source, path, recipe, progress=False)

    return make


def quick(model):
    """The model; on a CPU with plain values for weights, which read a prompt in half the time."""
    if mx.default_device() == mx.cpu:
        decode_weights(model)
    return model


@pytest.fixture(scope="session")
def tiny_source(shared):
    """The tiny checkpoint in the official layout, byte for byte the one of the references."""
    return shared("tiny/official", checkpoint(7))


@pytest.fixture(scope="session")
def tiny_dir(shared, tiny_source):
    """The tiny checkpoint converted with the lossless recipe."""
    return shared("tiny/converted", conversion(tiny_source))


@pytest.fixture(scope="session")
def exact_model(tiny_dir):
    """float32 without rounding."""
    return load(tiny_dir, dtype=mx.float32, rounding="none")[0]


@pytest.fixture(scope="session")
def decoded_model(tiny_dir):
    """The exact model's weights as plain values: the same, at a third of the time on a CPU."""
    model = load(tiny_dir, dtype=mx.float32, rounding="none")[0]
    decode_weights(model)
    return model


@pytest.fixture(scope="session")
def official_model(tiny_dir):
    """float32 with the official rounding."""
    return load(tiny_dir, dtype=mx.float32)[0]


@pytest.fixture(scope="session")
def small_source(shared):
    """An official checkpoint of three small layers, one of each kind, and an MTP block."""
    return shared("small/official", checkpoint(3, SMALL))


@pytest.fixture(scope="session")
def small_dir(shared, small_source):
    """The small checkpoint converted with the lossless recipe."""
    return shared("small/converted", conversion(small_source))


@pytest.fixture(scope="session")
def small_model(small_dir):
    """The small model in float32 with the official rounding, plain values on a CPU."""
    return quick(load(small_dir, dtype=mx.float32)[0])


@pytest.fixture(scope="session")
def exact_small(small_dir):
    """The small model without rounding, of which no sum in another order makes another row."""
    return quick(load(small_dir, dtype=mx.float32, rounding="none")[0])


@pytest.fixture(scope="session")
def stored_model(small_dir):
    """The small model with its weights as they are stored, which kernels multiply by."""
    return load(small_dir, dtype=mx.float32)[0]


@pytest.fixture(scope="session")
def embedded_dir(shared):
    """The embedded checkpoint, which has a real tokenizer, converted."""
    return shared("embedded/converted", conversion(EMBEDDED))


@pytest.fixture(scope="session")
def embedded_plain(shared):
    """The same with plain values in its files, which a CPU multiplies by in a third of the time."""
    return shared("embedded/plain", conversion(EMBEDDED, "bf16"))


@pytest.fixture(scope="session")
def talker_source(shared):
    """A random official checkpoint with a real tokenizer: its text is noise without an end."""

    def make(path):
        checkpoint(1, TALKER)(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EMBEDDED / name, path)

    return shared("talker/official", make)


@pytest.fixture(scope="session")
def talker_dir(shared, talker_source):
    """The random checkpoint converted with the lossless recipe."""
    return shared("talker/converted", conversion(talker_source))


@pytest.fixture(scope="session")
def talker(talker_dir):
    """The random model, plain values on a CPU, and its tokenizer."""
    model, tokenizer = load(talker_dir, dtype=mx.float32)
    return quick(model), tokenizer


@pytest.fixture(scope="session")
def bare_model():
    """A small model of every kind of attention without weights, for synthetic states."""
    model = Model(SMALL_STATE)
    model.identity = "bare"
    return model


@pytest.fixture(scope="session")
def stored():
    """The reference arrays of the tiny checkpoint."""
    return reference.arrays()


@pytest.fixture(scope="session")
def small_tokenizer(small_dir):
    """The tokenizer of the smallest model."""
    return Tokenizer.from_dir(small_dir)


@pytest.fixture
def begin(small_model, small_tokenizer):
    """A sequence that continues some of `ahead.IDS`, with boundaries close together."""

    def made(length=40, sampler=ahead.SEEDED, max_tokens=30, **options):
        state = small_model.make_cache()
        state.boundaries.spacing = ahead.NEAR
        options |= {"sampler": sampler, "max_tokens": max_tokens}
        return Sequence(ahead.IDS[:length], state, small_tokenizer, **options)

    return made


@pytest.fixture
def decoding(small_model):
    """Sequences of the smallest model that go on together; none yet."""
    return Decoding(small_model)


@pytest.fixture(scope="session")
def embedded(embedded_dir):
    """The embedded model, which writes short functions, plain values on a CPU, and its tokenizer."""
    model, tokenizer = load(embedded_dir, dtype=mx.float32)
    return quick(model), tokenizer


@pytest.fixture(scope="session")
def served(embedded):
    """A server of the embedded model, for all tests that ask one."""
    import serving  # needs what only the server needs

    with serving.serving(*embedded) as server:
        yield server


@pytest.fixture(scope="session")
def endless(talker):
    """A server whose answers are noise without an end, two at a time and one waiting."""
    import serving

    with serving.serving(*talker, max_batch=2, max_queue=1) as server:
        yield server


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched, by name."""
    names, make = Counter(), dialect.Kernel.make

    def noted(self, where):
        names[self.name] += 1
        return make(self, where)

    monkeypatch.setattr(dialect.Kernel, "make", noted)
    return names
