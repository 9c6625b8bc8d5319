"""Sequences of tokens from a file of prompts: plain text cut into pieces, or one prompt each.

Prompts stand in JSON lines, ours or ds4's `prompts.jsonl`, or behind ds4's marker lines.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ds4mlx.chat import encode_messages
from ds4mlx.config import ModelConfig
from ds4mlx.errors import DataError
from ds4mlx.text.tokenizer import Tokenizer

# Tokens of a sequence at most, unless told: of text as llama.cpp's imatrix tool, and of a line.
TEXT_LENGTH, LINE_LENGTH = 512, 4096
# Characters of text that are encoded at a time, up to the end of a line.
PIECE = 1 << 20
KINDS = ("prompt", "text", "messages")
# What else a line of each kind may say, and what in it says nothing to the model.
BESIDE = {
    "prompt": ("completion",),
    "text": (),
    "messages": ("thinking", "mode", "tools"),
    "rendered": ("messages", "mode", "thinking", "tools"),
}
LABELS = ("id", "category", "source", "name", "index", "metadata")
MODES = {"think": "high", "nothink": "none"}
MARKER = re.compile(r"^===== DS4_IMATRIX_PROMPT\b[^\n]*\n", re.MULTILINE)


def sequence_length(path: Path, length: int | None, config: ModelConfig) -> int:
    """`length`, or the file's kind's own. Raises DataError if the model cannot hold it."""
    longest = config.max_position_embeddings
    if length is None:
        whole = _has_lines(path) or (path.is_file() and _is_rendered(_text(path)))
        return min(LINE_LENGTH if whole else TEXT_LENGTH, longest)
    if not 2 <= length <= longest:
        raise DataError(f"a sequence must have 2 to {longest} tokens, not {length}")
    return length


def read_sequences(
    path: Path, tokenizer: Tokenizer, release: str, length: int, most: int | None = None
) -> list[np.ndarray]:
    """Sequences of at most `length` tokens, int32 (tokens,); each begins with the BOS token.

    A `.jsonl` file has one on each line, cut at `length`: {"prompt": TEXT}, with a "completion"
    behind it if wanted, or {"text": TEXT} as it is, or {"messages": [...]} with "thinking" and
    "tools" if wanted, in the chat encoding of `release`. ds4's lines are read too: "mode" is think
    or nothink, "dsml" of a message are its calls, and where there is a "rendered" text it is taken.
    A file that begins with ds4's marker line has a rendered prompt behind each. Any other file is
    text, every token of which comes into one sequence.
    most: tokens in all; what is over is left out.
    Raises DataError naming file and line for what is malformed, and for a file without prompts.
    """
    text = _text(path)
    if _has_lines(path):
        found = list(_of_lines(path, text, tokenizer, release, length))
    elif _is_rendered(text):
        found = list(_of_rendered(text, tokenizer, length))
    else:
        found = list(_of_text(text, tokenizer, length))
    kept = list(_limited(found, most))
    if not kept:
        raise DataError(f"{path}: holds no prompts")
    return kept


def _has_lines(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def _is_rendered(text: str) -> bool:
    return MARKER.match(text.lstrip()) is not None


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text: {error.reason}") from None


def _of_text(text: str, tokenizer: Tokenizer, length: int) -> Iterator[np.ndarray]:
    pieces = [np.array(_without_bos(tokenizer, piece), np.int32) for piece in _pieces(text)]
    ids, body = np.concatenate([np.zeros(0, np.int32), *pieces]), length - 1
    for start in range(0, len(ids), body):
        yield np.insert(ids[start : start + body], 0, tokenizer.bos_token_id)


def _pieces(text: str) -> Iterator[str]:
    """Runs of whole lines, as encoding takes hundreds of times the memory of its text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def _of_lines(
    path: Path, text: str, tokenizer: Tokenizer, release: str, length: int
) -> Iterator[np.ndarray]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            ids = _without_bos(tokenizer, _prompt(line, release))
            if not ids:
                raise DataError("the prompt is empty")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        yield np.array([tokenizer.bos_token_id, *ids][:length], np.int32)


def _of_rendered(text: str, tokenizer: Tokenizer, length: int) -> Iterator[np.ndarray]:
    for prompt in MARKER.split(text)[1:]:
        ids = _without_bos(tokenizer, prompt.removesuffix("\n\n"))
        if ids:
            yield np.array([tokenizer.bos_token_id, *ids][:length], np.int32)


def _without_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids


def _prompt(line: str, release: str) -> str:
    """The text of a JSON line."""
    value = _object(line)
    kind = _kind(value)
    for key in value:
        if key not in (kind, *BESIDE[kind], *LABELS):
            raise DataError(f"the key {key!r:.80} beside {kind} is not one that is read")
    if kind == "messages":
        return _encoded(value, release)
    for key in (kind, "completion"):
        if not isinstance(value.get(key, ""), str):
            raise DataError(f"{key} is not text")
    return value[kind] + value.get("completion", "")


def _kind(value: dict[str, Any]) -> str:
    kinds = [kind for kind in KINDS if kind in value]
    if "rendered" in value and set(kinds) <= {"messages"}:
        return "rendered"
    if len(kinds) != 1:
        raise DataError(
            f"expected one of {', '.join(KINDS)}, found {' and '.join(kinds) or 'none'}"
        )
    return kinds[0]


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}") from None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # huge numbers, deep nesting
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, inner in pairs:
        if key in value:
            raise DataError(f"the key {key!r:.80} is given twice")
        value[key] = inner
    return value


def _encoded(value: dict[str, Any], release: str) -> str:
    messages, thinking = value["messages"], value.get("thinking", "none")
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is not a list of messages")
    if not isinstance(thinking, str):
        raise DataError("thinking is not text")
    if "mode" in value:
        if "thinking" in value or value["mode"] not in list(MODES):
            raise DataError(f"mode must be think or nothink, and alone, not {value['mode']!r:.80}")
        thinking = MODES[value["mode"]]
    messages = [_with_calls(message, f"message {at}") for at, message in enumerate(messages)]
    return encode_messages(messages, thinking, value.get("tools"), release)


def _with_calls(message: Any, where: str) -> Any:
    """A message whose calls are its content's end, instead of markup under a key of its own."""
    if not isinstance(message, dict) or not message.get("dsml"):
        return message
    markup, content = message["dsml"], message.get("content") or ""
    if not isinstance(markup, str) or not isinstance(content, str):
        raise DataError(f"{where}: dsml and content must be text")
    if message.get("role") != "assistant" or message.get("tool_calls"):
        raise DataError(f"{where}: dsml belongs to an assistant message without tool_calls")
    return {key: inner for key, inner in message.items() if key != "dsml"} | {
        "content": content + markup
    }


def _limited(sequences: Iterable[np.ndarray], most: int | None) -> Iterator[np.ndarray]:
    left = most
    for sequence in sequences:
        kept = sequence[:left]
        if len(kept):
            yield kept
        if left is not None:
            left -= len(kept)
