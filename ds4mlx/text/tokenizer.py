"""Text to token ids and back, by `tokenizer.json`; and text from a growing list of tokens."""

import codecs
from pathlib import Path

from tokenizers import Tokenizer as Encoder
from tokenizers import pre_tokenizers
from tokenizers.models import BPE

from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.weights.directory import CONFIG


class Tokenizer:
    """The model's byte-level BPE. Special tokens in a text are recognised; none is ever added."""

    def __init__(self, encoder: Encoder, bos_token_id: int, eos_token_id: int):
        self.encoder = encoder
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self._bytes = _byte_of_char()
        # Added tokens are spelled as they are, also where a letter could stand for a byte.
        added = encoder.get_added_tokens_decoder()
        self._added = {token: spelling.content.encode() for token, spelling in added.items()}

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
        return cls(encoder, config.bos_token_id, config.eos_token_id)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.encoder.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises DataError for half a surrogate pair, which is no text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not Unicode: {error.reason}") from None
        return self.encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens spelled out; ids without a token give nothing."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; they need not be whole characters."""
        if token in self._added:
            return self._added[token]
        spelling = self.encoder.id_to_token(token) or ""
        if all(char in self._bytes for char in spelling):
            return bytes(self._bytes[char] for char in spelling)
        return spelling.encode()

    def stream(self) -> "TextStream":
        """A new stream of text from tokens."""
        return TextStream(self)


class NoTokenizer(Tokenizer):
    """Stands in for one that a directory lacks: no text is encoded, token ids decode to nothing."""

    def __init__(self, file: Path, bos_token_id: int, eos_token_id: int):
        super().__init__(Encoder(BPE()), bos_token_id, eos_token_id)
        self._file = file

    def encode(self, text: str) -> list[int]:
        raise DataError(f"{self._file}: no such file, so text cannot be encoded")


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
