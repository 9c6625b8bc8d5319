"""Many generated completions: what is undamaged is read exactly, damage harms nothing beside it."""

import json
import random

import pytest
from chat_messages import calls_of
from fuzz_calls import completion, damage

from ds4mlx.chat import parse_completion

FEW, MANY = range(400), range(400, 50_400)
SEEDS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


def arguments_of(message):
    return [(name, json.loads(arguments)) for name, arguments in calls_of(message)]


@pytest.mark.parametrize("seeds", SEEDS)
def test_undamaged_completions_are_read_exactly(seeds):
    for seed in seeds:
        made = completion(random.Random(seed))
        message = parse_completion(made.text, made.thinking)
        assert arguments_of(message) == made.calls, seed
        assert (message["content"], message["malformed"]) == (made.content, []), seed
        if made.thinking != "none":
            assert message["reasoning_content"] == made.reasoning, seed


@pytest.mark.parametrize("seeds", SEEDS)
def test_damage_harms_nothing_beside_it(seeds):
    for seed in seeds:
        rng = random.Random(seed)
        made = completion(rng)
        broken = damage(rng, made)
        message = parse_completion(broken.text, made.thinking)
        calls = arguments_of(message)
        rest = iter(calls)
        assert all(made.calls[i] in rest for i in broken.untouched), (seed, broken)  # in order
        shown = message["content"] + "".join(message["malformed"]) + "".join(n for n, _ in calls)
        assert all(made.calls[i][0] in shown for i in broken.named), (seed, broken)
        for name, arguments in calls:
            marks = [mark for mark in made.marks if mark in json.dumps(arguments)]
            named = any(name in fault for fault in message["malformed"])
            assert len(marks) <= 1 or named, (seed, broken)
