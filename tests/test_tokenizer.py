"""Text to token ids and back, whole and as a stream; files that are no tokenizer."""

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Encoder

from ds4mlx import DataError
from ds4mlx.chat.tokens import ASSISTANT, BOS, CONTROL, DSML, EOS, THINK_END, USER
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.text.tokenizer import NoTokenizer, Tokenizer

TOKENIZER = Tokenizer.from_dir(EMBEDDED)
# Ids one past the vocabulary too: a model's head may be wider than its tokenizer.
TOKENS = st.lists(st.integers(0, TOKENIZER.vocab_size), max_size=60)
SAMPLES = [
    "🦊👩‍👩‍👧 e\u0301",
    "深度求索 한국어",
    "\0\x01\t\r\n\x7f\x85\u2028",
    "  a   b\n\n\n",
    "１２３4567",
]


@pytest.fixture
def copy(tmp_path):
    """The embedded model's small files, to spoil."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(EMBEDDED / name, tmp_path)
    return tmp_path


def edit(path, function):
    """Change a JSON file in place."""
    values = json.loads(path.read_text(encoding="utf-8"))
    function(values)
    path.write_text(json.dumps(values), encoding="utf-8")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_text_survives(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text", SAMPLES)
def test_samples_survive_whole_and_streamed(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    pieces = streamed(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def streamed(ids):
    stream = TOKENIZER.stream()
    return [*map(stream.add, ids), stream.finish()]


@given(TOKENS)
def test_a_stream_is_the_decoded_text(ids):
    assert "".join(streamed(ids)) == TOKENIZER.decode(ids)


@given(TOKENS)
@example([185, 110])  # the bytes ED A1
def test_a_stream_gives_out_whole_characters_as_early_as_possible(ids):
    """After every token: the longest text that no further byte can change.

    Python's decoder waits for the third byte of a surrogate, too.
    """
    stream, shown, raw = TOKENIZER.stream(), "", b""
    for token in ids:
        shown += stream.add(token)
        raw += TOKENIZER.token_bytes(token)
        unfinished = next((n for n in (1, 2, 3) if is_cut_character(raw[-n:])), 0)
        assert shown == raw[: len(raw) - unfinished].decode("utf-8", errors="replace")


def is_cut_character(tail):
    """Whether the bytes are the beginning of a character, and more could complete it."""
    try:
        tail.decode("utf-8")
    except UnicodeDecodeError as error:
        surrogate = re.fullmatch(rb"\xed[\xa0-\xbf]", tail)
        return bool(surrogate) or (error.start == 0 and error.reason == "unexpected end of data")
    return False


@given(st.text(max_size=30))
def test_characters_come_with_their_last_byte(text):
    """One byte a token, as in unusual text: a character is shown neither late nor in parts."""
    raw = text.encode("utf-8", errors="ignore")
    tokens = [TOKENIZER.encoder.token_to_id(spelling) for spelling in spell(raw)]
    pieces = streamed(tokens)
    assert "".join(pieces) == raw.decode() and pieces[-1] == ""
    assert all(len(piece) <= 1 and piece != "\ufffd" for piece in pieces if "\ufffd" not in text)


def spell(raw):
    """The vocabulary's one-byte tokens for these bytes."""
    spellings = {TOKENIZER.token_bytes(t): t for t in range(TOKENIZER.vocab_size)}
    return [TOKENIZER.encoder.id_to_token(spellings[bytes([byte])]) for byte in raw]


def test_an_invalid_byte_shows_once_it_is_known_to_be_invalid():
    a, first, second = (TOKENIZER.encoder.token_to_id(s) for s in ("a", *spell(b"\xe6\xb7")))
    stream = TOKENIZER.stream()
    assert [stream.add(t) for t in (first, second, a)] == ["", "", "\ufffda"]
    assert [stream.add(first), stream.finish()] == ["", "\ufffd"]


@pytest.mark.parametrize("token", [*CONTROL, DSML])
def test_special_tokens_are_one_id_anywhere_in_a_text(token):
    (special,) = TOKENIZER.encode(token)
    ids = TOKENIZER.encode(f"ab{token}{token} c")
    assert ids.count(special) == 2
    assert TOKENIZER.decode(ids) == f"ab{token}{token} c"
    assert TOKENIZER.token_bytes(special) == token.encode()


def test_nothing_is_added():
    assert TOKENIZER.encode("") == []
    text = f"{BOS}{USER}hi{ASSISTANT}{THINK_END}"
    ids = TOKENIZER.encode(text)
    assert ids[0] == TOKENIZER.bos_token_id and ids.count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.eos_token_id not in ids
    assert TOKENIZER.encode(EOS) == [TOKENIZER.eos_token_id]


