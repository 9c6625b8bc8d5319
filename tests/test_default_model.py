"""The model that commands use when none is named: where it is, and that it is made only once."""

import io
import os
import shutil
import signal
import sys

import official
import processes
import pytest

from ds4mlx import DataError
from ds4mlx.cli.main import run
from ds4mlx.convert import verify
from ds4mlx.engine.default_model import (
    ABOUT,
    EMBEDDED,
    cache_directory,
    default_model,
    fingerprint,
)
from ds4mlx.weights.directory import JOURNAL, MANIFEST

GENERATE = ["generate", "--raw", "-p", "ab", "--max-tokens", "3", "--temp", "0"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache directory that is not there yet."""
    monkeypatch.delenv("DS4MLX_MODEL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def times(path):
    return {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.suffix != ".lock"}


def test_it_is_converted_once(cache):
    path = default_model()
    assert path.parent == cache / "ds4mlx"
    assert verify(path, EMBEDDED, progress=False)
    before = times(cache)
    assert default_model() == path
    assert times(cache) == before


def test_it_is_announced(cache, embedded_dir, monkeypatch, capsys):
    """By every command that runs it, unless it was named; never on stdout."""
    (cache / "ds4mlx").mkdir(parents=True)
    default_path = cache / "ds4mlx" / f"embedded-{fingerprint()}"
    default_path.symlink_to(embedded_dir)
    for arguments in (GENERATE, ["bench", "--prompt", "8", "--gen", "1"], ["chat"]):
        monkeypatch.setattr("sys.stdin", io.StringIO())
        assert run(arguments) == 0
        out, err = capsys.readouterr()
        assert err.splitlines()[0] == f"note: {ABOUT}" and ABOUT not in out
        assert run([*arguments, "-m", str(default_path)]) == 0
        assert ABOUT not in capsys.readouterr().err


def test_a_named_model_wins(cache, small_dir, monkeypatch, capsys):
    monkeypatch.setenv("DS4MLX_MODEL", str(small_dir))
    assert default_model() == small_dir
    assert run(GENERATE) == 0
    of_named = capsys.readouterr().out
    monkeypatch.setenv("DS4MLX_MODEL", "/nowhere")
    assert run([*GENERATE, "-m", str(small_dir)]) == 0
    assert capsys.readouterr().out == of_named
    assert run(GENERATE) == 1
    assert capsys.readouterr().err == "error: /nowhere: no such directory\n"
    assert not cache.exists()


@pytest.mark.parametrize("named", [None, ""])
def test_the_cache_is_the_users_own(tmp_path, monkeypatch, named):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if named is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", named)
    usual = "Library/Caches" if sys.platform == "darwin" else ".cache"
    assert cache_directory() == tmp_path / usual / "ds4mlx"


def test_processes_at_the_same_time(cache):
    started = [processes.start(*GENERATE, XDG_CACHE_HOME=cache) for _ in range(2)]
    ended = [(*p.communicate(timeout=processes.PATIENCE), p.returncode) for p in started]
    assert [code for _, _, code in ended] == [0, 0]
    assert ended[0][0] == ended[1][0] != b""
    assert not any(b"error" in err for _, err, _ in ended)
    assert verify(default_model(), EMBEDDED, progress=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_conversion_goes_on(cache, embedded_dir, number):
    done = processes.run_dying(100, number, *GENERATE, XDG_CACHE_HOME=cache)
    assert done.returncode == (130 if number == signal.SIGINT else -number)
    assert done.stdout == done.stderr == b""
    assert list(cache.rglob(JOURNAL)) and not list(cache.rglob(MANIFEST))
    assert official.digests(default_model()) == official.digests(embedded_dir)


def test_damage_is_named_with_the_remedy(cache, capsys):
    path = default_model()
    (path / "head.safetensors").write_bytes(b"")
    assert run(GENERATE) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}/head.safetensors: has 0 bytes, expected ")
    assert line.endswith(f"; delete {path} to have the small model made again")
    shutil.rmtree(path)
    assert run(GENERATE) == 0


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_cache_that_cannot_be_made(tmp_path, command):
    """A file is in the way, which stops even the superuser."""
    (tmp_path / "cache").write_text("")
    arguments = GENERATE if command == "generate" else ["chat"]
    done = processes.run(*arguments, XDG_CACHE_HOME=tmp_path / "cache")
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert line.startswith(f"error: {tmp_path}/cache/ds4mlx: Not a directory, so the small model")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_cache_that_may_not_be_written(cache):
    cache.mkdir(mode=0o500)
    with pytest.raises(DataError, match="Permission denied, so the small model cannot be put"):
        default_model()
