"""Recall, tool calls and official vectors: hand-made cases, and real files that are spoiled."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from reference import DATA

from ds4mlx import DataError, generate, load, stream_generate
from ds4mlx.chat import encode_messages
from ds4mlx.evaluation import recall_accuracy as recall
from ds4mlx.evaluation import tool_accuracy, vectors
from ds4mlx.evaluation.recall import RecallDocument
from ds4mlx.evaluation.weights import decode_weights

VECTORS = DATA / "vectors"


@pytest.fixture(scope="module")
def fast(talker_dir):
    """The random model with plain weights."""
    model, tokenizer = load(talker_dir, dtype=mx.float32)
    decode_weights(model)
    return model, tokenizer


# Tokens of four characters; facts begin at 0 and 20, answers at 40 (to 52) and at 60 (to 70).
HAND_MADE = RecallDocument("x" * 80, 30, (0, 20), ((40, 52), (60, 70)))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ([], (True, True)),
        ([10], (False, True)),  # the first token of the first answer
        ([12], (False, True)),  # its last
        ([13], (True, True)),  # after its value
        ([9], (True, True)),  # before it
        ([15, 17], (True, False)),
        ([18], (True, True)),
    ],
)
def test_answers_are_right_if_each_of_their_tokens_leads(wrong, right):
    starts, leads = np.arange(0, 80, 4), np.ones(19, bool)
    leads[[token - 1 for token in wrong]] = False
    found = recall.judged(HAND_MADE, starts, leads)
    assert tuple(q.right for q in found) == right
    assert [q.position for q in found] == [10, 15]
    # the facts end with tokens 2 and 7
    assert [q.distance for q in found] == [8, 8]


def test_questions_are_gathered_by_distance(official_model):
    """The tiny model has a window of 16, so its six layers reach back 96 tokens."""
    asked = [(3, 20, True), (16, 30, False), (600, 5000, True), (9000, 9100, False)]
    questions = [recall.Question(*each) for each in asked]
    found = recall.by_distance(official_model, questions)
    shares = [(d.first, d.end, d.accuracy.value, d.accuracy.count) for d in found.distances]
    assert shares == [
        (0, 16, 1, 1),
        (16, 512, 0, 1),
        (512, 2048, 1, 1),
        (2048, 4096, 0, 0),
        (4096, None, 0, 1),
    ]
    assert found.among_many_rows.count == 2 and found.all.value == 0.5


def test_documents_have_the_planned_length(talker):
    tokenizer = talker[1]
    plan = recall.Plan(3, 700, 5, 4)
    lengths = [len(tokenizer.encode(d.text)) for d in recall.documents(plan, tokenizer, 1)]
    assert len(lengths) == 3 and all(500 < length < 950 for length in lengths)
    assert recall.documents(plan, tokenizer, 1) == recall.documents(plan, tokenizer, 1)


def test_recall_of_a_whole_run(talker):
    model, tokenizer = talker
    found = recall.recall_accuracy(model, tokenizer, [recall.Plan(2, 300, 2, 2)])
    assert [r.hidden for r in found.results] == [None, "CSA", "HCA"]
    assert [r.all.count for r in found.results] == [4, 4, 4]
    assert found.reach == 4 * 32 and found.rows == 1000
    assert all(r.all.value == 0 for r in found.results)  # a random model knows nothing


def test_a_right_answer_is_what_greedy_generation_gives(talker):
    """Judged by one reading of a document that the model itself has written."""
    model, tokenizer = talker
    prompt = "The code of the red fox is tango.\nWhat is its code?"
    answer = generate(model, tokenizer, prompt, 12)
    text = prompt + answer
    if tokenizer.encode(text)[: len(tokenizer.encode(prompt))] != tokenizer.encode(prompt):
        pytest.skip("the answer's tokens do not stand alone")
    found = RecallDocument(text, 5, (0,), ((len(prompt), len(text)),))
    ids = [r.token for r in stream_generate(model, tokenizer, prompt, 12)]
    same = tokenizer.encode(text)[len(tokenizer.encode(prompt)) :] == ids
    ((_, (question,)),) = recall.readings(model, tokenizer, found)
    assert question.right == same


def test_drafts_do_not_change_greedy_decoding(fast, monkeypatch):
    model, tokenizer = fast
    monkeypatch.setattr(tool_accuracy, "REWIND", 8)
    prompt = list(range(30, 230))
    plain = [r.token for r in stream_generate(model, tokenizer, prompt, 30)]
    assert tokenizer.eos_token_id not in plain
    drafts = ([], plain[:20], [*plain[:20], 7, 8, 9], [*plain[:17], *[1] * 9], [3, 3], plain[:-1])
    for draft in drafts:
        assert tool_accuracy.greedy(model, tokenizer, prompt, draft, 30) == plain


def test_an_answer_ends_with_its_draft(talker):
    """A model whose greedy choice is always the end of the answer says nothing."""
    model, tokenizer = talker
    plain = [r.token for r in stream_generate(model, tokenizer, list(range(30, 60)), 6)]
    ending = type(tokenizer)(tokenizer.encoder, tokenizer.bos_token_id, plain[4])
    first = plain.index(plain[4])
    for draft in ([], plain[:2], plain[:first], [2]):
        found = tool_accuracy.greedy(model, ending, list(range(30, 60)), draft, 20)
        assert [t for t in found if t != plain[4]] == plain[:first]


def test_tool_calls_of_a_model_that_answers_as_asked(talker, monkeypatch):
    """Scores of right answers, of valid but wrong ones, and of none, by real parsing."""
    model, tokenizer = talker

    def official(model, tokenizer, asked, thinking):
        prompt = encode_messages([asked.request], thinking, tools=asked.tools)
        whole = encode_messages(asked.messages[:2], thinking, tools=asked.tools)
        return whole[len(prompt) :].removesuffix("<｜end▁of▁sentence｜>")

    monkeypatch.setattr(tool_accuracy, "answer", official)
    for found in tool_accuracy.tool_accuracy(model, tokenizer, 4):
        assert found.valid.value == found.right.value == 1 and found.valid.count == 4


def test_a_random_model_calls_nothing(fast):
    model, tokenizer = fast
    (found,) = tool_accuracy.tool_accuracy(model, tokenizer, 1, modes=("none",))
    assert found.valid.value == found.right.value == 0


# Official vectors


def test_both_forms_hold_the_same_cases():
    lines, manifest = (vectors.read_vectors(VECTORS / n) for n in ("official.vec", "manifest.json"))
    assert [c.name for c in lines] == [c.name for c in manifest] and len(lines) == 5
    for a, b in zip(lines, manifest, strict=True):
        assert [s.token for s in a.steps] == [s.token for s in b.steps]
        assert a.prompt == b.prompt
    assert b"".join(s.token for s in lines[0].steps) == b"Ada Lovelace"


def own_case(model, tokenizer, alternatives=()):
    """A case whose answer is the model's own."""
    prompt = encode_messages([{"role": "user", "content": "Hi"}], "none")
    responses = list(stream_generate(model, tokenizer, prompt, 4))
    steps = [vectors.Step(tokenizer.token_bytes(r.token), list(alternatives)) for r in responses]
    return vectors.Case("own", "Hi", steps), responses


