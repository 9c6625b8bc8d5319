"""The command that measures a model: perplexity, agreement, recall, tool calls, official vectors."""

import json
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import mlx.core as mx
import typer

from ds4mlx import FAST_BLAS
from ds4mlx.cli import arguments as arg
from ds4mlx.cli.terminal import progress
from ds4mlx.engine.default_model import default_model
from ds4mlx.engine.load import load, locate
from ds4mlx.weights.directory import ModelDirectory

TYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


class Part(StrEnum):
    """The parts that need nothing but the model."""

    PERPLEXITY = "perplexity"
    RECALL = "recall"
    TOOLS = "tools"


def evaluate(
    model: arg.Model = None,
    text: Annotated[
        Path | None, typer.Option(help="Text for perplexity; default: held-out Python.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Model directory or saved logits to compare with.")
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="ds4's official vectors: .vec, .official.json, manifest.")
    ] = None,
    part: Annotated[
        list[Part] | None, typer.Option(help="Run only this part; may be repeated.")
    ] = None,
    save_logits: Annotated[
        Path | None, typer.Option(help="Write logits on the text, for --reference.")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option(min=8, help="Context; default: the trained one, at most 8192.")
    ] = None,
    scale: Annotated[
        float, typer.Option(min=0.01, max=100, help="Multiply the numbers of samples.")
    ] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Type of the activations.")
    ] = "float32",
    rounding: Annotated[
        Literal["official", "none"], typer.Option(help="The model's own FP8 and FP4 roundings.")
    ] = "official",
    as_json: arg.Json = False,
) -> None:
    """Measure a model: perplexity by depth, recall by distance, tool calls.

    With --text only the perplexity of that text; with --reference KL divergence and top-1 agreement,
    on the tokens of saved logits or, for a model directory, on the text; with --vectors only those.
    Saved logits: safetensors with tokens (T,) or (B, T), and logits or NAME.logits (..., vocabulary).
    """
    from ds4mlx.evaluation import suite

    if mx.default_device() == mx.cpu and not FAST_BLAS and sys.stderr.isatty():
        print("note: several times slower without OpenBLAS (package libopenblas0)", file=sys.stderr)
    path = locate(model or default_model())
    directory = ModelDirectory.open(path)
    opened = partial(open_to_measure, dtype=dtype, rounding=rounding)
    subject = suite.Subject(*opened(path), suite.Sizes(ctx, scale))
    report = suite.Report(str(path), directory.recipe, dtype, rounding)
    asked = any(option is not None for option in (text, reference, vectors, save_logits))
    parts = part or ([] if asked else list(Part))
    if "perplexity" in parts or (text is not None and reference is None and save_logits is None):
        suite.measure_text(report, subject, text)
    if reference is not None:
        suite.measure_agreement(report, subject, reference, text, opened)
    suite.measure_tasks(report, subject, parts)
    if vectors is not None:
        suite.measure_vectors(report, subject, vectors)
    if save_logits is not None:
        suite.save(report, subject, text, save_logits)
    print(json.dumps(report.as_dict(), indent=1) if as_json else report)


def open_to_measure(path: Path, dtype: str, rounding: Literal["official", "none"]):
    """A model to measure; on a CPU its weights are decoded once, if it is small."""
    from ds4mlx.evaluation.weights import decode_weights

    on_file = partial(progress, "loading", "files")
    model, tokenizer = load(path, TYPES[dtype], rounding, on_file=on_file)
    if mx.default_device() == mx.cpu:
        decode_weights(model)
    return model, tokenizer
