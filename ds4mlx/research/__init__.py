"""Looking into a running model and reaching into it, by the names of its quantities."""

from ds4mlx.research.edits import (
    ablate,
    ablate_experts,
    add,
    at,
    forbid_experts,
    force_experts,
    force_rows,
    hide_rows,
    patch,
    project_out,
    scale,
)
from ds4mlx.research.intervene import Edit as Edit
from ds4mlx.research.places import Where
from ds4mlx.research.sites import Site
from ds4mlx.research.trace import Trace

__all__ = [
    "Site",
    "Trace",
    "Where",
    "ablate",
    "ablate_experts",
    "add",
    "at",
    "forbid_experts",
    "force_experts",
    "force_rows",
    "hide_rows",
    "patch",
    "project_out",
    "scale",
]
