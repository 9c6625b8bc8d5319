"""Checkpoints and models that many tests read; made once a session."""

import shutil
import signal

import kill_store
import make_checkpoint
import mlx.core as mx
import pytest
import reference
from hypothesis import settings

from ds4mlx import Model, ModelConfig, load
from ds4mlx.convert import convert
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.evaluation.weights import decode_weights

# Started in the background of a script the tests would have Ctrl-C ignored, and so would all commands
# that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The first example may compile kernels; --hypothesis-profile=search tries other examples every time.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("repeatable")

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


def converted(source):
    """An official checkpoint converted beside it with the lossless recipe."""
    convert(source, source.parent / "converted", progress=False)
    return source.parent / "converted"


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory):
    """The tiny checkpoint in the official layout, byte for byte the one of the references."""
    path = tmp_path_factory.mktemp("tiny") / "official"
    make_checkpoint.make(str(path), 7, "tiny")
    return path


@pytest.fixture(scope="session")
def tiny_dir(tiny_source):
    """The tiny checkpoint converted with the lossless recipe."""
    return converted(tiny_source)


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
def small_source(tmp_path_factory):
    """An official checkpoint of three small layers, one of each kind, and an MTP block."""
    path = tmp_path_factory.mktemp("small") / "official"
    make_checkpoint.make(str(path), 3, "tiny", SMALL)
    return path


@pytest.fixture(scope="session")
def small_dir(small_source):
    """The small checkpoint converted with the lossless recipe."""
    return converted(small_source)


@pytest.fixture(scope="session")
def small_model(small_dir):
    """The small model in float32 with the official rounding."""
    return load(small_dir, dtype=mx.float32)[0]


@pytest.fixture(scope="session")
def embedded_dir(tmp_path_factory):
    """The embedded checkpoint, which has a real tokenizer, converted."""
    path = tmp_path_factory.mktemp("embedded") / "converted"
    convert(EMBEDDED, path, progress=False)
    return path


@pytest.fixture(scope="session")
def talker_source(tmp_path_factory):
    """A random official checkpoint with a real tokenizer: its text is noise without an end."""
    source = tmp_path_factory.mktemp("talker") / "official"
    make_checkpoint.make(str(source), 1, "tiny", TALKER)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, source)
    return source


@pytest.fixture(scope="session")
def talker_dir(talker_source):
    """The random checkpoint converted with the lossless recipe."""
    return converted(talker_source)


@pytest.fixture(scope="session")
def talker(talker_dir):
    """The random model and its tokenizer as the command line loads them without a GPU."""
    return load(talker_dir, dtype=mx.float32)


@pytest.fixture(scope="session")
def bare_model():
    """A small model of every kind of attention without weights, for synthetic states."""
    model = Model(kill_store.CONFIG)
    model.identity = "bare"
    return model


@pytest.fixture(scope="session")
def stored():
    """The reference arrays of the tiny checkpoint."""
    return reference.arrays()
