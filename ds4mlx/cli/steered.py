"""The options that steer a model, for all commands that have it write."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ds4mlx.cli import arguments as arg
from ds4mlx.cli import opening
from ds4mlx.cli.terminal import note

if TYPE_CHECKING:
    from ds4mlx.model.model import Model
    from ds4mlx.research import Steering

# What is entered with the loaded model, and holds inside.
Steered = Callable[["Model"], contextlib.AbstractContextManager[None]]
OPTIONS = {"operation": "--steer-operation ", "site": "--steer-site "}

File = Annotated[
    Path | None,
    typer.Option(
        "--steer",
        metavar="FILE",
        help="Steer the model by the directions in a file: our own, ds4's or llama.cpp's.",
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        "--steer-scale", help="How much; by default as the file says, or 1. 0 is not at all."
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--steer-layers", metavar="A-B", help="In these layers only, from 0; both included."
    ),
]
Operation = Annotated[
    Literal["add", "project"] | None,
    typer.Option(
        "--steer-operation",
        help="Add the directions or project them out, where the file does not say.",
    ),
]
Site = Annotated[
    str | None,
    typer.Option(
        "--steer-site",
        help="Where they are added or projected out, such as ffn.out, where the file does not say.",
    ),
]


def steered(
    named: str | None,
    file: Path | None,
    scale: float | None,
    layers: str | None,
    operation: str | None,
    site: str | None,
) -> Steered:
    """How a model is to be steered, read and checked before the model is loaded.

    named: the model. Raises DataError for the file, and wrong usage for the options.
    """
    if file is None:
        given = {"--steer-scale": scale, "--steer-layers": layers}
        given |= {"--steer-operation": operation, "--steer-site": site}
        for option, value in given.items():
            if value is not None:
                raise typer.BadParameter(f"{option} needs --steer FILE")
        return lambda model: contextlib.nullcontext()
    chosen = _chosen(layers)
    steering = _read(named, file, operation, site)
    if chosen is not None:
        with arg.checked():
            steering = steering.only(chosen)
    with arg.checked():
        scale = steering.checked(scale)
    _tell(steering, scale)
    return lambda model: model.steer(steering, scale)


def _chosen(layers: str | None) -> range | None:
    """The layers of A-B, or of one number."""
    if layers is None:
        return None
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", layers, re.ASCII)
    chosen = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not chosen:
        raise typer.BadParameter(
            f"{layers!r} is not A-B, the first and the last layer", param_hint="--steer-layers"
        )
    return chosen


def _read(named: str | None, file: Path, operation: str | None, site: str | None) -> Steering:
    from ds4mlx.research import Unstated, load_steering
    from ds4mlx.research.steering import check_site
    from ds4mlx.weights.directory import ModelDirectory

    if site is not None:
        with arg.checked():
            check_site(site)
    config = ModelDirectory.open(opening.find_model(named)).config
    try:
        return load_steering(file, config, operation, site)
    except Unstated as error:
        raise typer.BadParameter(error.told(OPTIONS)) from None


def _tell(steering: Steering, scale: float) -> None:
    """Say what is done, since the file decides it."""
    layers = steering.layers
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    note(f"steering: {steering.operation} at {steering.site}, {where}, scale {scale:g}")
