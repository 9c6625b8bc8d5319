"""The commands that measure: bench, and synth, which makes models of the real shapes to measure."""

from __future__ import annotations

import json
import re
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ds4mlx.cli import arguments as arg
from ds4mlx.cli import opening
from ds4mlx.cli.terminal import note, progress

if TYPE_CHECKING:
    from ds4mlx.config import ModelConfig
    from ds4mlx.model.model import Model
    from ds4mlx.text.tokenizer import Tokenizer

Prompt = Annotated[
    str, typer.Option("--prompt", help="The depths to measure at, in tokens, such as 512,2048.")
]
Gen = Annotated[int, typer.Option("--gen", min=1, help="The tokens decoded at each depth.")]
Ctx = Annotated[
    int | None,
    typer.Option("--ctx", min=1, help="The longest context; by default the model's own."),
]
Fill = Annotated[
    Literal["real", "synthetic", "mixed"],
    typer.Option(
        "--fill",
        help="Prefill each depth, or only a chunk that ends there, after random rows; mixed: the "
        "former up to 65,536 tokens.",
    ),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the rows to a CSV file too.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="Draw tokens a second against depth, as an SVG file.")
]
Batch = Annotated[
    int, typer.Option("--batch", min=1, max=8, help="The sequences decoded at once, of one depth.")
]
Draft = Annotated[
    int | None,
    typer.Option(
        "--draft",
        min=1,
        max=3,
        help="Also decode Python code with up to N drafts a step, and count how many are accepted.",
    ),
]
Target = Annotated[
    Literal["metal", "cuda"] | None,
    typer.Option(
        "--count-for",
        help="For which GPUs launches are counted; by default for this machine's, else for Metal.",
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Use MLX's own operations only, and no kernels.")
]


@dataclass(frozen=True)
class Measurement:
    """What is measured of a model, and how it is printed."""

    depths: list[int]
    gen: int
    ctx: int | None
    fill: Literal["real", "synthetic", "mixed"]
    as_json: bool
    csv: Path | None
    plain: bool
    plot: Path | None
    batch: int
    target: Literal["metal", "cuda"] | None
    drafts: int | None = None

    def __post_init__(self) -> None:
        if self.plot is not None and self.plot.suffix != ".svg":
            raise typer.BadParameter(f"{self.plot} does not end in .svg", param_hint="--plot")
        if self.drafts and (self.batch > 1 or self.fill == "synthetic"):
            raise typer.BadParameter(
                "drafts need a text that was read, of one sequence", param_hint="--draft"
            )


def bench(
    model: arg.Model = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Measure each kernel alone, against its rivals, instead."),
    ] = False,
    prompt: Prompt = "512,2048",
    gen: Gen = 32,
    ctx: Ctx = None,
    fill: Fill = "real",
    as_json: arg.Json = False,
    csv: Csv = None,
    plain: Plain = False,
    plot: Plot = None,
    batch: Batch = 1,
    count_for: Target = None,
    draft: Draft = None,
    adapter: arg.Adapter = None,
) -> None:
    """Measure how fast a model prefills and decodes at several depths, and what a token costs.

    The costs are memory, the launches of a step, by kernel, the bytes it reads by arithmetic and those
    that it moves, and how much of what the device can read in that time the former are.

    \b
    ds4mlx bench -m ~/models/v4-flash --prompt 512,8192 --gen 64 --json
    ds4mlx bench -m ~/models/v4-flash --batch 4 --plot speed.svg
    ds4mlx bench --kernels
    """
    depths = _depths(prompt)
    if kernels:
        return _kernels(as_json)
    from ds4mlx.bench.whole_model import check_room
    from ds4mlx.weights.directory import ModelDirectory

    asked = Measurement(depths, gen, ctx, fill, as_json, csv, plain, plot, batch, count_for, draft)
    arg.check_output(csv)
    arg.check_output(plot)
    directory = ModelDirectory.open(opening.find_model(model))
    weights = sum(file.stat().st_size for file in directory.files)
    tokens = gen + 4 * (draft or 0)  # rounds may begin and end beyond what is measured
    check_room(directory.config, max(depths), tokens, ctx, weights, batch)
    return _report(*opening.open_model(model, adapter=adapter), asked)


