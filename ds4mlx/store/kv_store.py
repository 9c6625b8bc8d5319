"""The store of one model in one directory: save and restore decode states by their tokens."""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from ds4mlx.chat.segments import Prompt, markup
from ds4mlx.errors import DataError
from ds4mlx.state.boundaries import Spacing
from ds4mlx.state.changes import changes
from ds4mlx.state.decode_state import DecodeState
from ds4mlx.state.kind import StateKind
from ds4mlx.store import keys, restoring, spelling, texts
from ds4mlx.store.calls import Calls
from ds4mlx.store.catalogue import Catalogue
from ds4mlx.store.directory import make_store
from ds4mlx.store.eviction import RECORDS_BYTES
from ds4mlx.store.items import Record, segment_path
from ds4mlx.store.locks import Pin
from ds4mlx.store.state_bytes import check_storable, made_under
from ds4mlx.store.taking import Job, Taker
from ds4mlx.store.writing import Limits, Writer
from ds4mlx.text.tokenizer import Tokenizer

BUDGET = 16 << 30
REASONS = ("cold", "continue", "evict", "shutdown")


class HasKind(Protocol):
    """What says of which kind its decode states are, as a model does."""

    @property
    def kind(self) -> StateKind:
        """The kind."""
        ...


class KVStore:
    """Decode states of one kind on disk. A state is found again by its tokens, or by their text.

    directory: made if it is missing, private to the user; several processes may share it, and
        several models. budget_bytes: of all files in it; the least valuable go when it is full.
    model: whose states they are; or, without one, their kind.
    tokenizer: that of the model; without it no prefix is found by its text.
    min_free_bytes: of the disk, left free; 1 GiB unless told, or a twentieth of a small disk.
    keep_text: whether the readable text stands in the files, for `ds4mlx cache show`; the token
        ids always do. spacing: how near to any point a boundary is kept, once the records of a
        chain take more than `records_bytes`.
    Raises DataError for a directory that cannot be a store, and unless it is told a kind.

    States that were made while the model was being steered are found again under the same steering
    only, and those of other interventions are refused.
    Not for several threads at a time; `save_soon` writes in a thread of its own.
    """

    def __init__(
        self,
        directory: str | Path,
        budget_bytes: int = BUDGET,
        model: HasKind | None = None,
        *,
        kind: StateKind | None = None,
        tokenizer: Tokenizer | None = None,
        min_free_bytes: int | None = None,
        keep_text: bool = True,
        spacing: Spacing | None = None,
        records_bytes: int = RECORDS_BYTES,
        label: str = "",
    ):
        self.directory = Path(directory).expanduser().absolute()
        self.kind, self.tokenizer = _kind_of(model, kind), tokenizer
        try:
            make_store(self.directory)
        except OSError as error:
            raise DataError(f"{self.directory}: {error.strerror}") from None
        self.calls = Calls(self.directory / "calls.jsonl")
        self._catalogue = Catalogue(self.directory)
        self._label = label or self.kind.config.release
        self._takers: dict[str, Taker] = {}  # by the changes under which states were made
        pieces = None if tokenizer is None else texts.token_texts(tokenizer)
        limits = Limits(budget_bytes, min_free_bytes, records_bytes, spacing or Spacing())
        self._writer = Writer(Catalogue(self.directory), limits, pieces, keep_text)
        self._thread = ThreadPoolExecutor(1, "kv-store")
        self._closed = False
        self.last_hit: tuple[int, str] | None = None  # tokens, and the reason they were saved for
        self._pins: weakref.WeakKeyDictionary[DecodeState, Pin] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the directory, other models' included."""
        self._catalogue.refresh()
        return self._catalogue.nbytes

    # Saving

    def save(
        self, tokens: Sequence[int] | np.ndarray, cache: DecodeState, reason: str = "cold"
    ) -> str:
        """Save the state of exactly the first len(tokens) tokens; returns its public key.

        tokens: ids, at least 1 and at most `cache.offset`. Writes what the store lacks: rows, and
        boundary records of this length and of those that the state has set aside. It lasts when
        this returns. The key is the SHA1 of the ids, each 4 bytes, little-endian.
        Raises DataError (StoreFull where the budget or the disk is too small; RewindError where
        the state can no longer give this length); what was stored before is untouched.
        """
        return self.save_soon(tokens, cache, reason).result()

    def save_soon(
        self, tokens: Sequence[int] | np.ndarray, cache: DecodeState, reason: str = "cold"
    ) -> "Future[str]":
        """Like `save`, but writes beside what follows: the state may go on when this returns.

        The future's result comes when it lasts, and raises what `save` raises while writing.
        """
        if self._closed:
            raise DataError(f"{self.directory}: the store is closed")
        if reason not in REASONS:
            raise DataError(f"reason must be one of {', '.join(REASONS)}, not {reason!r}")
        ids = keys.token_array(tokens)
        check_storable(self.kind, cache, len(ids))
        keys.token_array(ids, self.kind.config.vocab_size)
        taker = self._taker(made_under(cache))
        job = taker.take(ids, cache, reason)
        return self._thread.submit(self._write, job, taker, weakref.ref(cache))

    def flush(self) -> None:
        """Wait for everything that is being written."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Wait for everything that is being written, and let go of what is in use."""
        self._closed = True
        self._thread.shutdown()
        for pin in list(self._pins.values()):
            pin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _taker(self, changed: str) -> Taker:
        """What takes states that were made under some changes."""
        if changed not in self._takers:
            model = keys.fingerprint(self.kind, changed)
            self._takers[changed] = Taker(self._catalogue, model, self._label)
        return self._takers[changed]

    @property
    def _fingerprint(self) -> str:
        """Of states that were made under the changes in force."""
        return self._taker(changes()).model

    def _write(self, job: Job, taker: Taker, saved: "weakref.ref[DecodeState]") -> str:
        try:
            pin = self._writer.write(job)
            cache = saved()
            if cache is not None and pin is not None:
                self._keep(cache, pin)
            elif pin is not None:
                pin.close()
            return job.key
        except OSError as error:
            raise DataError(f"{self.directory}: {error.strerror or error}") from error
        finally:
            taker.settled += [piece.item.key for piece in job.segments]

    # Restoring

    def restore(self, tokens: Sequence[int] | np.ndarray) -> tuple[DecodeState, int]:
        """The state of the longest stored prefix of `tokens`, and its length.

        In every byte the state that was saved. A fresh state and 0 if nothing is stored. A damaged
        file is a miss, with one warning; it is set apart.
        """
        ids = keys.token_array(tokens)
        self._catalogue.refresh()
        corrected = -1
        while corrected != self._catalogue.corrected:  # the index was wrong: look once more
            corrected = self._catalogue.corrected
            for record in restoring.matches(self._catalogue, self._fingerprint, ids):
                state = self._taken_up(record, ids)
                if state is not None:
                    self._catalogue.hit(record)
                    self.last_hit = (record.tokens, record.reason)
                    return state, record.tokens
        self.last_hit = None
        return self.kind.make_cache(), 0

    def _taken_up(self, record: Record, ids: np.ndarray) -> DecodeState | None:
        """The state of a record, its chain pinned before it is read; None if it cannot be had."""
        pin = Pin.take(segment_path(self.directory, record.segment))
        if pin is None:
            return None
        state = None
        try:
            state = restoring.read_state(self._catalogue, self.kind, record, ids)
        finally:
            if state is None:
                pin.close()
        if state is not None:
            self._keep(state, pin)
        return state

    def longest(self, tokens: Sequence[int] | np.ndarray) -> int:
        """Length of the longest stored prefix of `tokens`, as far as the catalogue knows."""
        self._catalogue.refresh()
        ids = keys.token_array(tokens)
        records = restoring.matches(self._catalogue, self._fingerprint, ids)
        return next((record.tokens for record in records), 0)

    def encode(self, prompt: str | Prompt) -> list[int]:
        """Token ids of a prompt, of which as many as possible are those of a stored prefix.

        They are those that the tokenizer makes of it, except where a stored prefix was sampled as
        other tokens of the same text: see `respelled`. Special tokens count anywhere in a text, and
        in the markup of a `Prompt`; nothing else is taken for them. Raises DataError without a
        tokenizer.
        """
        if self.tokenizer is None:
            raise DataError("a KV store that is to encode text needs the model's tokenizer")
        prompt = Prompt([markup(prompt)]) if isinstance(prompt, str) else prompt
        return self.respelled(self.tokenizer.encode_segments(prompt))

    def respelled(self, ids: Sequence[int]) -> list[int]:
        """Ids of the same text as a prompt's `ids`, as many as possible those of a stored prefix.

        They are `ids` themselves except where a history was sampled as other tokens: see
        `ds4mlx.store.spelling`. No text becomes a special token.
        """
        given: list[int] = keys.token_array(ids).tolist()
        if self.tokenizer is None or len(given) < 2:
            return given
        pieces = [self.tokenizer.token_bytes(token) for token in given]
        own = len(b"".join(pieces[: self.longest(given[:-1])]))
        for record in texts.matches(self._catalogue, self._fingerprint, b"".join(pieces[:-1])):
            if record.text_bytes <= own:
                break
            stored = restoring.read_tokens(self._catalogue, record)
            if stored is None:
                continue
            joined = spelling.joined(self.tokenizer, stored.tolist(), given)
            if joined is not None:
                return joined
        return given

    def _keep(self, cache: DecodeState, pin: Pin) -> None:
        """Keep the pinned chain from eviction as long as the state is alive."""
        old = self._pins.pop(cache, None)
        self._pins[cache] = pin
        weakref.finalize(cache, pin.close)
        if old is not None:
            old.close()


def _kind_of(model: HasKind | None, kind: StateKind | None) -> StateKind:
    """The one kind that is given. Raises DataError."""
    if kind is None and model is not None:
        return model.kind
    if kind is None or model is not None:
        raise DataError("a KV store needs a model, or the kind of its states, and not both")
    return kind
