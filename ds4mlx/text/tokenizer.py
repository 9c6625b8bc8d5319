"""Text to token ids and back, by `tokenizer.json`; and text from a growing list of tokens."""

import codecs
import re
from collections.abc import Iterable
from itertools import accumulate
from operator import index
from pathlib import Path

from tokenizers import Tokenizer as Encoder
from tokenizers import pre_tokenizers
from tokenizers.models import BPE

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.weights.directory import CONFIG


class Tokenizer:
    """The model's byte-level BPE. Special tokens in a text are recognised, and none is added
    unless asked for. `release` is its model's, which decides how conversations are encoded."""

    release = "april"

    def __init__(self, encoder: Encoder, bos_token_id: int, eos_token_id: int):
        self.encoder = encoder
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self._bytes = _byte_of_char()
        # Added tokens are spelled as they are, also where a letter could stand for a byte.
        added = encoder.get_added_tokens_decoder()
        self._added = {token: spelling.content.encode() for token, spelling in added.items()}
        specials = [s.content for s in added.values() if s.special or _is_mark(s.content)]
        self._special_ids = {s.content: token for token, s in added.items()}
        by_length = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` and `config.json` of a directory. Raises DataError.

        Without a `tokenizer.json` the model still works on token ids: see `NoTokenizer`.
        """
        file = Path(path) / "tokenizer.json"
        config = ModelConfig.from_file(Path(path) / CONFIG)
        if not file.is_file():
            return NoTokenizer(file, config.bos_token_id, config.eos_token_id)
        try:
            encoder = Encoder.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise DataError(f"{file}: not a tokenizer: {error}") from None
        if type(encoder.decoder).__name__ != "ByteLevel":
            raise DataError(f"{file}: only byte-level BPE is supported")
        last = max(encoder.get_vocab().values(), default=0)
        if last >= config.vocab_size:
            raise DataError(
                f"{file}: token id {last} is outside the vocabulary of {config.vocab_size}"
            )
        encoder.no_truncation()
        encoder.no_padding()
        tokenizer = cls(encoder, config.bos_token_id, config.eos_token_id)
        tokenizer.release = config.release
        return tokenizer

    @property
    def bos_token(self) -> str:
        """The token that a text begins with, spelled out."""
        return self.decode([self.bos_token_id])

    @property
    def eos_token(self) -> str:
        """The token that ends an answer, spelled out."""
        return self.decode([self.eos_token_id])

    @property
    def eos_token_ids(self) -> set[int]:
        """The tokens that end an answer: one, in a set as mlx-lm asks for them."""
        return {self.eos_token_id}

    def get_vocab(self) -> dict[str, int]:
        """Token id by spelling; the printable stand-ins of bytes where a token is no whole text."""
        return self.encoder.get_vocab()

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token by its spelling in `get_vocab`; None if there is none."""
        return self.encoder.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.encoder.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; with `add_special_tokens` behind a BOS, which it may have already.

        Raises DataError for half a surrogate pair, which is no text.
        """
        ids = self.encoder.encode(_checked(text), add_special_tokens=False).ids
        if add_special_tokens and ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *ids]
        return ids

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of a text in pieces; only in those that are marked a special token counts.

        Where no other piece holds one, the ids are those of `encode` of the pieces joined: text
        between two special tokens is split into words as a whole, wherever it comes from.
        Raises DataError for half a surrogate pair.
        """
        ids: list[int] = []
        run: list[str] = []
        for text, is_markup in segments:
            at = 0
            for special in self._special.finditer(text) if is_markup else ():
                ids += self._literal("".join([*run, text[at : special.start()]]))
                ids.append(self._special_ids[special[0]])
                run, at = [], special.end()
            run.append(text[at:])
        return ids + self._literal("".join(run))

    def special_places(self, ids: Iterable[int]) -> list[tuple[int, int]]:
        """The special tokens among these, each with the number of bytes before it."""
        places, at = [], 0
        for token in ids:
            spelling = self.token_bytes(token)
            if self._special_ids.get(spelling.decode(errors="replace")) == token:
                places.append((at, token))
            at += len(spelling)
        return places

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens spelled out; ids without a token give nothing.

        Raises DataError for what is no token id: a negative or huge number, or no whole number.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def _literal(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is special."""
        if not self._special.search(_checked(text)):
            return self.encoder.encode(text, add_special_tokens=False).ids
        if self.encoder.normalizer is not None:
            text = self.encoder.normalizer.normalize_str(text)
        splitter = self.encoder.pre_tokenizer
        words = splitter.pre_tokenize_str(text) if splitter is not None else [(text, None)]
        model = self.encoder.model
        return [token.id for word, _ in words for token in model.tokenize(word)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; they need not be whole characters.

        None for an id beyond the vocabulary, as a model's head may be wider than its tokenizer.
        Raises DataError for what is no token id.
        """
        try:
            token = index(token)
        except TypeError:
            raise DataError(f"{token!r:.80} is not a token id") from None
        if not 0 <= token < 1 << 32:
            raise DataError(f"{token} is not a token id")
        if token in self._added:
            return self._added[token]
        spelling = self.encoder.id_to_token(token) or ""
        if all(char in self._bytes for char in spelling):
            return bytes(self._bytes[char] for char in spelling)
        return spelling.encode()

    def is_added(self, token: int) -> bool:
        """Whether a token is a special one, which is recognised whole and merged with nothing."""
        return token in self._added

    def word_ends(self, text: bytes) -> list[int]:
        """Where the words of a text without special tokens end, in bytes; [] if it is not UTF-8.

        A word is what the tokenizer splits a text into first; no token reaches into two.
        """
        splitter = self.encoder.pre_tokenizer
        try:
            chars = text.decode()
        except UnicodeDecodeError:
            return []
        ends = [] if splitter is None else [end for _, (_, end) in splitter.pre_tokenize_str(chars)]
        sizes = [0, *accumulate(len(char.encode()) for char in chars)]
        return sorted({sizes[end] for end in [*ends, len(chars)]})

    def stream(self) -> "TextStream":
        """A new stream of text from tokens."""
        return TextStream(self)


def _checked(text: str) -> str:
    """Text that has a UTF-8 form; half a surrogate pair has none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text is not Unicode: {error.reason}") from None
    return text


def _is_mark(text: str) -> bool:
    """Whether an added token marks something, as files do not call all of these special."""
    return "｜" in text or (text.startswith("<") and text.endswith(">"))


class NoTokenizer(Tokenizer):
    """Stands in for one that a directory lacks: no text is encoded, token ids decode to nothing."""

    def __init__(self, file: Path, bos_token_id: int, eos_token_id: int):
        super().__init__(Encoder(BPE()), bos_token_id, eos_token_id)
        self._file = file

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        raise DataError(f"{self._file}: no such file, so text cannot be encoded")

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        return self.encode("")


class TextStream:
    """Text of tokens as they come; a character is given out once its last byte has come.

    What `add` gave so far and then `finish` is together `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that this token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What an unfinished character leaves."""
        return self._decoder.decode(b"", final=True)


def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE's printable stand-in of every byte, inverted.

    Printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    table = {chr(byte): byte for byte in own}
    table |= {chr(0x100 + place): byte for place, byte in enumerate(others)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table
