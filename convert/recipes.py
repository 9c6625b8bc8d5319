"""Recipes: which format each tensor gets, and whether that keeps every bit."""

from ds4mlx.config import ModelConfig
from ds4mlx.convert.choice import Choice, place_of
from ds4mlx.convert.gguf_source import GGUFSource
from ds4mlx.convert.sources import Source
from ds4mlx.errors import DataError
from ds4mlx.formats import FORMATS
from ds4mlx.weights.inventory import Entry

RECIPES = ("official", "q2", "q2-q4", "q4", "q2-auto", "bf16", "f32", "keep")
# Formats of the routed experts' gate and up (w1, w3), and of down (w2).
TWO_BITS, FOUR_BITS = ("iq2_xxs", "q2_k"), ("q4_k", "q4_k")
# Layers at the end that `q2-q4` keeps at four bits.
LATE = 6
# FP8, FP4 and BF16 values all fit BF16 exactly; F32 ones are rounded.
FITS_BF16 = ("F8_E4M3", "I8", "BF16")


def choose_recipe(recipe: str | None, source: Source) -> str:
    """The recipe asked for, or the source's default; DataError if the source has no such recipe."""
    gguf = isinstance(source, GGUFSource)
    offered = ("keep",) if gguf else RECIPES[:-1]
    recipe = recipe or offered[0]
    if recipe not in offered:
        kind = "a GGUF file" if gguf else "an official checkpoint"
        raise DataError(
            f"there is no recipe {recipe!r} for {kind}; there are: {', '.join(offered)}"
        )
    return recipe


def format_of(
    recipe: str, entry: Entry, source: Source, choice: Choice | None = None
) -> tuple[str, bool]:
    """The format an entry gets, and whether its values stay bit for bit; choice: of `q2-auto`."""
    exact, chosen = source.exact(entry), source.exact(entry)
    if recipe in ("bf16", "f32") and entry.kind in ("matrix", "experts", "plain"):
        chosen = recipe
    elif recipe in ("q2", "q2-q4", "q4", "q2-auto") and entry.kind == "experts":
        config = source.config
        chosen = choice.of(entry, config) if choice else expert_format(recipe, entry, config)
        _check_width(entry, chosen, source)
    lossless = chosen in (exact, "f32")
    return chosen, lossless or (chosen == "bf16" and source.dtype(entry) in FITS_BF16)


def expert_format(recipe: str, entry: Entry, config: ModelConfig) -> str:
    """Formats of routed experts; the MTP block's are those of the last main layer."""
    layer, role = place_of(entry, config)
    late = layer >= config.num_hidden_layers - LATE
    gate_and_up, down = FOUR_BITS if recipe == "q4" or (recipe == "q2-q4" and late) else TWO_BITS
    return down if role == "down" else gate_and_up


def _check_width(entry: Entry, format: str, source: Source) -> None:
    block = FORMATS[format].block
    if entry.shape[-1] % block:
        name, files = source.origin(entry)
        raise DataError(
            f"{source.path / files[0]}: tensor {name} has rows of {entry.shape[-1]}, and {format} "
            f"needs a multiple of {block}: use another recipe"
        )