def test_a_models_own_answer_matches(talker):
    model, tokenizer = talker
    own, responses = own_case(model, tokenizer, [(b"never", vectors.UNKNOWN)])
    (found,) = vectors.run_vectors(model, tokenizer, [own])
    assert (found.matched, found.steps) == (4, 4) and found.answer == found.official
    other = vectors.Case("own", "Hi", [vectors.Step(b"?!", []), *own.steps[1:]])
    assert vectors.run_vectors(model, tokenizer, [other])[0].matched == 3
    near = float(responses[0].logprobs[responses[0].token].item()) + 3.9
    for value, matched in ((near, 1), (near + 0.2, 0)):
        step = vectors.Step(own.steps[0].token, [(own.steps[0].token, value)])
        (found,) = vectors.run_vectors(model, tokenizer, [vectors.Case("own", "Hi", [step])])
        assert found.matched == matched
    step = vectors.Step(own.steps[0].token, [(b"never", -1.0)])
    assert (
        vectors.run_vectors(model, tokenizer, [vectors.Case("own", "Hi", [step])])[0].matched == 0
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("step 0 416461 1", "step 0 41646 1", "official.vec:7: '41646' is not hexadecimal"),
        ("top 416461 0", "top 416461 much", "official.vec:8: 'much' is not a number"),
        ("step 0 416461 1\ntop", "top", "official.vec:7: not a line"),
        ("end\n", "", "official.vec:16: not a line"),
        ("case short_italian", "cases short_italian", "official.vec:6: not a line"),
        ("short_italian_fact.txt", "gone.txt", "official.vec:6: there is no prompt file"),
    ],
)
def test_spoiled_lines_are_named(tmp_path, old, new, message):
    shutil.copytree(VECTORS / "prompts", tmp_path / "prompts")
    text = (VECTORS / "official.vec").read_text()
    assert old in text
    (tmp_path / "official.vec").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        vectors.read_vectors(tmp_path / "official.vec")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v.update(schema="other"),
        lambda v: v.pop("prompt"),
        lambda v: v.update(prompt=3),
        lambda v: v.update(steps=[{}]),
        lambda v: v.update(steps=7),
        lambda v: v["steps"][0]["token"].update(bytes=[300]),
        lambda v: v["steps"][0]["top_logprobs"][0].update(logprob="x"),
    ],
)
def test_spoiled_json_is_refused(tmp_path, spoil):
    values = json.loads((VECTORS / "official" / "short_italian_fact.official.json").read_text())
    spoil(values)
    file = tmp_path / "case.official.json"
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"case\.official\.json"):
        vectors.read_vectors(file)
