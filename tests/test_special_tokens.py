"""A conversion is refused unless every token that chat writes is one id."""

import json
import shutil

import make_gguf
import official
import pytest

from ds4mlx import DataError
from ds4mlx.chat.tokens import ASSISTANT, BOS, CONTROL, DSML, EOS, THINK_END
from ds4mlx.convert import convert
from ds4mlx.convert.special_tokens import TASKS
from ds4mlx.engine.default_model import EMBEDDED


def without(*tokens):
    """Drops added tokens; the ids of the others stay."""

    def change(tokenizer):
        added = tokenizer["added_tokens"]
        tokenizer["added_tokens"] = [a for a in added if a["content"] not in tokens]
        for token in tokens:
            tokenizer["model"]["vocab"].pop(token, None)

    return change


def unmarked(token):
    """The token stays in the vocabulary, but text is not searched for it."""

    def change(tokenizer):
        added = tokenizer["added_tokens"]
        (entry,) = [a for a in added if a["content"] == token]
        added.remove(entry)
        tokenizer["model"]["vocab"][token] = entry["id"]

    return change


def flagged(token, **flags):
    def change(tokenizer):
        next(a for a in tokenizer["added_tokens"] if a["content"] == token).update(flags)

    return change


def swapped(tokenizer):
    first, second = (a for a in tokenizer["added_tokens"] if a["content"] in (BOS, EOS))
    first["id"], second["id"] = second["id"], first["id"]
    vocabulary = tokenizer["model"]["vocab"]
    for entry in (first, second):
        if entry["content"] in vocabulary:
            vocabulary[entry["content"]] = entry["id"]


def none_at_all(tokenizer):
    tokenizer["added_tokens"] = []


BAD = [
    *((without(token), token) for token in (*CONTROL, DSML)),
    *((unmarked(token), token) for token in (ASSISTANT, THINK_END, DSML, TASKS[0])),
    (flagged(ASSISTANT, single_word=True, rstrip=True), ASSISTANT),
    (flagged(EOS, lstrip=True), EOS),
    (swapped, BOS),
    (none_at_all, BOS),
]


def spoiled(source, target, change):
    path = target / "source"
    shutil.copytree(source, path, copy_function=shutil.copy)
    tokenizer = json.loads((EMBEDDED / "tokenizer.json").read_text())
    change(tokenizer)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.mark.parametrize(("change", "token"), BAD)
def test_official(talker_source, tmp_path, change, token):
    path = spoiled(talker_source, tmp_path, change)
    with pytest.raises(DataError, match=rf"tokenizer\.json: the special token .*{token}"):
        convert(path, tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("change", [without(*TASKS), lambda _: None])
def test_whole_groups_may_be_there_or_not(talker_source, tmp_path, change):
    convert(spoiled(talker_source, tmp_path, change), tmp_path / "out", dry_run=True)


def test_a_vocabulary_of_bytes_needs_no_tokens_of_chat(small_source, tmp_path):
    convert(small_source, tmp_path / "out", dry_run=True)
    source = official.copy(small_source, tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    without(EOS)(tokenizer)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=f"special token {EOS} is missing"):
        convert(source, tmp_path / "out", dry_run=True)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda types, _: None, "token_type is missing"),
        (lambda types, _: types[:-1], "token_type is missing or has not one number a token"),
        (lambda types, _: types[:4], "token_type is missing or has not one number a token"),
        (lambda types, _: [float(t) for t in types], "token_type is missing or has not one number"),
        (lambda types, _: [str(t) for t in types], "token_type is missing or has not one number"),
        (lambda types, _: [1] * len(types), f"special token {BOS} is read as ordinary text"),
        (
            lambda types, at: [1 if i == at[ASSISTANT] else t for i, t in enumerate(types)],
            f"special token {ASSISTANT} is read as ordinary text",
        ),
    ],
)
def test_gguf(talker_source, tmp_path, monkeypatch, change, cause):
    def vocabulary(tokenizer, size, original=make_gguf.vocabulary):
        tokens, types = original(tokenizer, size)
        return tokens, change(types, {token: number for number, token in enumerate(tokens)})

    written = make_gguf.Written(talker_source)
    monkeypatch.setattr(make_gguf, "vocabulary", vocabulary)
    if change([1], {ASSISTANT: 0}) is None:
        monkeypatch.setattr(make_gguf.gguf.GGUFWriter, "add_token_types", lambda *_: None)
    written.main(tmp_path / "model.gguf")
    with pytest.raises(DataError, match=rf"model\.gguf: .*{cause}"):
        convert(tmp_path / "model.gguf", tmp_path / "out", dry_run=True)
