"""Text from a model: one sequence driven from its prompt to its end, one response a token."""

import time
from collections import abc
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx

from ds4mlx.chat.segments import Prompt
from ds4mlx.engine import room
from ds4mlx.engine.bypass import Bypass
from ds4mlx.engine.decoding import Decoding, Taken
from ds4mlx.engine.prefill import prefill
from ds4mlx.engine.requests import check_count, check_prompt
from ds4mlx.engine.room import PREFILL_STEP
from ds4mlx.engine.rules import Rule
from ds4mlx.engine.sampling import Sampler, log_probs
from ds4mlx.engine.sequence import Sequence
from ds4mlx.engine.speculative import Drafted, Speculation, check_drafts
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.store import KVStore
from ds4mlx.store.keys import integer_array
from ds4mlx.store.policy import Keeper, Policy, take_up
from ds4mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Response:
    """What one token brought."""

    text: str  # whole characters, and nothing that may yet become a stop string
    token: int
    logits: mx.array = field(repr=False)  # float32 (1, vocab), those that the token is drawn from
    prompt_tokens: int
    prompt_tps: float  # prompt tokens per second
    generation_tokens: int
    generation_tps: float
    peak_memory: float  # GB
    finish_reason: str | None  # "stop" or "length" with the last response
    cached_tokens: int = 0  # tokens before the prompt's that were not prefilled
    drafted_tokens: int = 0  # proposed by the draft block so far, and checked
    accepted_tokens: int = 0  # of these

    @cached_property
    def logprobs(self) -> mx.array:
        """float32 (vocab,), of the model's logits: no temperature, no filters.

        Computed when it is first read, at any time.
        """
        return log_probs(self.logits)[0]


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Prompt | abc.Sequence[int],
    max_tokens: int = 100,
    *,
    temp: float | None = None,
    verbose: bool = False,
    **options,
) -> str:
    """The whole text that `stream_generate` gives for the same arguments.

    temp: draws at this temperature instead of greedily, without further options; not together
    with a `sampler`. verbose: also print the text as it comes, and at its end the speeds.
    """
    if temp is not None:
        if options.get("sampler") is not None:
            raise DataError("temp and sampler exclude each other: a sampler has its temperature")
        options["sampler"] = Sampler(temperature=temp)
    text, last = "", None
    for last in stream_generate(model, tokenizer, prompt, max_tokens, **options):
        text += last.text
        if verbose:
            print(last.text, end="", flush=True)
    if verbose and last is not None:
        print(
            f"\nPrompt: {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tokens/s\n"
            f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s\n"
            f"Peak memory: {last.peak_memory:.2f} GB"
        )
    return text


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Prompt | abc.Sequence[int],
    max_tokens: int = 100,
    *,
    sampler: Sampler | None = None,
    stop: str | abc.Sequence[str] = (),
    cache: DecodeState | None = None,
    prefill_step: int = PREFILL_STEP,
    on_prefill: Callable[[int, int], None] | None = None,
    store: KVStore | None = None,
    policy: Policy | None = None,
    rule: Rule | None = None,
    thinking_budget: int | None = None,
    drafts: int = 0,
) -> Generator[Response, None, None]:
    """Continue `prompt`, text, pieces of it or token ids, one token at a time.

    sampler: greedy if not given. stop: texts that end the answer and do not appear in it; in a
    thought (<think> to </think>) they are not looked for. cache: a state that holds what precedes
    `prompt`. prefill_step: the most tokens of it that are read at a time. on_prefill: told
    (tokens done, tokens in all) after each chunk. The end-of-sentence token ends the answer.
    store: where the longest stored prefix of the prompt is taken up, and saves are made as `policy`
    says; not together with a cache, whose tokens are not known here.
    rule, thinking_budget: what the answer must be, and the longest thought, as of a `Sequence`.
    drafts: up to so many tokens, at most 3, are proposed by the model's draft block and checked in one
    step, as long as that is faster here. Greedy text and text drawn with a seed are the same as without,
    but for rounding; other text is drawn from the same distribution.

    The cache moves on by the prompt and by every token given out but the last: it takes a token
    when the next one is asked for. That is computed ahead, while the last one is being used, and
    left out again if it is not asked for, or if the cache or the model has been changed meanwhile.
    Ctrl-C comes between two steps and leaves the cache whole.
    Raises DataError, at once, for an empty prompt, ids outside the vocabulary, or too little
    context or memory; and later where logits are not finite, with the cache as before the step that failed.
    """
    if store is not None and cache is not None:
        raise DataError("a store needs all tokens, and those that the cache holds are not known")
    ids = encoded(prompt, tokenizer, store)
    state = model.make_cache() if cache is None else cache
    first = state.offset
    check_prompt(model.args, ids, first, max_tokens)
    room.of_model(model, first + len(ids) + max_tokens, saving=store is not None).check()
    check_count("prefill_step", prefill_step, 1)
    check_drafts(model, drafts)
    if store is not None:
        state, _ = take_up(store, ids, state, 0)
    sequence = Sequence(
        ids,
        state,
        tokenizer,
        sampler=sampler,
        stop=stop,
        max_tokens=max_tokens,
        first=first,
        rule=rule,
        thinking_budget=thinking_budget,
    )
    options = {"prefill_step": prefill_step, "on_prefill": on_prefill, "drafts": drafts}
    if store is None:
        return answer(model, sequence, **options)
    return _kept_answer(
        model, sequence, Keeper(store, sequence.tokens, state, policy or Policy()), **options
    )


