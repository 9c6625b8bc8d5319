"""Recipes: which storage format each kind of tensor gets, and whether that keeps every bit."""

from ds4mlx.convert.source import Source
from ds4mlx.errors import DataError
from ds4mlx.inventory import Entry, Kind

# A source type -> the format that holds it exactly.
EXACT = {
    "F8_E4M3": "mxfp8",
    "I8": "mxfp4",
    "BF16": "bf16",
    "F32": "f32",
    "I64": "i32",
    "I32": "i32",
}
# What a recipe changes; a kind that is not named keeps its exact format.
RECIPES: dict[str, dict[Kind, str]] = {
    "official": {},
    "bf16": {"matrix": "bf16", "experts": "bf16", "plain": "bf16"},
    "f32": {"matrix": "f32", "experts": "f32", "plain": "f32"},
}
# FP8, FP4 and BF16 values all fit BF16 exactly; only F32 ones are rounded.
LOSSLESS = {("bf16", dtype) for dtype in ("F8_E4M3", "I8", "BF16")}
PLANNED = ("q2", "q2-q4", "q4", "keep")


def check_recipe(recipe: str) -> None:
    """DataError if there is no such recipe."""
    if recipe in PLANNED:
        raise DataError(f"recipe {recipe!r} is not available yet; there are: {', '.join(RECIPES)}")
    if recipe not in RECIPES:
        raise DataError(f"there is no recipe {recipe!r}; there are: {', '.join(RECIPES)}")


def storage(recipe: str, entry: Entry, source: Source) -> tuple[str, bool]:
    """The format an entry gets, and whether its values stay bit for bit."""
    dtype = source.dtype(entry)
    chosen = RECIPES[recipe].get(entry.kind, EXACT[dtype])
    lossless = chosen in (EXACT[dtype], "f32") or (chosen, dtype) in LOSSLESS
    return chosen, lossless
