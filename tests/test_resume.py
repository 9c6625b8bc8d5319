"""Conversions that are interrupted: by kill, Ctrl-C, a full disk; and two at once."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import dying
import numpy as np
import official
import pytest

from ds4mlx import DataError, load
from ds4mlx.cli.main import run
from ds4mlx.convert import convert, verify
from ds4mlx.convert.journal import Journal
from ds4mlx.weights.directory import JOURNAL, MANIFEST


def die(source, target, last: int, number: int = signal.SIGKILL) -> subprocess.CompletedProcess:
    """Convert in a process that a signal ends at its `last`-th change to the disk."""
    arguments = [dying.__file__, source, target, last, int(number)]
    return launch([sys.executable, *map(str, arguments)])


def launch(command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=False, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def changes(small_source, tmp_path_factory):
    """How many changes to the disk a whole conversion makes."""
    return int(die(small_source, tmp_path_factory.mktemp("whole"), 0).stdout)


@pytest.fixture(scope="module")
def digests(small_dir):
    """What an uninterrupted conversion writes."""
    return official.digests(small_dir)


QUICK = (0, 4, 9, 14, 15, 17, 19)


@pytest.mark.parametrize(
    "point", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in range(20)]
)
def test_killed_anywhere_then_resumed(small_source, tmp_path, changes, digests, point):
    """15 points at random, one in each fifteenth of the work, and the last five changes."""
    step = changes // 15
    last = point * step + int(np.random.default_rng(point).integers(1, step))
    last = changes - (19 - point) if point >= 15 else last
    assert die(small_source, tmp_path, last).returncode == -signal.SIGKILL
    if not (tmp_path / MANIFEST).exists():
        with pytest.raises(DataError, match=r"not finished|not a converted model"):
            load(tmp_path)
    convert(small_source, tmp_path, progress=False)
    assert official.digests(tmp_path) == digests


def test_killed_again_and_again(small_source, tmp_path, changes, digests):
    """Every run gets a little further, whatever the ones before left."""
    rng, runs = np.random.default_rng(9), 1
    while die(small_source, tmp_path, rng.integers(changes // 8, changes // 3)).returncode:
        runs += 1
    assert 3 < runs < 20
    assert official.digests(tmp_path) == digests


def test_what_is_there_is_not_written_again(small_source, tmp_path, changes):
    die(small_source, tmp_path, changes * 3 // 4)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    convert(small_source, tmp_path, progress=False)
    assert before and before == {p: p.stat().st_mtime_ns for p in before}


def test_what_was_damaged_in_between_is_written_again(small_source, tmp_path, changes, digests):
    die(small_source, tmp_path, changes // 2)
    (partial,) = tmp_path.glob("*.partial")
    raw = bytearray(partial.read_bytes())
    raw[len(raw) // 3] ^= 4
    partial.write_bytes(raw)
    convert(small_source, tmp_path, progress=False)
    assert official.digests(tmp_path) == digests


def test_a_finished_file_that_vanished_is_written_again(small_source, tmp_path, changes, digests):
    die(small_source, tmp_path, changes // 2)
    (tmp_path / "embed.safetensors").unlink()
    convert(small_source, tmp_path, progress=False)
    assert official.digests(tmp_path) == digests


def test_ctrl_c_leaves_it_resumable(small_source, tmp_path, changes, digests):
    done = die(small_source, tmp_path, changes // 2, signal.SIGINT)
    assert "KeyboardInterrupt" in done.stderr  # raised, not killed: locks and files are closed
    convert(small_source, tmp_path, progress=False)
    assert official.digests(tmp_path) == digests


@pytest.mark.parametrize("room", [0, 64 << 10])
def test_a_file_too_large_for_the_disk(small_source, tmp_path, digests, room):
    """A real refusal by the operating system: one line, exit code 1, and the rest goes on later."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    command = [sys.executable, "-m", "ds4mlx", "convert", str(small_source), str(tmp_path)]
    done = launch(command, preexec_fn=limit)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last and str(tmp_path) in last
    assert "Traceback" not in done.stderr
    convert(small_source, tmp_path, progress=False)
    assert official.digests(tmp_path) == digests


def test_two_conversions_do_not_share_a_directory(small_source, tmp_path, capsys):
    plan = convert(small_source, tmp_path, dry_run=True)
    journal = Journal(tmp_path, plan.fingerprint())
    for extra in ([], ["--overwrite"]):
        assert run(["convert", str(small_source), str(tmp_path), *extra]) == 1
        assert "another conversion is writing here" in capsys.readouterr().err
    journal.close()
    assert run(["convert", str(small_source), str(tmp_path)]) == 0


def test_an_unfinished_conversion_of_something_else(small_source, tmp_path, changes, capsys):
    die(small_source, tmp_path, changes // 2)
    arguments = ["convert", str(small_source), str(tmp_path), "--recipe", "f32"]
    assert run(arguments) == 1
    assert "unfinished conversion of another source, or by other options" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0
    assert verify(tmp_path, small_source, progress=False)


@pytest.mark.parametrize("line", ["{", "[1]", '{"file": 3'])
def test_a_damaged_journal(small_source, tmp_path, changes, capsys, line):
    die(small_source, tmp_path, changes // 2)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(line + "\n")
    assert run(["convert", str(small_source), str(tmp_path)]) == 1
    assert "convert-journal.jsonl: damaged; use --overwrite" in capsys.readouterr().err
    assert run(["convert", str(small_source), str(tmp_path), "--overwrite"]) == 0


def test_the_journal_is_gone_in_the_end(small_dir):
    assert not list(small_dir.glob("*.partial"))
    assert not (small_dir / JOURNAL).exists()
    names = {p.name for p in Path(small_dir).iterdir()} - {MANIFEST}
    assert names == set(json.loads((small_dir / MANIFEST).read_text())["files"])
