"""Drafts over long texts and many draws, compared with the same without drafts; for the nightly run."""

import random

import drafting
import mlx.core as mx
import numpy as np
import pytest
from ahead import IDS
from drafting import CRITICAL_7, always, chi_squared, tokens
from steering import tokens_of

from ds4mlx import load
from ds4mlx.chat import encode_messages
from ds4mlx.engine.generation import answer
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.sampling import Sampler
from ds4mlx.engine.sequence import Sequence
from ds4mlx.evaluation.held_out import filler_of, held_out_texts
from ds4mlx.evaluation.tool_calls import case as tool_case
from ds4mlx.evaluation.weights import decode_weights
from ds4mlx.evaluation.words import NOUNS

pytestmark = pytest.mark.slow


def test_sampled_text_has_the_models_distribution(small_dir, small_tokenizer):
    """Of three tokens in a row, two of them drafted, whose probabilities the model itself gives."""
    model = drafting.noisy(small_dir)
    ids, sampler, count = IDS[:20], Sampler(2.0, top_k=2), 2000

    def continued(tokens):
        chances = np.exp(np.array(sampler.log_probs(model(mx.array([tokens]))[:, -1])))[0]
        return [([*tokens, int(token)], chances[token]) for token in np.flatnonzero(chances)]

    want = {(): 1.0}
    for _ in range(3):
        want = {
            tuple(text[20:]): p * chance
            for before, p in want.items()
            for text, chance in continued([*ids, *before])
        }
    whole, seen = model.make_cache(), dict.fromkeys(want, 0)
    prefill(model, ids[:-1], whole)
    for number in range(count):
        state = model.make_cache()
        state.share(whole)
        one = Sequence(ids, state, small_tokenizer, sampler=sampler, max_tokens=4)
        one.seed = number  # the sampler has none, so proposals are drawn by themselves
        seen[tuple(tokens(model, one, 2)[:3])] += 1
    assert len(want) == 8 and min(want.values()) > 0.01
    expected = count * np.array(list(want.values()))
    assert chi_squared(np.array(list(seen.values())), expected) < CRITICAL_7


def prompts(tokenizer):
    """Ten of each kind of text."""
    rng, code = random.Random(3), filler_of(held_out_texts(), 300)
    for _ in range(10):
        yield "code", tokenizer.encode(code(rng))
        name = f"{rng.choice(NOUNS)}_{rng.choice(NOUNS)}"
        yield "beginning of a function", tokenizer.encode(f"def {name}(values):\n")
        asked = {"role": "user", "content": f"Write a function {name} that sorts words."}
        yield "request", tokenizer.encode(encode_messages([asked], thinking="none"))
        task = tool_case(rng)
        asked = encode_messages([task.request], thinking="none", tools=task.tools)
        yield "tool call", tokenizer.encode(asked)
        yield "noise", [rng.randrange(300, 1000) for _ in range(50)]


def test_long_greedy_texts_are_the_same(embedded_dir, capsys):
    """50 prompts, 200 tokens each, and what share of the drafts is accepted by kind of text."""
    model, tokenizer = drafting.trained(embedded_dir)
    counts = {}
    for number, (kind, ids) in enumerate(prompts(tokenizer)):
        runs = []
        for drafts in (0, 1 + number // 5 % 3):
            one = Sequence(ids, model.make_cache(), tokenizer, max_tokens=200)
            runs.append(list(answer(model, one, drafts=drafts, bypass=always())))
        assert tokens_of(runs[0]) == tokens_of(runs[1])
        own = counts.setdefault((kind, drafts), np.zeros(3, int))
        own += [len(runs[1]), runs[1][-1].drafted_tokens, runs[1][-1].accepted_tokens]
        with capsys.disabled():
            print(kind, drafts, len(runs[1]), own.tolist(), flush=True)


def test_in_bfloat16_texts_part_only_at_a_draw(embedded_dir):
    """50 prompts, up to 200 tokens each. A draw: the best two logits are closer than steps of one token
    and of several differ, which may move both of them."""
    model, tokenizer = load(embedded_dir, dtype=mx.bfloat16)
    decode_weights(model)
    for number, (_, ids) in enumerate(prompts(tokenizer)):
        runs = []
        for drafts in (0, 1 + number // 5 % 3):
            one = Sequence(ids, model.make_cache(), tokenizer, max_tokens=200)
            runs.append(list(answer(model, one, drafts=drafts, bypass=always())))
        plain, drafted = map(tokens_of, runs)
        pairs = enumerate(zip(plain, drafted, strict=False))
        parted = next((n for n, (one, other) in pairs if one != other), None)
        if parted is None:
            assert plain == drafted
            continue
        ones = np.array(mx.concatenate([response.logits for response in runs[0][: parted + 1]]))
        many = np.array(model(mx.array([[*ids, *plain[:parted]]]))[0, len(ids) - 1 :])
        second, first = np.sort(ones[-1])[-2:]
        assert first - second <= 2 * np.abs(ones - many).max()
