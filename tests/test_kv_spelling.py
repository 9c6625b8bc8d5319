"""With a store a prompt has the ids that it has without one, except for what was sampled otherwise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4mlx import KVStore, Model
from ds4mlx.bench.synthetic_state import synthetic_state
from ds4mlx.engine.default_model import EMBEDDED
from ds4mlx.store import spelling
from ds4mlx.text.tokenizer import Tokenizer

WORDS = st.sampled_from(
    ["history", " histor", "conversations", " unbelievably", "12345", "  ", "\n\n", " \n", "é", "🦊",
     ", ", ".", "don't", "<｜User｜>", "<｜Assistant｜>", "</think>", "x", "word", "文字化け", "\t", "=="]
)  # fmt: skip
TEXTS = st.lists(WORDS | st.text(max_size=6), min_size=1, max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_dir(EMBEDDED)


def text_of(tokenizer, ids):
    return b"".join(map(tokenizer.token_bytes, ids))


@settings(max_examples=300)
@given(text=TEXTS, rest=TEXTS, place=st.floats(0, 1))
def test_a_prefix_that_was_cut_anywhere_changes_no_ids(tokenizer, text, rest, place):
    whole = tokenizer.encode(text)
    stored = whole[: max(1, int(place * len(whole)))]
    try:
        prompt = text_of(tokenizer, stored).decode() + rest
    except UnicodeDecodeError:  # cut inside a character: no text begins so
        return
    ids = tokenizer.encode(prompt)
    assert spelling.joined(tokenizer, stored, ids) in (None, ids)


@settings(max_examples=50)
@given(text=TEXTS, rest=TEXTS)
def test_what_was_sampled_is_taken_up_to_a_special_token(tokenizer, text, rest):
    """Here a token for every byte that has one."""
    single = {tokenizer.token_bytes(token): token for token in range(600)}
    user = tokenizer.encode("<｜User｜>")
    plain = text.replace("｜", "").replace("think", "")
    sampled = [single.get(bytes([byte])) for byte in plain.encode()]
    if None in sampled:
        return
    ids = tokenizer.encode(plain + "<｜User｜>" + rest)
    got = spelling.joined(tokenizer, [*sampled, *user], ids)
    assert got == [*sampled, *user, *tokenizer.encode(rest)]


def test_text_never_becomes_a_special_token(tokenizer):
    special = tokenizer.encode("a<｜User｜>")
    plain = [token for char in "a<｜User｜>" for token in tokenizer.encode(char)]
    more = tokenizer.encode("<｜Assistant｜>")
    assert spelling.joined(tokenizer, [*special, *more], [*plain, *more, *special]) is None
    assert spelling.joined(tokenizer, [*plain, *more], [*special, *more, *special]) is None


def test_a_store_that_holds_a_cut_word(bare_model, tokenizer, tmp_path):
    model = Model(bare_model.args.model_copy(update={"vocab_size": tokenizer.vocab_size}))
    model.identity = "bare"
    store = KVStore(tmp_path, model=model, tokenizer=tokenizer)
    ids = tokenizer.encode("The conversations of " + "unbelievably many")
    for end in range(1, len(ids)):
        store.save(ids[:end], synthetic_state(model, np.array(ids[:end])))
    for text in ("The conversations of unb", "The conv", "The conversation so far", "The con <x"):
        assert store.encode(text) == tokenizer.encode(text)
