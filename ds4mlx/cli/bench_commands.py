"""The commands that measure: bench, and synth, which makes models of the real shapes to measure."""

import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import mlx.core as mx
import typer

from ds4mlx.bench.whole_model import bench as bench_model
from ds4mlx.bench.whole_model import csv_text
from ds4mlx.bench.whole_model import table as model_table
from ds4mlx.cli import arguments as arg
from ds4mlx.cli.terminal import progress
from ds4mlx.custom_kernels import dispatch
from ds4mlx.model.model import Model

Prompt = Annotated[str, typer.Option("--prompt", help="Depths in tokens, such as 512,2048.")]
Gen = Annotated[int, typer.Option("--gen", min=1, help="Tokens decoded at each depth.")]
Fill = Annotated[
    Literal["real", "synthetic"],
    typer.Option("--fill", help="Prefill the depth, or start from random rows."),
]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the rows to a file.")]
Plain = Annotated[bool, typer.Option("--plain", help="Without kernels: MLX's own operations only.")]


def bench(
    model: arg.Model = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Each kernel alone, against its rivals.")
    ] = False,
    prompt: Prompt = "512,2048",
    gen: Gen = 32,
    fill: Fill = "real",
    as_json: arg.Json = False,
    csv: Csv = None,
    plain: Plain = False,
) -> None:
    """Measure prefill and decode speed at depths, or with --kernels each kernel on this device."""
    depths = _depths(prompt)
    if kernels:
        return _kernels(as_json)
    loaded, _ = arg.open_model(model)
    return _report(loaded, depths, gen, fill, as_json, csv, plain)


def synth(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Model directory to write.")
    ] = None,
    like: Annotated[Literal["flash", "pro"], typer.Option(help="Whose shapes.")] = "flash",
    recipe: Annotated[
        str, typer.Option(help="official, q2, q2-q4, q4, or keep: as ds4's q2 GGUF file.")
    ] = "q2",
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many layers.")] = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Write nothing; measure it with --bench.")
    ] = False,
    bench: Annotated[bool, typer.Option("--bench", help="Measure the model in memory.")] = False,
    prompt: Prompt = "512,2048",
    gen: Gen = 32,
    fill: Fill = "real",
    as_json: arg.Json = False,
    csv: Csv = None,
    plain: Plain = False,
) -> None:
    """Make a model of the real shapes with random weights, on the device itself."""
    from ds4mlx.bench.synth import check_recipe, config_like, synth_model
    from ds4mlx.bench.synth_directory import write_synth

    if in_memory == (directory is not None):
        raise typer.BadParameter("give either DIR or --in-memory")
    if bench and not in_memory:
        raise typer.BadParameter("--bench measures a model that is made --in-memory")
    depths = _depths(prompt)
    with arg.checked():
        check_recipe(recipe)
        config = config_like(like, layers)
    begun = time.perf_counter()
    if directory is not None:
        written = write_synth(config, recipe, directory, partial(progress, "writing", "files"))
        typer.echo(f"{directory}: {written:,} bytes of weights", err=True)
        return
    on_cpu = mx.default_device() == mx.cpu
    dtype = mx.float32 if on_cpu else mx.bfloat16
    model = synth_model(config, recipe, dtype, partial(progress, "making", "weights"))
    seconds, held = time.perf_counter() - begun, mx.get_active_memory() / 1e9
    note = f"{like}, {config.num_hidden_layers} layers, {recipe}: {held:.2f} GB in {seconds:.1f} s"
    typer.echo(note, err=True)
    if bench:
        _report(model, depths, gen, fill, as_json, csv, plain)
    return


def _depths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of depths such as 512,2048")
    return [int(part) for part in parts]


def _kernels(as_json: bool) -> None:
    from ds4mlx.bench.kernels import bench as measure
    from ds4mlx.bench.kernels import table

    found = measure(partial(typer.echo, err=True))
    print(json.dumps(found, indent=1) if as_json else table(found))


def _report(
    model: Model, depths: list[int], gen: int, fill, as_json: bool, csv: Path | None, plain: bool
) -> None:
    way = dispatch.plain_operations() if plain else nullcontext()
    with way:
        rows = bench_model(model, depths, gen, fill, partial(typer.echo, err=True))
    if csv is not None:
        csv.write_text(csv_text(rows))
    if as_json:
        device = str(mx.device_info()["device_name"]) if mx.default_device() == mx.gpu else "cpu"
        used = not plain and dispatch.in_use()
        about = {"device": device, "mlx": version("mlx"), "kernels": used, "fill": fill}
        print(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(model_table(rows))
