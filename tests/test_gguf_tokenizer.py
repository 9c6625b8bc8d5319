"""The tokenizer in a GGUF file's metadata encodes as the official tokenizer.json it came from."""

import make_gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4mlx import DataError
from ds4mlx.convert import convert
from ds4mlx.convert.gguf_files import GGUFFiles
from ds4mlx.convert.gguf_tokenizer import build_tokenizer
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.text.tokenizer import Tokenizer

OFFICIAL = Tokenizer.from_dir(EMBEDDED)
SPECIAL = sorted(t.decode() for t in OFFICIAL._added.values())
PIECES = [
    "12",
    "3456789",
    "é",
    "漢字",
    "ひらがな",
    "カタカナ",
    "😀",
    " ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "'s",
]
PIECES += ["def f(x):", "don't", "  a", ".b", "#c", "٣٤٥", "\u0301", "한국어", *SPECIAL]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@pytest.fixture(scope="module", params=make_gguf.DIALECTS)
def converted(request, talker_source, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    make_gguf.Written(talker_source, request.param).main(path / "model.gguf")
    convert(path / "model.gguf", path / "dir", progress=False)
    return Tokenizer.from_dir(path / "dir")


@given(text=TEXTS)
def test_it_encodes_identically(converted, text):
    ids = OFFICIAL.encode(text)
    assert converted.encode(text) == ids
    assert converted.decode(ids) == OFFICIAL.decode(ids)


def test_special_tokens(converted):
    assert converted._added == OFFICIAL._added
    assert (converted.bos_token_id, converted.eos_token_id) == (0, 1)
    for token in SPECIAL:
        assert len(converted.encode(token)) == 1


def test_merges_that_do_not_fit(talker_source, tmp_path):
    written = make_gguf.Written(talker_source)
    written.tokenizer["model"]["merges"].append("no such")
    written.main(tmp_path / "model.gguf")
    with pytest.raises(DataError, match=r"model\.gguf: tokenizer\.ggml\.merges: "):
        build_tokenizer(GGUFFiles(tmp_path / "model.gguf"))