def test_ids_without_a_token_are_no_text():
    assert TOKENIZER.token_bytes(TOKENIZER.vocab_size) == b""
    assert TOKENIZER.decode([TOKENIZER.vocab_size] * 3) == ""


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(DataError, match="the text is not Unicode"):
        TOKENIZER.encode("a\ud800")


def test_an_added_token_is_spelled_as_it_is(copy):
    """`é` is also byte-level BPE's letter for a byte."""
    encoder = Encoder.from_file(str(copy / "tokenizer.json"))
    encoder.add_special_tokens([AddedToken("<é>", special=True)])
    encoder.save(str(copy / "tokenizer.json"))
    edit(copy / "config.json", lambda config: config.update(vocab_size=3100))
    tokenizer = Tokenizer.from_dir(copy)
    (token,) = tokenizer.encode("<é>")
    assert tokenizer.decode([token]) == "<é>" and tokenizer.decode(tokenizer.encode("é")) == "é"


def test_a_files_truncation_and_padding_do_not_apply(copy):
    encoder = Encoder.from_file(str(copy / "tokenizer.json"))
    encoder.enable_truncation(4)
    encoder.enable_padding(length=9)
    encoder.save(str(copy / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(copy)
    for text in ("a", "a long text of many tokens"):
        assert tokenizer.encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"null"]
)
def test_a_file_that_is_no_tokenizer_is_named(copy, content):
    (copy / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_dir(copy)


def test_a_missing_file_is_named(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_dir(copy).encode("a")
    assert Tokenizer.from_dir(copy).decode([1, 2]) == ""
    (copy / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json: no such file"):
        Tokenizer.from_dir(copy)


@pytest.mark.parametrize("decoder", [None, {"type": "Fuse"}])
def test_only_byte_level_tokenizers_are_read(copy, decoder):
    edit(copy / "tokenizer.json", lambda values: values.update(decoder=decoder))
    with pytest.raises(DataError, match=r"tokenizer\.json: only byte-level BPE"):
        Tokenizer.from_dir(copy)


def test_tokens_outside_the_vocabulary(copy):
    edit(copy / "config.json", lambda config: config.update(vocab_size=TOKENIZER.vocab_size - 1))
    with pytest.raises(DataError, match=r"tokenizer\.json: token id 3071 is outside .* of 3071"):
        Tokenizer.from_dir(copy)


@pytest.mark.parametrize("token", [-1, -(2**70), 2**32, 2**70, 1.5, "a", None])
def test_what_is_no_token_id_is_refused(token):
    for tokenizer in (TOKENIZER, NoTokenizer("none", 0, 1)):
        with pytest.raises(DataError, match="is not a token id"):
            tokenizer.decode([5, token])
        with pytest.raises(DataError, match="is not a token id"):
            tokenizer.token_bytes(token)


def test_ids_of_any_integer_type_are_decoded():
    ids = TOKENIZER.encode("some text")
    for some in (np.array(ids), np.array(ids, np.uint16), tuple(ids), []):
        assert TOKENIZER.decode(some) == ("some text" if len(some) else "")


def test_a_bos_is_added_if_asked_for():
    assert TOKENIZER.encode("a", add_special_tokens=True) == [0, *TOKENIZER.encode("a")]
    assert TOKENIZER.encode(BOS + "a", add_special_tokens=True) == [0, *TOKENIZER.encode("a")]


@pytest.mark.parametrize("text", [*SAMPLES, "a  b\n\n\tc 1234567 it's <x> ", ""])
@pytest.mark.parametrize("token", [*CONTROL, DSML])
def test_special_tokens_in_segments_count_in_markup_only(text, token):
    (special,) = TOKENIZER.encode(token)
    plain = TOKENIZER.encode_segments([(text, False), (token, True), (text, False)])
    assert plain == TOKENIZER.encode(text + token + text)
    quoted = TOKENIZER.encode_segments([(text, True), (text + token, False), (text, True)])
    assert special not in quoted and TOKENIZER.decode(quoted) == text + text + token + text
    halves = TOKENIZER.encode_segments([(token[:2], False), (token[2:], False)])
    assert special not in halves


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())))
def test_segments_without_special_tokens_are_one_text(segments):
    whole = "".join(text for text, _ in segments)
    special = TOKENIZER.encoder.get_added_tokens_decoder().values()
    assume(not any(token.content in whole for token in special))
    assert TOKENIZER.encode_segments(segments) == TOKENIZER.encode(whole)


def test_special_tokens_are_known_by_their_shape_too(copy):
    """Files of this family do not call all of them special."""

    def plainer(values):
        for token in values["added_tokens"]:
            token["special"] = False

    edit(copy / "tokenizer.json", plainer)
    tokenizer = Tokenizer.from_dir(copy)
    for token in (*CONTROL, DSML):
        (special,) = tokenizer.encode(token)
        assert special not in tokenizer.encode_segments([(f"a{token}", False)])
        assert tokenizer.encode_segments([(token, True)]) == [special]
