"""What importing ds4mlx does: nothing to the environment; and which arithmetic MLX then computes in."""

import ctypes
import json
import os
import subprocess
import sys
import warnings

import mlx.core as mx
import numpy as np
import pytest
from reference import arrays

import ds4mlx
from ds4mlx import Model, ModelConfig, precision

GPU = mx.default_device() == mx.gpu
VARIABLES = ("MLX_ENABLE_TF32", "DS4MLX_OPENBLAS")


def python(program: str, *arguments: str, **variables: str) -> str:
    """What a plain Python prints that runs a program; without the variables that are asked about."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, env={**environment, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_environment_stays_and_mlx_is_not_loaded():
    program = """
import os, sys
before = dict(os.environ)
import ds4mlx, ds4mlx.cli.main
assert dict(os.environ) == before
print("mlx.core" in sys.modules, "numpy" in sys.modules)
"""
    assert python(program).split() == ["False", "False"]


def test_every_name_is_there():
    program = """
import ds4mlx
assert set(ds4mlx.__all__) <= set(dir(ds4mlx))
print(*(getattr(ds4mlx, name).__name__ for name in ds4mlx.__all__))
print(ds4mlx.convert.convert.__name__, ds4mlx.chat.encode_messages.__name__)
print(ds4mlx.custom_kernels.__name__)
"""
    wanted = [*ds4mlx.__all__, "convert", "encode_messages", "ds4mlx.custom_kernels"]
    assert python(program).split() == wanted
    assert set(ds4mlx.__all__) >= {"load", "generate", "stream_generate", "Model", "ModelConfig"}
    with pytest.raises(AttributeError, match="'ds4mlx' has no attribute 'lod'"):
        _ = ds4mlx.lod


def openblas() -> bool:
    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not (sys.platform == "linux" and openblas()), reason="needs OpenBLAS")
@pytest.mark.parametrize(
    "command, setting, loaded",
    [
        ("eval", None, True),
        ("eval", "0", False),
        ("generate", None, False),
        ("generate", "1", True),
    ],
)
def test_which_commands_take_openblas(command, setting, loaded, tmp_path):
    """A model that is not there ends the command, after the BLAS is chosen."""
    program = """
import sys
from ds4mlx.cli.main import run
assert run(sys.argv[1:]) == 1 and "mlx.core" in sys.modules
maps = open("/proc/self/maps").read()
from ds4mlx import blas
assert blas.is_fast() == ("libopenblas" in maps)
print("libopenblas" in maps)
"""
    options = ["-m", str(tmp_path / "none")] + (["-p", "a"] if command == "generate" else [])
    variables = {} if setting is None else {"DS4MLX_OPENBLAS": setting}
    assert python(program, command, *options, **variables).strip() == str(loaded)


def test_openblas_comes_before_mlx_or_not_at_all():
    program = """
import mlx.core
from ds4mlx import blas
blas.use_openblas(unasked=True)
print("libopenblas.so" in open("/proc/self/maps").read())
"""
    if sys.platform == "linux":
        assert python(program, DS4MLX_OPENBLAS="1").strip() == "False"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("setting, left", [(None, "0"), ("0", "0"), ("1", "1")])
def test_a_model_turns_tf32_off_or_says_that_it_is_too_late(monkeypatch, setting, left, late):
    monkeypatch.delenv(precision.VARIABLE, raising=False)
    if setting is not None:
        monkeypatch.setenv(precision.VARIABLE, setting)
    monkeypatch.setattr(precision, "gpu_rounds", lambda: late)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        Model(small())
    assert os.environ[precision.VARIABLE] == left
    said = [str(each.message) for each in met if precision.VARIABLE in str(each.message)]
    assert len(said) == (late and left == "0")


def small() -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=2,
        compress_ratios=[0, 4],
        num_nextn_predict_layers=0,
        n_routed_experts=8,
        vocab_size=64,
    )


@pytest.mark.skipif(not GPU, reason="only GPUs have TF32")
def test_a_model_in_plain_python_meets_the_float32_bound(tiny_dir, tmp_path):
    program = """
import json, sys, warnings
warnings.simplefilter("error")
from ds4mlx import load
import mlx.core as mx, numpy as np
model, _ = load(sys.argv[1], dtype=mx.float32, rounding="none")
ids = mx.array(json.loads(sys.argv[2]))[None]
np.save(sys.argv[3], np.array(model(ids)[0]))
"""
    stored = arrays()
    ids, want = stored["s129/ids"].tolist(), stored["s129/exact/logits"]
    saved = tmp_path / "logits.npy"
    python(program, str(tiny_dir), json.dumps(ids), str(saved))
    assert np.abs(np.load(saved) - want).max() <= 1e-3