def synth(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The model directory to write.")
    ] = None,
    like: Annotated[
        Literal["flash", "pro"], typer.Option(help="The model whose shapes it has.")
    ] = "flash",
    recipe: Annotated[
        str,
        typer.Option(
            help="official, q2, q2-q4, q4, or keep, which stands for the formats of ds4's q2 file."
        ),
    ] = "q2",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Make only the first so many layers.")
    ] = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Write nothing; --bench measures the model.")
    ] = False,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure the model in memory as `ds4mlx bench` does.")
    ] = False,
    prompt: Prompt = "512,2048",
    gen: Gen = 32,
    ctx: Ctx = None,
    fill: Fill = "real",
    as_json: arg.Json = False,
    csv: Csv = None,
    plain: Plain = False,
    plot: Plot = None,
    batch: Batch = 1,
    count_for: Target = None,
) -> None:
    """Make a model of the real shapes with random weights, which answers nothing, to measure it.

    \b
    ds4mlx synth --like flash --layers 4 --in-memory --bench --prompt 2048

    A model that is larger than the memory, or than the free disk, is refused before it is begun.
    """
    if in_memory == (directory is not None):
        raise typer.BadParameter("give either DIR or --in-memory")
    if bench and not in_memory:
        raise typer.BadParameter("--bench measures a model that is made --in-memory")
    asked = Measurement(
        _depths(prompt), gen, ctx, fill, as_json, csv, plain, plot, batch, count_for
    )
    arg.check_output(csv)
    arg.check_output(plot)

    from ds4mlx.bench.synth import check_recipe, config_like
    from ds4mlx.bench.synth_directory import write_synth

    with arg.checked():
        check_recipe(recipe)
        config = config_like(like, layers)
    if directory is not None:
        written = write_synth(config, recipe, directory, partial(progress, "writing", "files"))
        return note(f"{directory}: {written:,} bytes of weights")
    model = _in_memory(config, recipe, asked if bench else None, like)
    return _report(model, None, asked) if bench else None


def _in_memory(config: ModelConfig, recipe: str, asked: Measurement | None, like: str) -> Model:
    """The model, made once it is known to fit with what is to be measured of it."""
    import mlx.core as mx

    from ds4mlx.bench.synth import check_memory, synth_model, weight_bytes
    from ds4mlx.bench.whole_model import check_room
    from ds4mlx.submission import submit_by_number

    check_memory(config, recipe)
    if asked is not None:
        check_room(
            config,
            max(asked.depths),
            asked.gen,
            asked.ctx,
            weight_bytes(config, recipe),
            asked.batch,
        )
    begun = time.perf_counter()
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    submit_by_number()
    model = synth_model(config, recipe, dtype, partial(progress, "making", "weights"))
    seconds, size = time.perf_counter() - begun, mx.get_active_memory() / 1e9
    layers = config.num_hidden_layers
    note(f"{like}, {layers} layers, {recipe}: {size:.2f} GB in {seconds:.1f} s")
    return model


def _depths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,15}", part) and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{text!r} is not a list of depths such as 512,2048", param_hint="--prompt"
        )
    return [int(part) for part in parts]


def _kernels(as_json: bool) -> None:
    from ds4mlx.bench.kernels import bench as measure
    from ds4mlx.bench.kernels import table

    figures = measure(note)
    print(json.dumps(figures, indent=1) if as_json else table(figures))


def _report(model: Model, tokenizer: Tokenizer | None, asked: Measurement) -> None:
    import mlx.core as mx

    from ds4mlx.bench.drafting import Drafting
    from ds4mlx.bench.kernels import readable_bandwidth
    from ds4mlx.bench.tables import csv_text, plot_text, table
    from ds4mlx.bench.whole_model import Asked
    from ds4mlx.bench.whole_model import bench as measure
    from ds4mlx.custom_kernels import dialect, dispatch

    read, here = readable_bandwidth(), dialect.target()
    target = None if asked.plain else asked.target or here or "metal"
    drafting = None
    if asked.drafts and tokenizer is not None:
        drafting = Drafting(model, tokenizer, asked.drafts)
    wanted = Asked(asked.gen, asked.fill, asked.batch, target, read, drafting)
    with dispatch.plain_operations() if asked.plain else nullcontext():
        rows = measure(model, asked.depths, wanted, note)
    device = str(mx.device_info()["device_name"]) if mx.default_device() == mx.gpu else "cpu"
    used = not asked.plain and dispatch.in_use()
    for path, text in ((asked.csv, csv_text), (asked.plot, partial(plot_text, title=device))):
        with arg.output(path) as file:
            if file is not None:
                file.write(text(rows))
    if asked.as_json:
        about = {"device": device, "mlx": version("mlx"), "kernels": used, "fill": asked.fill}
        about["read_gb_per_s"] = None if read is None else round(read / 1e9, 1)
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(table(rows))
