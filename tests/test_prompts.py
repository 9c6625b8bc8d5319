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


def test_a_completion_follows_its_prompt(read, talker):
    (found,) = read("a.jsonl", lines({"prompt": "What is ", "completion": "this?", "id": 1}))
    assert found == [0, *talker[1].encode("What is this?")]


CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="true">1</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
RECORD = {"id": "agent-1", "category": "agent", "source": "s:1"}
MESSAGES = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "c", "reasoning": "r", "dsml": CALLS},
    {"role": "tool", "content": "R"},
]


def test_lines_of_ds4_keep_their_calls_and_their_mode(read, talker):
    official = [dict(message) for message in MESSAGES]
    official[1]["content"] += official[1].pop("dsml")
    for mode, thinking in (("think", "high"), ("nothink", "none")):
        (found,) = read("a.jsonl", lines({**RECORD, "mode": mode, "messages": MESSAGES}))
        assert found == talker[1].encode(encode_messages(official, thinking))
        assert talker[1].encode("｜DSML｜")[0] in found
    (found,) = read(
        "a.jsonl", lines({**RECORD, "messages": MESSAGES, "rendered": f"{BOS}as it is"})
    )
    assert found == [0, *talker[1].encode("as it is")]


def test_rendered_prompts_of_ds4_are_a_sequence_each(read, talker, tmp_path):
    prompts = [encode_messages([{"role": "user", "content": text}]) for text in ("a", "b\n\n", "c")]
    marker = "\n\n===== DS4_IMATRIX_PROMPT agent-{} agent think s:1 =====\n"
    text = "".join(marker.format(n) + prompt for n, prompt in enumerate(prompts))
    assert read("a.txt", text) == [talker[1].encode(prompt) for prompt in prompts]
    assert read("a.txt", text, 3) == [talker[1].encode(prompt)[:3] for prompt in prompts]
    assert sequence_length(tmp_path / "a.txt", None, talker[0].args) == 4096
    about = read("b.txt", "About markers:" + text)
    assert len(about) == 1


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
        ('{"text": "a", "completion": "b"}', "the key 'completion' beside text is not one"),
        ('{"prompt": "a", "completion": 3}', "completion is not text"),
        ('{"prompt": "a", "prompts": "b"}', "the key 'prompts' beside prompt is not one"),
        ('{"prompt": "a", "thinking": "high"}', "the key 'thinking' beside prompt is not one"),
        ('{"prompt": "a", "rendered": "b"}', "the key 'rendered' beside prompt is not one"),
        ('{"rendered": 3, "messages": []}', "rendered is not text"),
        ('{"text": "a", "text": "b"}', "the key 'text' is given twice"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "'content' is given"),
        (
            '{"messages": [{"role": "user", "content": "a", "dsml": "b"}]}',
            "message 0: dsml belongs",
        ),
        ('{"messages": [{"role": "assistant", "dsml": ["b"]}]}', "message 0: dsml and content"),
        (
            '{"messages": [{"role": "user", "content": "a", "text": "b"}]}',
            "message 0: the key 'text'",
        ),
        ('{"messages": [{"role": "user", "content": "a"}], "mode": "deep"}', "mode must be think"),
        ('{"messages": [{"role": "user", "content": "a"}], "mode": []}', "mode must be think"),
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
        ["-m", talker_dir, "-o", tmp_path, "--overwrite", f"{tmp_path}: is a directory"],
    ):
        assert run([*map(str, ["imatrix", "--prompts", prompts, *more])]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and cause in line
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
