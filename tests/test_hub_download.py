"""Conversion from the hub, over HTTP: what is downloaded when, and what is on the disk meanwhile."""

import os
import signal
import subprocess
import sys
import time

import dying
import hub_server
import numpy as np
import official
import pytest
from huggingface_hub import constants

from ds4mlx import DataError
from ds4mlx.cli.main import run
from ds4mlx.convert import convert, inspect, verify
from ds4mlx.convert.official import OfficialSource
from ds4mlx.convert.schedule import Schedule

NAME = "someone/small"


@pytest.fixture
def hub(small_source, tmp_path, monkeypatch):
    """A hub that has the small checkpoint, and an empty cache."""
    with hub_server.serving(NAME, small_source) as server:
        ask(monkeypatch, server.url, tmp_path / "cache")
        yield server


def ask(monkeypatch, url, cache):
    """Have the library ask another hub."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def weights(directory):
    return {p.name for p in directory.glob("*.safetensors")}


def test_the_same_bytes_as_from_a_local_directory(hub, small_source, small_dir, tmp_path):
    target, most = tmp_path / "out", []
    hub.on_file = lambda file: most.append(len(weights(target / ".download")))
    convert(NAME, target, progress=False)
    assert official.digests(target) == official.digests(small_dir)
    assert {p.name for p in target.iterdir()} == {p.name for p in small_dir.iterdir()}
    for name in weights(small_source):  # each once, after its header
        file = small_source / name
        assert hub.sent[name] == file.stat().st_size + hub_server.header_size(file)
    assert max(most) == 0  # no other weight file was there when one was sent
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def small_disk(monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)


def occupied(target):
    target.mkdir()
    (target / "thesis.tex").write_text("all of it")


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
@pytest.mark.parametrize(
    "ask",
    [
        lambda target, _: inspect(NAME, tensors=True),
        lambda target, _: convert(NAME, target, dry_run=True),
        lambda target, _: convert(NAME, target, "no such recipe"),
        lambda target, _: convert(NAME, target, "q2"),  # rows are too short for it
        lambda target, _: convert(NAME, target, "q2-auto", budget=1 << 30),
        lambda target, _: (occupied(target), convert(NAME, target)),
        lambda target, patch: (small_disk(patch), convert(NAME, target)),
        lambda target, patch: (small_disk(patch), convert(NAME, target, keep_download=True)),
    ],
    ids=["inspect", "dry run", "recipe", "width", "choice", "occupied", "full", "full, kept"],
)
def test_no_weights_are_downloaded_to_look_or_to_refuse(hub, tmp_path, monkeypatch, ask, request):
    if request.node.callspec.id in ("inspect", "dry run"):
        ask(tmp_path / "out", monkeypatch)
    else:
        with pytest.raises(DataError) as refused:
            ask(tmp_path / "out", monkeypatch)
        assert ("download them first" in str(refused.value)) == (
            request.node.callspec.id == "choice"
        )
    assert hub.downloaded() == set()
    assert not (tmp_path / "out" / ".download").exists()


def test_the_peak_of_the_disk_is_said_beforehand(hub, small_source, tmp_path, capsys):
    assert run(["convert", NAME, str(tmp_path / "out"), "--dry-run"]) == 0
    sizes = {name: (small_source / name).stat().st_size for name in weights(small_source)}
    plan = convert(NAME, tmp_path / "out", dry_run=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"{sum(sizes.values()):,} bytes to download, each file deleted once it is converted; "
        f"disk at the peak: {plan.schedule(plan.files, set()).peak:,} bytes"
    )
    assert plan.nbytes + min(sizes.values()) <= plan.schedule(plan.files, set()).peak
    assert plan.schedule(plan.files, set()).peak <= plan.nbytes + max(sizes.values())
    assert run(["convert", NAME, str(tmp_path), "--dry-run", "--keep-download"]) == 0
    said = f"kept; disk at the peak: {plan.nbytes + sum(sizes.values()):,} bytes"
    assert said in capsys.readouterr().out


def test_kept_downloads_are_used_again(hub, small_source, small_dir, tmp_path):
    convert(NAME, tmp_path / "a", keep_download=True, progress=False)
    assert weights(next((tmp_path / "cache").glob("*/snapshots/*"))) == weights(small_source)
    hub.sent.clear()
    convert(NAME, tmp_path / "b", progress=False)  # nor are they deleted now
    verify(tmp_path / "b", NAME, progress=False)
    assert not weights_sent(hub)
    assert official.digests(tmp_path / "b") == official.digests(small_dir)
    assert weights(next((tmp_path / "cache").glob("*/snapshots/*"))) == weights(small_source)


def weights_sent(hub):
    return {name for name in hub.sent if name.endswith(".safetensors")}


def test_killed_then_resumed(hub, small_dir, tmp_path):
    """Killed while the fourth file is on its way: what is converted is not downloaded again."""
    target, sent = tmp_path / "out", []
    command = [sys.executable, dying.__file__, NAME, str(target), "0", "9"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def on_file(file):
        sent.append(file)
        if len(weights_of(sent)) == 4:
            process.kill()

    hub.on_file = on_file
    assert process.wait(60) == -signal.SIGKILL
    (target / ".download" / ".cache" / "x.incomplete").write_bytes(b"half of a file")
    first, hub.on_file = weights_of(sent), lambda file: None
    assert len(first) == 4
    hub.sent.clear()
    convert(NAME, target, progress=False)
    assert official.digests(target) == official.digests(small_dir)
    assert not (target / ".download").exists()
    assert hub.downloaded() & set(first[:3]) <= {first[2]}


def weights_of(sent):
    return [name for name in sent if name.endswith(".safetensors")]


def test_the_hub_fails_in_the_middle_then_it_goes_on(hub, small_source, small_dir, tmp_path):
    hub.directory = official.copy(small_source, tmp_path / "copy")
    lost = hub.directory / "model-00004-of-00006.safetensors"
    hub.on_file = lambda file: file.startswith("model-00003") and lost.unlink()
    with pytest.raises(DataError, match=f"{NAME}: .* no {lost.name}; nothing is lost, the same"):
        convert(NAME, tmp_path / "out", progress=False)
    hub.directory = small_source
    before = hub.downloaded()
    hub.sent.clear()
    convert(NAME, tmp_path / "out", progress=False)
    assert official.digests(tmp_path / "out") == official.digests(small_dir)
    assert len(before) == 3 and not before & hub.downloaded()


@pytest.mark.parametrize("left", [0, 9, 2000])
def test_a_download_that_lost_its_bytes_is_repeated(hub, small_source, tmp_path, left):
    """A file whose name outlived a crash of the system, and whose bytes did not."""
    for _ in range(2):
        source = OfficialSource(NAME)
        source.downloads.use(tmp_path)
        entry = source.inventory["embed.safetensors"][0]
        values = source.values(entry, 0, 0, 8)
        assert np.array_equal(values, OfficialSource(small_source).values(entry, 0, 0, 8))
        os.truncate(source.file(entry.official()).path, left)


def test_another_commit_is_another_source(hub, small_source, tmp_path, monkeypatch):
    """The same headers, but perhaps other values: rows of both must not be mixed."""
    target = tmp_path / "out"
    command = [sys.executable, dying.__file__, NAME, str(target), "60", "9"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode
    hub.commit = "d" * 40
    with pytest.raises(DataError, match="unfinished conversion of another source"):
        convert(NAME, target, progress=False)
    convert(NAME, target, overwrite=True, progress=False)


@pytest.mark.parametrize(
    ("name", "cause"),
    [(NAME, "Connection refused"), ("nobody/here", "there is no such repository")],
)
@pytest.mark.parametrize("command", ["convert", "inspect", "generate"])
def test_what_cannot_be_had_is_said_at_once(
    hub, tmp_path, monkeypatch, capsys, command, name, cause
):
    if name == NAME:
        ask(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    arguments = {
        "convert": ["convert", name, str(tmp_path / "out")],
        "inspect": ["inspect", name],
        "generate": ["generate", "-m", name, "-p", "x"],
    }
    began = time.monotonic()
    assert run(arguments[command]) == 1
    assert time.monotonic() - began < 4
    line = capsys.readouterr().err
    assert line.startswith(f"error: {name}: no such directory, and not found on the hub: ")
    assert cause in line and line.count("\n") == 1


def test_a_server_that_sends_no_parts_of_files(hub, small_source, tmp_path):
    hub.ranges = False
    plan = convert(NAME, tmp_path / "out", dry_run=True)
    assert plan.fingerprint() == convert(small_source, tmp_path / "out", dry_run=True).fingerprint()


def test_a_file_that_the_repository_lacks(hub, small_source, tmp_path):
    hub.directory = official.copy(small_source, tmp_path / "copy")
    (lost, *_) = sorted(weights(hub.directory))
    (hub.directory / lost).unlink()
    with pytest.raises(DataError, match=f"{NAME}: the hub repository holds no {lost}"):
        inspect(NAME)
    (hub.directory / "config.json").unlink()
    with pytest.raises(DataError, match=f"{NAME}: the hub repository holds no config.json"):
        convert(NAME, tmp_path / "out")


class File:
    """A weight file of a schedule."""

    def __init__(self, name, nbytes):
        self.name, self.nbytes = name, nbytes


@pytest.mark.parametrize(
    ("needs", "keep", "order", "peak"),
    [
        ({"a": "1", "b": "2", "c": "3"}, False, "abc", 3 * 10 + 4),
        ({"a": "1", "b": "2", "c": "3"}, True, "abc", 3 * 10 + 9),
        ({"a": "1", "b": "2", "c": "1"}, False, "acb", 3 * 10 + 3),  # 1 is not fetched twice
        ({"a": "123", "b": "", "c": "1"}, False, "bac", 3 * 10 + 2),
        ({"a": "1", "b": "3", "c": "12", "d": "2"}, False, "acdb", 4 * 10 + 4),  # along the files
        ({"a": "", "b": "", "c": ""}, False, "abc", 3 * 10),
    ],
)
def test_schedules(needs, keep, order, peak):
    sizes = {"1": 2, "2": 3, "3": 4}
    files = [File(name, 10) for name in needs]
    made = Schedule(files, {n: set(those) for n, those in needs.items()}, sizes, set(), keep)
    assert "".join(step.file.name for step in made.steps) == order
    assert made.peak == peak
    assert not keep or not any(step.done_with for step in made.steps)
