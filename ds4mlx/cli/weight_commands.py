"""The commands that make and check weights: convert, merge, verify, inspect, imatrix."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ds4mlx.cli import arguments as arg
from ds4mlx.cli import opening

GOES_ON = "interrupted; the same command goes on from here"


def convert(
    src: Annotated[str, typer.Argument(help="Official directory, hub repo id, or GGUF file.")],
    dst: Annotated[Path, typer.Argument(help="Model directory to write.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="official (default), q2, q2-q4, q2-auto, q4, bf16 or f32; for GGUF only keep."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importances for q2, q2-q4, q2-auto and q4: .dat or GGUF.")
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(help="Second moments for the same: see imatrix --moments."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="For q2-auto: the bytes that all weights may take, such as 110GB."),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="For --budget: how much layers matter, from ds4mlx sensitivity."),
    ] = None,
    choice: Annotated[
        Path | None,
        typer.Option(help="For q2-auto: the choice.json of an earlier conversion, to follow."),
    ] = None,
    mtp: Annotated[
        Path | None, typer.Option(help="GGUF file with the MTP block of a GGUF source.")
    ] = None,
    release: Annotated[
        Literal["april", "0731"] | None, typer.Option(help="Where the source does not say.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Largest chunk held in memory, such as 64M.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    keep_download: Annotated[
        bool, typer.Option("--keep-download", help="Leave downloads in the hub's cache.")
    ] = False,
) -> None:
    """Convert weights to a model directory; goes on where it was interrupted.

    In every recipe but bf16 and f32 all tensors other than the routed experts keep the source's values
    bit for bit. Routed experts: official and keep, the source's values; q2, gate and up IQ2_XXS, down
    Q2_K; q2-q4, the same but Q4_K in the last 6 layers; q2-auto, as q2 with better formats where they
    help most within a --budget, or as a --choice says; q4, Q4_K. --dry-run lists it for a source.

    \b
    ds4mlx convert deepseek-ai/DeepSeek-V4-Flash ~/models/v4-q2 --recipe q2
    """
    from ds4mlx.convert import convert as run
    from ds4mlx.convert.choosing import Wanted
    from ds4mlx.convert.recipes import RECIPES

    if recipe not in (None, *RECIPES):
        raise typer.BadParameter(
            f"{recipe!r} is not one of {', '.join(RECIPES)}", param_hint="--recipe"
        )
    limit, most = (None if text is None else arg.size(text) for text in (max_memory, budget))
    with arg.checked():
        Wanted(most, sensitivity, choice).check(recipe)
    try:
        plan = run(
            src,
            dst,
            recipe,
            imatrix=imatrix,
            moments=moments,
            mtp=mtp,
            budget=most,
            sensitivity=sensitivity,
            choice=choice,
            release=release,
            max_memory=limit,
            dry_run=dry_run,
            overwrite=overwrite,
            keep_download=keep_download,
        )
    except KeyboardInterrupt:
        print(GOES_ON, file=sys.stderr)
        raise typer.Exit(130) from None
    if dry_run:
        print(plan)


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of the adapter.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Model directory to write.")],
    model: arg.Model = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a model directory with an adapter (LoRA) merged in; goes on where it was interrupted.

    Adapted matrices that are stored as codes become bfloat16; all other weights keep their bytes.

    \b
    ds4mlx merge adapter ~/models/v4-mine -m ~/models/v4-q2
    """
    from ds4mlx.convert import merge as run

    try:
        run(opening.find_model(model), adapter, dst, overwrite=overwrite)
    except KeyboardInterrupt:
        print(GOES_ON, file=sys.stderr)
        raise typer.Exit(130) from None


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Model directory.")],
    against: Annotated[str | None, typer.Option(help="Source to compare every value with.")] = None,
    mtp: Annotated[
        Path | None, typer.Option(help="GGUF file with the MTP block, as for convert.")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print a line a weight.")] = False,
    as_json: arg.Json = False,
) -> None:
    """Check every byte of a model directory, and every value against its source.

    \b
    ds4mlx verify ~/models/v4-q2 --against deepseek-ai/DeepSeek-V4-Flash
    """
    from ds4mlx.convert import verify as run
    from ds4mlx.convert.verification import summary, verdict

    if mtp is not None and against is None:
        raise typer.BadParameter("is part of a source, which --against names", param_hint="--mtp")
    checked = run(directory, against, mtp=mtp)
    if as_json:
        print(json.dumps([vars(each) for each in checked], indent=1))
        verdict(checked, directory, against)
        return
    print(summary(checked, tensors))
    print(verdict(checked, directory, against))


def inspect(
    location: Annotated[str, typer.Argument(metavar="SRC_OR_DIR")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every weight.")] = False,
    ctx: Annotated[
        int | None, typer.Option(min=1, help="Show the memory for so many tokens only.")
    ] = None,
    as_json: arg.Json = False,
) -> None:
    """Show the sizes of a source or a model directory, and the memory that contexts take.

    At the end comes what fits into the memory of this machine, computed without loading anything.

    \b
    ds4mlx inspect ~/models/v4-q2 --ctx 100000
    """
    from ds4mlx.config import ModelConfig
    from ds4mlx.convert import inspect as run
    from ds4mlx.engine import room

    found = run(location, tensors, None if ctx is None else [ctx])
    contexts = list(found.state_bytes)
    config = ModelConfig.model_validate(found.config)
    planned = room.plan(config, sum(found.bytes_by_component.values()), saving=True)
    if as_json:
        print(json.dumps(found.as_dict() | {"memory": planned.as_dict(contexts)}, indent=1))
    else:
        print(f"{found}\n\n{planned.text(contexts)}")


def imatrix(
    prompts: Annotated[
        Path, typer.Option("--prompts", help="Text, or .jsonl with prompt, text or messages.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="GGUF imatrix to write.")],
    model: arg.Model = None,
    moments: Annotated[
        Path | None, typer.Option(help="Also write second moments here, for convert --moments.")
    ] = None,
    per_expert: Annotated[
        bool | None,
        typer.Option(help="In them, also each expert's own for down; default: if at most 4 GiB."),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(min=2, help="Longest sequence, in tokens; default: text 512, .jsonl 4096."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in all.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Collect which columns of the routed experts matter, for convert --imatrix.

    Runs the model over the prompts; goes on where it was interrupted. Text is cut into sequences of
    --ctx tokens; a .jsonl file has one sequence a line: {"prompt": TEXT}, {"text": TEXT}, or
    {"messages": [...]} with "thinking" and "tools" if wanted.

    \b
    ds4mlx imatrix -m ~/models/v4-flash --prompts prompts.jsonl -o importances.gguf
    """
    from ds4mlx.imatrix.collect import collect

    if per_expert is not None and moments is None:
        raise typer.BadParameter("is a part of --moments", param_hint="--per-expert")
    arg.spare(output, prompts)
    arg.spare(moments, prompts)
    try:
        path = opening.find_model(model)
        opening.announce(model)
        report = collect(
            path,
            prompts,
            output,
            lambda: opening.open_model(str(path), generates=False)[0],
            moments=moments,
            per_expert=per_expert,
            length=ctx,
            max_tokens=max_tokens,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        print(GOES_ON, file=sys.stderr)
        raise typer.Exit(130) from None
    print(report or f"{output}: already complete", file=sys.stderr)