def answer(
    model: Model,
    sequence: Sequence,
    *,
    prefill_step: int = PREFILL_STEP,
    on_prefill: Callable[[int, int], None] | None = None,
    keeper: Keeper | None = None,
    drafts: int = 0,
    bypass: Bypass | None = None,
) -> Generator[Response, None, None]:
    """Drive a sequence to its end, with the saves of a keeper while its state moves on.

    drafts, bypass: as of `Speculation`, with a bypass of its own if none is given.
    """

    def told(done: int, total: int) -> None:
        if keeper is not None:
            keeper.advanced()
        if on_prefill is not None:
            on_prefill(done, total)

    if not sequence.max_tokens:
        return
    clock, cached = _Clock(len(sequence.pending)), sequence.state.offset
    step, drafted = _driven(model, sequence, prefill_step, told, drafts, bypass)
    while not sequence.reason:
        taken = step()
        if taken.error is not None:
            raise taken.error
        if keeper is not None:
            keeper.advanced()
        yield Response(
            taken.text,
            taken.token,
            taken.logits,
            clock.prompt_tokens,
            clock.prompt_tps(),
            sequence.drawn,
            clock.generation_tps(sequence.drawn),
            mx.get_peak_memory() / 1e9,
            sequence.reason,
            cached,
            drafted.proposed,
            drafted.accepted,
        )


def _driven(
    model: Model,
    sequence: Sequence,
    prefill_step: int,
    told: Callable[[int, int], None],
    drafts: int,
    bypass: Bypass | None,
) -> tuple[Callable[[], Taken], Drafted]:
    """What gives the next token of a sequence whose prompt has been read, and counts of drafts."""
    ids, state, before = sequence.pending, sequence.state, sequence.state.offset
    if not drafts:
        decoding = Decoding(model)
        decoding.add(sequence, prefill(model, ids, state, prefill_step, told), before)
        return lambda: decoding.step()[0], Drafted()
    speculation = Speculation(model, sequence, drafts, bypass or Bypass())
    logits = prefill(model, ids, state, prefill_step, told, speculation.saw)
    speculation.add(logits, before)
    return speculation.step, speculation.drafted


class _Clock:
    """Times the prompt, up to its first token, and what comes after."""

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self._begun, self._prompt_seconds = time.perf_counter(), 0.0

    def prompt_tps(self) -> float:
        """Prompt tokens per second; asked for the first time when the first token is there."""
        self._prompt_seconds = self._prompt_seconds or time.perf_counter() - self._begun
        return self.prompt_tokens / self._prompt_seconds

    def generation_tps(self, tokens: int) -> float:
        """Drawn tokens per second since the prompt was done."""
        return tokens / max(time.perf_counter() - self._begun - self._prompt_seconds, 1e-9)


def _kept_answer(
    model: Model, sequence: Sequence, keeper: Keeper, **options
) -> Generator[Response, None, None]:
    """The answer; where it ends or is left, but not where it fails, its state is saved."""
    try:
        yield from answer(model, sequence, keeper=keeper, **options)
    except Exception:
        raise
    except BaseException:  # Ctrl-C, or the caller has closed the iterator
        keeper.end("shutdown")
        raise
    else:
        keeper.end("shutdown")


def encoded(
    prompt: str | Prompt | abc.Sequence[int], tokenizer: Tokenizer, store: KVStore | None
) -> list[int]:
    """Token ids of a prompt; of a text, those of a stored prefix as far as one reaches.

    Raises DataError for a prompt that is neither a text nor the ids of one sequence.
    """
    if not isinstance(prompt, str | Prompt):
        return integer_array(prompt).tolist()
    if store is not None and store.tokenizer is not None:
        return store.encode(prompt)
    return (
        tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_segments(prompt)
    )
