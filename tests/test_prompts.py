"""Sequences of tokens from files of prompts, and how what is malformed in one is named."""

import json

import pytest

from ds4mlx import DataError
from ds4mlx.chat import encode_messages
from ds4mlx.cli.main import run
from ds4mlx.text.prompts import PIECE, read_sequences, sequence_length

BOS = "<｜begin▁of▁sentence｜>"


@pytest.fixture
def read(talker, tmp_path):
    """Writes a file and reads it: lists of tokens."""

    def read(name, content, length=4096, most=None, release="april"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [s.tolist() for s in read_sequences(path, talker[1], release, length, most)]

    return read


def lines(*values):
    return "\n".join(json.dumps(value) for value in values)


def test_text_is_cut_and_nothing_is_lost(read, talker):
    text = "def add(a, b):\n    return a + b\n" * 20
    found = read("a.txt", text, 32)
    assert all(sequence[0] == 0 for sequence in found)
    assert {len(sequence) for sequence in found[:-1]} == {32} and len(found[-1]) <= 32
    assert [token for sequence in found for token in sequence[1:]] == talker[1].encode(text)
    assert read("b.txt", BOS + text, 32) == found


def test_long_texts_are_encoded_in_pieces(read, talker):
    """Which end with a line, so the tokens are the same."""
    text = "def add(a, b):\n    return a + b\n" * 70000
    found = read("a.txt", text, 4096)
    assert len(text) > 2 * PIECE
    assert [t for s in found for t in s[1:]] == talker[1].encode(text)


def test_most_tokens(read):
    whole = read("a.txt", "some words " * 100, 32)
    assert read("a.txt", "some words " * 100, 32, 70) == [*whole[:2], whole[2][:6]]
    assert read("a.txt", "some words " * 100, 32, 64) == whole[:2]


def test_lines(read, talker):
    """Cut at the end; other keys and blank lines are passed over; U+2028 ends no line."""
    encode = talker[1].encode
    found = read(
        "a.jsonl", lines({"prompt": "one\u2028two", "id": 3}, {"text": BOS + "x"}) + "\n\n"
    )
    assert found == [[0, *encode("one\u2028two")], [0, *encode("x")]]
    raw = '{"text": "one\u2028two"}\r\n'
    assert read("A.JSONL", raw) == found[:1]
    assert (
        read("a.jsonl", lines({"prompt": "words " * 50}), 8)[0] == [0, *encode("words " * 50)][:8]
    )


@pytest.mark.parametrize("release", ["april", "0731"])
def test_messages_have_the_chat_encoding(read, talker, release):
    messages = [{"role": "user", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for more in ({}, {"thinking": "max"}, {"tools": tools, "thinking": "high"}):
        (found,) = read("a.jsonl", lines({"messages": messages, **more}), release=release)
        assert found == talker[1].encode(encode_messages(messages, release=release, **more))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("[" * 100000, "not JSON: "),
        ("[1]", "not a JSON object"),
        ("{}", "expected one of prompt, text, messages, found none"),
        ('{"text": "a", "prompt": "b"}', "found prompt and text"),
        ('{"text": 3}', "text is not text"),
        ('{"prompt": ""}', "the prompt is empty"),
        (json.dumps({"prompt": BOS}), "the prompt is empty"),
        ('{"prompt": "\\ud800"}', "the text is not Unicode"),
        ('{"messages": {}}', "messages is not a list of messages"),
        ('{"messages": []}', "messages is not a list of messages"),
        ('{"messages": [3]}', "message 0"),
        ('{"messages": [{"role": "nobody"}]}', "message 0"),
        ('{"messages": [{"role": "user", "content": "a"}], "thinking": "much"}', "much"),
        ('{"messages": [{"role": "user", "content": "a"}], "thinking": [1]}', "thinking is not"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 3}', "tools"),
        (b'{"text": "\xff"}', "not UTF-8 text: invalid start byte"),
    ],
    ids=repr,
)
def test_malformed_lines_are_named(read, line, cause):
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(DataError) as error:
        read("a.jsonl", b'{"text": "fine"}\n\n' + raw + b"\n")
    place, _, rest = str(error.value).partition(": ")
    assert place.endswith("a.jsonl:3") and cause in rest


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_without_prompts(read, name):
    with pytest.raises(DataError, match="holds no prompts"):
        read(name, "")


def test_lengths(talker, tmp_path):
    config = talker[0].args
    assert sequence_length(tmp_path / "a.txt", None, config) == 512
    assert sequence_length(tmp_path / "a.jsonl", None, config) == 4096
    assert sequence_length(tmp_path / "a.jsonl", 65536, config) == 65536
    for length in (1, 65537):
        with pytest.raises(DataError, match=f"must have 2 to 65536 tokens, not {length}"):
            sequence_length(tmp_path / "a.txt", length, config)


def test_failures_are_one_line(talker_dir, tmp_path, capsys):
    """And come before the model is loaded."""
    prompts, output = tmp_path / "a.jsonl", tmp_path / "out"
    prompts.write_text("{}")
    for *more, cause in (
        ["-m", "/nowhere", "-o", output, "/nowhere"],
        ["-m", talker_dir, "-o", output, f"{prompts}:1: expected one of"],
        [
            "-m",
            talker_dir,
            "-o",
            tmp_path / "none" / "out",
            f"{tmp_path}/none: no such directory",
        ],
        ["-m", talker_dir, "-o", output, "--ctx", "65537", "must have 2 to 65536 tokens"],
    ):
        assert run([*map(str, ["imatrix", "--prompts", prompts, *more])]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and cause in line
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
