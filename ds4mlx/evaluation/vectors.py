"""ds4's official vectors: greedy tokens of the hosted model for a few prompts, and how a model does.

The prompt is encoded without system text and without thinking. At each step the model's likeliest
token must have the official one's bytes, and every alternative with a log-probability must be
among the model's 20 likeliest, within 4 nats; then the model goes on with its own token. At
temperature 0 the API gives 0 to the chosen token and -9999 to all others: those say nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ds4mlx.chat import encode_messages
from ds4mlx.config import read_json
from ds4mlx.engine.generation import stream_generate
from ds4mlx.errors import DataError
from ds4mlx.evaluation.scoring import bar
from ds4mlx.model.model import Model
from ds4mlx.text.tokenizer import Tokenizer

TOP, TOLERANCE, UNKNOWN = 20, 4.0, -9999.0
SCHEMA, MANIFEST = "ds4-official-logprobs-v1", "ds4-test-vector-manifest-v1"
# Before the official index rounding was added to ds4 this one matched by chance; ds4 leaves it out.
SKIPPED_BY_DS4 = ("long_memory_archive",)


@dataclass(frozen=True)
class Step:
    """The official token's bytes, and the alternatives' with their log-probabilities."""

    token: bytes
    top: list[tuple[bytes, float]]


@dataclass(frozen=True)
class Case:
    """A prompt and the official answer's steps."""

    name: str
    prompt: str
    steps: list[Step]


@dataclass(frozen=True)
class Outcome:
    """A case's result: steps that matched, of how many; the answers as text."""

    name: str
    matched: int
    steps: int
    official: str
    answer: str
    skipped_by_ds4: bool


def run_vectors(model: Model, tokenizer: Tokenizer, cases: list[Case]) -> list[Outcome]:
    """Answer every case greedily and compare. Raises DataError for a prompt beyond the context."""
    found = []
    with bar("vectors", len(cases), "prompts") as progress:
        for case in cases:
            found.append(_compared(model, tokenizer, case))
            progress.update()
    return found


def _compared(model: Model, tokenizer: Tokenizer, case: Case) -> Outcome:
    messages = [{"role": "user", "content": case.prompt}]
    prompt = encode_messages(messages, thinking="none", release=model.args.release)
    try:
        responses = list(stream_generate(model, tokenizer, prompt, len(case.steps)))
    except DataError as error:
        raise DataError(f"{case.name}: {error}") from None
    matched, answered = 0, b""
    for step, response in zip(case.steps, responses, strict=False):
        token = tokenizer.token_bytes(response.token)
        answered += token
        matched += token == step.token and _near(step, response.logprobs, tokenizer)
    official = b"".join(step.token for step in case.steps).decode("utf-8", errors="replace")
    answer = answered.decode("utf-8", errors="replace")
    skipped = case.name in SKIPPED_BY_DS4
    return Outcome(case.name, matched, len(case.steps), official, answer, skipped)


def _near(step: Step, log_probs: mx.array, tokenizer: Tokenizer) -> bool:
    """Whether every alternative is among the likeliest, with about its log-probability."""
    likeliest: list[int] = mx.argsort(-log_probs)[:TOP].tolist()  # type: ignore[assignment]
    ours = {tokenizer.token_bytes(token): log_probs[token].item() for token in likeliest}
    known = [(token, value) for token, value in step.top if value > UNKNOWN]
    return all(
        token in ours and abs(float(ours[token]) - value) <= TOLERANCE  # type: ignore[arg-type]
        for token, value in known
    )


def read_vectors(path: Path) -> list[Case]:
    """The cases of a `.vec` file, of one `.official.json`, or of a `manifest.json`.

    Raises DataError naming file and line for what is malformed, or for a missing prompt file.
    """
    if path.suffix == ".json":
        return _from_json(path)
    cases = list(_from_vec(path))
    if not cases:
        raise DataError(f"{path}: holds no cases")
    return cases


def _from_json(path: Path) -> list[Case]:
    values = read_json(path)
    try:
        if values.get("schema") == MANIFEST:
            listed = [path.parent / each["official_file"] for each in values["prompts"]]
            return [case for file in listed for case in _from_json(file)]
        if values.get("schema") != SCHEMA:
            raise DataError(f"{path}: its schema is neither {SCHEMA} nor {MANIFEST}")
        steps = [_json_step(step) for step in values["steps"]]
        return [Case(str(values["id"]), _text(values["prompt"]), steps)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not vectors: {type(error).__name__} {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("the prompt is not text")
    return value


def _json_step(step: dict[str, Any]) -> Step:
    top = [(bytes(t["token"]["bytes"]), float(t["logprob"])) for t in step["top_logprobs"]]
    return Step(bytes(step["token"]["bytes"]), top)


def _from_vec(path: Path) -> Iterator[Case]:
    """Cases of the line format: case, then step and top lines, then end."""
    name, prompt, steps = "", "", []
    for number, line in enumerate(_lines(path), 1):
        match line.split():
            case [] | ["#", *_]:
                pass
            case ["case", found, _, _, file] if not name:
                name, prompt, steps = found, _prompt(path, number, file), []
            case ["step", _, token, _] if name:
                steps.append(Step(_bytes(path, number, token), []))
            case ["top", token, value] if steps:
                steps[-1].top.append((_bytes(path, number, token), _number(path, number, value)))
            case ["end"] if steps:
                yield Case(name, prompt, steps)
                name, prompt, steps = "", "", []
            case _:
                raise DataError(f"{path}:{number}: not a line of a vector file")
    if name:
        raise DataError(f"{path}: ends inside case {name}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason}") from None


def _prompt(path: Path, number: int, named: str) -> str:
    """The prompt's text; its file is named from ds4's root, so it is looked for beside, too."""
    places = [path.parent / named, path.parent / "prompts" / Path(named).name]
    for place in places:
        if place.is_file():
            return "\n".join(_lines(place))
    raise DataError(f"{path}:{number}: there is no prompt file {places[1]}")


def _bytes(path: Path, number: int, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise DataError(f"{path}:{number}: {text!r:.40} is not hexadecimal") from None


def _number(path: Path, number: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{path}:{number}: {text!r:.40} is not a number") from None
