"""Looking into a running model and reaching into it, by the names of its quantities."""

from ds4mlx.engine.adapters import add_lora, load_adapter, remove_lora, save_adapter
from ds4mlx.research.dictionary import Dictionary
from ds4mlx.research.directions import find_steering, separation
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
from ds4mlx.research.stated import Unstated
from ds4mlx.research.steering import Steering
from ds4mlx.research.steering_files import load_steering, save_steering
from ds4mlx.research.trace import Trace

__all__ = [
    "Dictionary",
    "Site",
    "Steering",
    "Trace",
    "Unstated",
    "Where",
    "ablate",
    "ablate_experts",
    "add",
    "add_lora",
    "at",
    "find_steering",
    "forbid_experts",
    "force_experts",
    "force_rows",
    "hide_rows",
    "load_adapter",
    "load_steering",
    "patch",
    "project_out",
    "remove_lora",
    "save_adapter",
    "save_steering",
    "scale",
    "separation",
]
