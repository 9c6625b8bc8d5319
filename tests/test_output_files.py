"""Files that commands write: whole and in place when done, else as they were; refused first."""

import os
import threading

import pytest

from ds4mlx.cli.main import run
from ds4mlx.durable import check_writable, put_in_place

GENERATE = ["generate", "-p", "a", "--raw", "--max-tokens", "2", "--logprobs"]
WRITERS = [
    GENERATE,
    ["bench", "--prompt", "8", "--gen", "1", "--csv"],
    ["synth", "--in-memory", "--bench", "--layers", "1", "--csv"],
    ["eval", "--save-logits"],
]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_is_put_in_place_at_the_end(tmp_path, before):
    file = tmp_path / "file"
    if before is not None:
        file.write_text(before)
        file.chmod(0o640)
    with put_in_place(file) as aside:
        aside.write_text("new")
        assert (file.read_text() if before else file.exists()) == (before or False)
    assert file.read_text() == "new" and names(tmp_path) == ["file"]
    assert before is None or file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failure_leaves_what_was_there(tmp_path, before, end):
    file = tmp_path / "file"
    if before is not None:
        file.write_text(before)
    with pytest.raises(end), put_in_place(file) as aside:
        aside.write_text("half")
        raise end
    assert names(tmp_path) == ([] if before is None else ["file"])
    assert before is None or file.read_text() == before


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with put_in_place(tmp_path / "link") as aside:
        aside.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_pipes_and_devices_are_written_themselves(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    seen = []
    reader = threading.Thread(target=lambda: seen.append((tmp_path / "pipe").read_text()))
    reader.start()
    with put_in_place(tmp_path / "pipe") as aside, aside.open("w") as file:
        file.write("text")
    reader.join()
    assert seen == ["text"] and (tmp_path / "pipe").is_fifo()
    with put_in_place(tmp_path.__class__("/dev/null")) as aside:
        assert str(aside) == "/dev/null"


@pytest.mark.parametrize("name", ["none/file", ".", "file/file", "x" * 300])
def test_what_cannot_be_written_is_said_at_once(tmp_path, name):
    (tmp_path / "file").write_text("old")
    for way in (check_writable, lambda path: put_in_place(path).__enter__()):
        with pytest.raises(OSError) as raised:
            way(tmp_path / name)
        assert raised.value.filename == str(tmp_path / name)
    check_writable(tmp_path / "file")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0])
@pytest.mark.parametrize("name", ["none/file", "."])
def test_commands_refuse_it_before_they_load_a_model(tmp_path, command, name, capsys):
    model = [] if command[0] == "synth" else ["-m", "/nowhere"]
    assert run([*command, str(tmp_path / name), *model]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {tmp_path / name}: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0])
def test_a_command_that_fails_leaves_the_file(tmp_path, command, capsys):
    file = tmp_path / "file"
    file.write_text("old")
    wrong = ["--prompt", "9999999"] if command[0] == "synth" else ["-m", "/nowhere"]
    assert run([*command, str(file), *wrong]) == 1
    assert file.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("command", "read", "written"),
    [
        (["generate", "-p", "a"], "--json-schema", "--logprobs"),
        (["generate"], "--prompt-file", "--logprobs"),
        (["eval"], "--text", "--save-logits"),
        (["eval"], "--reference", "--save-logits"),
        (["sensitivity"], "--prompts", "-o"),
        (["imatrix", "--overwrite"], "--prompts", "-o"),
        (["imatrix", "--overwrite", "-o", "other"], "--prompts", "--moments"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_a_command_reads_is_not_written_over(tmp_path, capsys, command, read, written):
    """By whatever name; it is said before a model is looked for."""
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("{}")
    link.symlink_to(file)
    assert run([*command, read, str(file), written, str(link), "-m", "/nowhere"]) == 2
    assert f"{link} is read, and would be replaced" in " ".join(capsys.readouterr().err.split())
    assert file.read_text() == "{}" and names(tmp_path) == ["file", "link"]


def test_a_prompt_that_is_refused_leaves_the_logprobs(tmp_path, talker_dir):
    file = tmp_path / "file"
    file.write_text("old")
    limits = ["--max-tokens", "65536", "-m", str(talker_dir)]
    assert run([*GENERATE, str(file), *limits]) == 1
    assert file.read_text() == "old" and names(tmp_path) == ["file"]
