"""The command that measures a model: perplexity, agreement, recall, tool calls, official vectors."""

import json
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from ds4mlx import blas
from ds4mlx.cli import arguments as arg
from ds4mlx.cli import opening
from ds4mlx.cli.terminal import progress


class Part(StrEnum):
    """The parts that need nothing but the model."""

    PERPLEXITY = "perplexity"
    RECALL = "recall"
    TOOLS = "tools"


def evaluate(
    model: arg.Model = None,
    adapter: arg.Adapter = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text to measure the perplexity of; by default held-out Python."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="A model directory, or a file of saved logits, to compare with."),
    ] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(help="A file of ds4's official vectors: .vec, .official.json or a manifest."),
    ] = None,
    part: Annotated[
        list[Part] | None, typer.Option(help="Run only this part; may be repeated.")
    ] = None,
    save_logits: Annotated[
        Path | None,
        typer.Option(help="Write the logits on the text to a file that --reference takes."),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(min=8, help="The context; by default the trained one, at most 8192 tokens."),
    ] = None,
    scale: Annotated[
        float, typer.Option(min=0.01, max=100, help="Multiply the numbers of samples by this.")
    ] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="The type of the activations.")
    ] = "float32",
    rounding: Annotated[
        Literal["official", "none"],
        typer.Option(help="Round as the model itself does, to FP8 and FP4, or not."),
    ] = "official",
    as_json: arg.Json = False,
) -> None:
    """Measure a model: its perplexity by depth, its recall by distance, and its tool calls.

    \b
    ds4mlx eval -m ~/models/v4-flash --text book.txt --json
    ds4mlx eval -m ~/models/v4-flash-q2 --reference ~/models/v4-flash

    With --text only the perplexity of that text is measured. With --reference it is the KL
    divergence and the top-1 agreement, on the tokens of saved logits or, for a model directory, on
    the text. With --vectors it is the agreement with the official answers in those files.
    A file of saved logits is a safetensors file with tokens, (T,) or (B, T), and logits or
    NAME.logits, (..., vocabulary).
    """
    blas.use_openblas(unasked=True)
    import mlx.core as mx

    from ds4mlx.evaluation import suite
    from ds4mlx.weights.directory import ModelDirectory

    if mx.default_device() == mx.cpu and not blas.is_fast() and sys.stderr.isatty():
        print("note: several times slower without OpenBLAS (package libopenblas0)", file=sys.stderr)
    arg.spare(save_logits, text, reference, vectors)
    arg.check_output(save_logits)
    path = opening.find_model(model)
    directory = ModelDirectory.open(path)
    opened = partial(open_to_measure, dtype=dtype, rounding=rounding)
    subject = suite.Subject(*opened(path, adapter=adapter), suite.Sizes(ctx, scale))
    opening.announce(model)
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


def sensitivity(
    prompts: Annotated[
        Path, typer.Option("--prompts", help="Text, or .jsonl with prompt, text or messages.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    model: arg.Model = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens in all.")] = 1024,
    ctx: Annotated[int, typer.Option(min=2, help="Longest sequence, in tokens.")] = 512,
) -> None:
    """Measure how much the routed experts of each layer matter, for convert --sensitivity.

    Reads the prompts once as they are, and twice for every layer with noise on its experts' products.

    \b
    ds4mlx sensitivity -m ~/models/v4-q2 --prompts calibration.jsonl -o v4.sensitivity.json
    """
    blas.use_openblas(unasked=True)
    import mlx.core as mx

    from ds4mlx.convert.sensitivity import write_sensitivity
    from ds4mlx.evaluation.sensitivity import sensitivities
    from ds4mlx.text.prompts import read_sequences
    from ds4mlx.text.tokenizer import Tokenizer
    from ds4mlx.weights.directory import ModelDirectory

    arg.spare(output, prompts)
    arg.check_output(output)
    found = ModelDirectory.open(opening.find_model(model))
    tokenizer, release = Tokenizer.from_dir(found.path), found.config.release
    sequences = [s.tolist() for s in read_sequences(prompts, tokenizer, release, ctx, max_tokens)]
    opening.announce(model)
    dtype = "float32" if mx.default_device() == mx.cpu else "bfloat16"
    measured = sensitivities(open_to_measure(found.path, dtype, "official")[0], sequences)
    tokens = sum(map(len, sequences))
    pairs = {place: (mean.value, mean.standard_error) for place, mean in measured.items()}
    write_sensitivity(output, pairs, tokens)
    print(f"{output}: {len(pairs)} places, {tokens:,} tokens", file=sys.stderr)


def open_to_measure(
    path: Path, dtype: str, rounding: Literal["official", "none"], adapter: Path | None = None
):
    """A model to measure; on a CPU its weights are decoded once, if it is small."""
    import mlx.core as mx

    from ds4mlx.engine.load import load
    from ds4mlx.evaluation.weights import decode_weights

    on_file = partial(progress, "loading", "files")
    model, tokenizer = load(path, getattr(mx, dtype), rounding, adapter=adapter, on_file=on_file)
    if mx.default_device() == mx.cpu:
        decode_weights(model)
    return model, tokenizer
