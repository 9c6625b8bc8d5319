"""Text from a model: chunked prefill, decoding, stop strings, one response a token."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import mlx.core as mx

from ds4mlx.chat.segments import Prompt
from ds4mlx.engine.interrupts import undivided
from ds4mlx.engine.prefill import PREFILL_STEP, prefill
from ds4mlx.engine.sampling import Sampler, log_probs
from ds4mlx.errors import DataError
from ds4mlx.model.model import Model
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.store import KVStore
from ds4mlx.store.policy import Keeper, Policy, take_up
from ds4mlx.text.stops import StopStrings
from ds4mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Response:
    """What one token brought."""

    text: str  # whole characters, and nothing that may yet become a stop string
    token: int
    logprobs: mx.array  # float32 (vocab,), of the model's logits: no temperature, no filters
    prompt_tokens: int
    prompt_tps: float  # prompt tokens per second
    generation_tokens: int
    generation_tps: float
    peak_memory: float  # GB
    finish_reason: str | None  # "stop" or "length" with the last response
    cached_tokens: int = 0  # tokens before the prompt's that were not prefilled


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Prompt | Sequence[int],
    max_tokens: int = 100,
    **options,
) -> str:
    """The whole text that `stream_generate` gives for the same arguments."""
    responses = stream_generate(model, tokenizer, prompt, max_tokens, **options)
    return "".join(response.text for response in responses)


def stream_generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Prompt | Sequence[int],
    max_tokens: int = 100,
    *,
    sampler: Sampler | None = None,
    stop: str | Sequence[str] = (),
    cache: DecodeState | None = None,
    prefill_step: int = PREFILL_STEP,
    on_prefill: Callable[[int, int], None] | None = None,
    store: KVStore | None = None,
    held: Sequence[int] = (),
) -> Generator[Response, None, None]:
    """Continue `prompt`, text, pieces of it or token ids, one token at a time.

    sampler: greedy if not given. stop: texts that end the answer and do not appear in it.
    cache: a state that holds what precedes `prompt`. on_prefill: told (tokens done, tokens in
    all) after each chunk of `prefill_step`. The end-of-sentence token ends the answer.
    store: where the longest stored prefix of the prompt is taken up, and saves are made as `Policy`
    says. With a cache of the caller's own it is only saved into, and `held` are its tokens.

    The cache moves on by the prompt and by every token given out but the last: a token is fed
    when the next one is asked for. Ctrl-C comes between two steps and leaves the cache whole.
    Raises DataError, at once, for an empty prompt, ids outside the vocabulary, or too little
    context.
    """
    ids = encoded(prompt, tokenizer, store)
    own, cache = cache is None, model.make_cache() if cache is None else cache
    _check(model, ids, max_tokens, cache, prefill_step)
    hold = StopStrings([stop] if isinstance(stop, str) else stop)
    start, keeper = 0, None
    if store is not None:
        if own:
            cache, start = take_up(store, ids, cache, 0)
        keeper = Keeper(store, [*held, *ids], cache, Policy())
    fed = partial(prefill, model, ids[start:], cache, prefill_step, _both(on_prefill, keeper))
    tokens = islice(_tokens(model, cache, fed, sampler or Sampler(temperature=0)), max_tokens)
    responses = _responses(tokens, max_tokens, len(ids) - start, cache.offset, tokenizer, hold)
    return responses if keeper is None else _kept(responses, keeper, own)


def encoded(
    prompt: str | Prompt | Sequence[int], tokenizer: Tokenizer, store: KVStore | None
) -> list[int]:
    """Token ids of a prompt; of a text, those of a stored prefix as far as one reaches."""
    if not isinstance(prompt, str | Prompt):
        return [int(token) for token in prompt]
    if store is not None and store.tokenizer is not None:
        return store.encode(prompt)
    return (
        tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_segments(prompt)
    )


def _both(
    on_prefill: Callable[[int, int], None] | None, keeper: Keeper | None
) -> Callable[[int, int], None] | None:
    """Tells `on_prefill`, and the keeper that the state has moved on."""
    if keeper is None:
        return on_prefill

    def told(done: int, total: int) -> None:
        keeper.advanced()
        if on_prefill is not None:
            on_prefill(done, total)

    return told


def _kept(
    responses: Generator[Response, None, None], keeper: Keeper, own: bool
) -> Generator[Response, None, None]:
    """The responses, with the saves of a run; at its end too if the state ends with it."""
    try:
        with contextlib.closing(responses):
            for response in responses:
                keeper.add(response.token)
                yield response
    except Exception:
        own = False  # the state may hold a part of a step
        raise
    finally:
        if own:
            keeper.end("shutdown")


def _tokens(
    model: Model, cache: DecodeState, fed: Callable[[], mx.array], sampler: Sampler
) -> Iterator[tuple[int, mx.array]]:
    """Drawn tokens without end, each with the logits (1, vocab) it was drawn from."""
    logits = fed()
    while True:
        token = int(sampler(logits).item())  # type: ignore[arg-type]
        yield token, logits
        with undivided():
            logits = model.last_logits(mx.array([[token]]), cache)
            mx.eval(logits)


def _responses(
    tokens: Iterator[tuple[int, mx.array]],
    max_tokens: int,
    prompt_tokens: int,
    cached_tokens: int,
    tokenizer: Tokenizer,
    hold: StopStrings,
) -> Generator[Response, None, None]:
    """What each token brings, up to the end of the answer."""
    stream = tokenizer.stream()
    begun, prompt_seconds = time.perf_counter(), 0.0
    for count, (token, logits) in enumerate(tokens, 1):
        prompt_seconds = prompt_seconds or time.perf_counter() - begun
        ended = token == tokenizer.eos_token_id
        text = "" if ended else hold.add(stream.add(token))
        reason = "stop" if ended or hold.found else "length" if count == max_tokens else None
        if reason and not hold.found:
            text += hold.add(stream.finish()) + hold.finish()
        yield Response(
            text,
            token,
            log_probs(logits)[0],
            prompt_tokens,
            prompt_tokens / prompt_seconds,
            count,
            count / max(time.perf_counter() - begun - prompt_seconds, 1e-9),
            mx.get_peak_memory() / 1e9,
            reason,
            cached_tokens,
        )
        if reason:
            return


def _check(
    model: Model, ids: Sequence[int], max_tokens: int, cache: DecodeState, prefill_step: int
) -> None:
    if prefill_step < 1:
        raise DataError(f"prefill_step must be at least 1, not {prefill_step}")
    if not ids:
        raise DataError("the prompt is empty")
    wrong = next((t for t in ids if not 0 <= t < model.args.vocab_size), None)
    if wrong is not None:
        size = model.args.vocab_size
        raise DataError(f"prompt: token id {wrong} is outside the vocabulary of {size}")
    if max_tokens < 0:
        raise DataError(f"max_tokens must be at least 0, not {max_tokens}")
    total, limit = cache.offset + len(ids) + max_tokens, model.args.max_position_embeddings
    if total > limit:
        raise DataError(
            f"{cache.offset + len(ids)} tokens of prompt and {max_tokens} to generate exceed the "
            f"context of {limit}"
        )
