"""What cannot be is refused with figures, before anything is allocated or written."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_synth import SMALL

from ds4mlx import DataError
from ds4mlx.bench.synth import RECIPES, check_memory, config_like, synth_model, weight_bytes
from ds4mlx.bench.synth_directory import write_synth
from ds4mlx.bench.whole_model import WARM, check_room
from ds4mlx.cli.main import run

HUGE = config_like("pro").model_copy(update={"n_routed_experts": 1 << 20})


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_of_a_model_are_known_beforehand(recipe):
    model = synth_model(SMALL, recipe, mx.float32)
    made = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert weight_bytes(SMALL, recipe) == made


def test_a_model_larger_than_the_memory_is_not_begun(capsys):
    before = mx.get_active_memory()
    for bench in ([], ["--bench"]):
        assert run(["synth", "--like", "pro", "--recipe", "official", "--in-memory", *bench]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: a model of 61 layers as official needs ")
        assert err.count(" GB") == 3 and err.count("\n") == 1
    assert mx.get_active_memory() <= before  # of earlier tests some may go meanwhile
    check_memory(SMALL, "q2")


def test_a_directory_larger_than_memory_or_disk_is_not_begun(tmp_path):
    with pytest.raises(DataError, match=r"GB of (memory|disk)"):
        write_synth(HUGE, "official", tmp_path / "model")
    assert not list(tmp_path.iterdir())


LIMIT = SMALL.max_position_embeddings


@pytest.mark.parametrize(
    ("depth", "gen", "ctx", "fits"),
    [
        (1, 1, None, True),
        (LIMIT - WARM - 32, 32, None, True),
        (LIMIT - WARM - 31, 32, None, False),
        (10**15, 1, None, False),
        (1, 10**15, None, False),
        (100, 32, 100 + WARM + 32, True),
        (100, 32, 99 + WARM + 32, False),
        (LIMIT, 1, 10 * LIMIT, False),
    ],
)
def test_the_context_bounds_what_is_measured(depth, gen, ctx, fits):
    if fits:
        check_room(SMALL, depth, gen, ctx, weights=0)
        return
    with pytest.raises(DataError, match=f"exceed the context of {min(ctx or LIMIT, LIMIT)} tokens"):
        check_room(SMALL, depth, gen, ctx, weights=0)


def test_weights_and_state_must_fit_the_memory():
    with pytest.raises(DataError, match=r"with a context of 136 tokens needs 1000000\.\d\d GB"):
        check_room(SMALL, 100, 33, None, weights=10**15)


def test_bench_checks_before_it_loads(talker_dir, capsys, monkeypatch):
    """The weights' files need not even be sound."""
    assert run(["bench", "-m", str(talker_dir), "--prompt", "8,70000"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "depth of 70000 tokens" in err and "context of 65536" in err
    monkeypatch.chdir(talker_dir.parent)
    assert run(["bench", "-m", talker_dir.name, "--prompt", "8", "--ctx", "16"]) == 1
    assert "exceed the context of 16 tokens" in capsys.readouterr().err
