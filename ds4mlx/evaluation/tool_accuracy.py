"""Tool calls by greedy generation: how many answers are valid calls, and how many the right ones."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ds4mlx.chat import encode_messages
from ds4mlx.engine.generation import stream_generate
from ds4mlx.engine.prefill import prefill
from ds4mlx.evaluation.scoring import Mean, bar
from ds4mlx.evaluation.tool_calls import ToolCase, case, judge
from ds4mlx.model.model import Model
from ds4mlx.state.layer import REWIND
from ds4mlx.text.tokenizer import Tokenizer

SEED = 11
CASES = 25
MORE = 64
MODES = ("none", "high")


@dataclass(frozen=True)
class ToolCalls:
    """Shares of the cases of one thinking mode; see `ds4mlx.evaluation.tool_calls`."""

    thinking: str
    valid: Mean
    right: Mean


def tool_accuracy(
    model: Model,
    tokenizer: Tokenizer,
    cases: int = CASES,
    modes: Sequence[str] = MODES,
    seed: int = SEED,
) -> list[ToolCalls]:
    """Answer the same random cases in each thinking mode."""
    rng = random.Random(seed)
    asked = [case(rng) for _ in range(cases)]
    found = []
    with bar("tool calls", cases * len(modes), "answers") as progress:
        for mode in modes:
            judged = []
            for each in asked:
                judged.append(judge(each, answer(model, tokenizer, each, mode), mode))
                progress.update()
            valid, right = Mean.of(v for v, _ in judged), Mean.of(r for _, r in judged)
            found.append(ToolCalls(mode, valid, right))
    return found


def answer(model: Model, tokenizer: Tokenizer, asked: ToolCase, thinking: str) -> str:
    """The model's greedy answer; cut at MORE tokens above the length of the one asked for.

    The answer asked for is read as a draft: where the model would have written the same, it is
    spared decoding token by token.
    """
    release = model.args.release
    prompt = encode_messages([asked.request], thinking, tools=asked.tools, release=release)
    whole = encode_messages(asked.messages[:2], thinking, tools=asked.tools, release=release)
    draft = tokenizer.encode(whole[len(prompt) :])
    draft.remove(tokenizer.eos_token_id)
    longest = len(draft) + MORE
    ids = greedy(model, tokenizer, tokenizer.encode(prompt), draft, longest)
    return tokenizer.decode([token for token in ids if token != tokenizer.eos_token_id])


def greedy(
    model: Model, tokenizer: Tokenizer, prompt: list[int], draft: list[int], longest: int
) -> list[int]:
    """Token ids of greedy decoding, up to the end of the answer or `longest`.

    As far as they are those of `draft`, which is no longer than that, they are checked a block at a
    time; at the first other one the state steps back, and decoding goes on from there.
    """
    cache = model.make_cache()
    logits, agreed = prefill(model, prompt, cache), 0
    while True:
        token = int(mx.argmax(logits[-1]).item())  # type: ignore[arg-type]
        if token == tokenizer.eos_token_id or agreed == len(draft) or token != draft[agreed]:
            break
        block = draft[agreed : agreed + REWIND]
        logits = model(mx.array([block]), cache=cache)[0]
        following: list[int] = mx.argmax(logits, axis=-1).tolist()  # type: ignore[assignment]
        same = next((n for n, t in enumerate(following[:-1]) if t != block[n + 1]), len(block) - 1)
        agreed += same + 1
        cache.rewind(len(prompt) + agreed)
        logits = logits[: same + 1]
    if token == tokenizer.eos_token_id:
        return draft[:agreed]
    rest = stream_generate(model, tokenizer, [token], longest - agreed - 1, cache=cache)
    return [*draft[:agreed], token, *(response.token for response in rest)]
