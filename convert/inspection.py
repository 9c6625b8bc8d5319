"""What is in a source of weights or a model directory: sizes, bytes per token, memory by context."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds4mlx.config import ModelConfig
from ds4mlx.convert.sources import Source, open_source
from ds4mlx.state.decode_state import state_bytes
from ds4mlx.weights.directory import JOURNAL, MANIFEST, ModelDirectory, planes
from ds4mlx.weights.inventory import COMPONENTS
from ds4mlx.weights.tensor_file import TensorFile

CONTEXTS = (4096, 32768, 100_000, 300_000, 1_048_576)


@dataclass(frozen=True)
class Listed:
    """A weight and the bytes of all its arrays."""

    name: str
    component: str
    format: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `str()` is the table, `as_dict()` the JSON."""

    path: str
    recipe: str | None
    release: str
    config: dict[str, Any]
    bytes_by_component: dict[str, int]
    bytes_per_token: int
    state_bytes: dict[int, int]
    tensors: list[Listed] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total = sum(self.bytes_by_component.values())
        lines = [f"{self.path}: {f'recipe {self.recipe}' if self.recipe else 'source'}"]
        lines[0] += f", release {self.release}"
        lines += [f"  {key}: {value}" for key, value in self.config.items()]
        lines += ["", f"{'component':<20} {'bytes':>18} {'share':>7}"]
        for what, size in self.bytes_by_component.items():
            lines.append(f"{what:<20} {size:>18,} {size / total:>7.1%}")
        lines += [f"{'total':<20} {total:>18,}", ""]
        lines.append(f"weights read per decoded token: {self.bytes_per_token:,} bytes")
        lines += ["", f"{'context':>10} {'state':>18} {'weights + state':>18}"]
        for tokens, size in self.state_bytes.items():
            lines.append(f"{tokens:>10,} {size:>18,} {size + total:>18,}")
        for t in self.tensors:
            shape = " x ".join(map(str, t.shape))
            lines.append(f"{t.name:<48} {t.format:<8} {shape:<24} {t.bytes:>16,}")
        return "\n".join(lines)


def inspect(
    location: str | Path, tensors: bool = False, contexts: Sequence[int] | None = None
) -> Inspection:
    """Look at a model directory, or at a source: official (local or hub repo id) or GGUF. Raises DataError.

    bytes_per_token counts the chosen experts of every layer, one row of the embedding and everything
    else once; the MTP blocks are not part of decoding. State sizes are for bfloat16 activations, at
    `contexts` tokens each; by default at some up to the model's own limit.
    """
    path = Path(location).expanduser()
    if (path / MANIFEST).exists() or (path / JOURNAL).exists():
        directory = ModelDirectory.open(location)
        config, recipe, release = directory.config, directory.recipe, directory.config.release
        listed = _from_directory(directory)
    else:
        source = open_source(location)
        config, recipe, release = source.config, None, source.config.release
        listed = _from_source(source)
    sizes = {what: sum(t.bytes for t in listed if t.component == what) for what in COMPONENTS}
    return Inspection(
        str(location),
        recipe,
        release,
        config.model_dump(mode="json"),
        {what: size for what, size in sizes.items() if size},
        bytes_per_token(sizes, config),
        {tokens: state_bytes(config, tokens) for tokens in contexts or _usual(config)},
        listed if tensors else [],
    )


def _usual(config: ModelConfig) -> list[int]:
    limit = config.max_position_embeddings
    return [tokens for tokens in CONTEXTS if tokens <= limit] or [limit]


def bytes_per_token(sizes: dict[str, int], config: ModelConfig, sequences: int = 1) -> int:
    """Bytes of weights that one decoded token reads, from the bytes of each component.

    sequences: how many get a token at once; each reads experts and a row of the embedding of its own.
    """
    chosen = sequences * config.num_experts_per_tok
    share = {
        "routed experts": min(1.0, chosen / config.n_routed_experts),
        "embedding": min(1.0, sequences / config.vocab_size),
        "mtp": 0,
    }
    return round(sum(size * share.get(what, 1) for what, size in sizes.items()))


def _from_directory(directory: ModelDirectory) -> list[Listed]:
    found = []
    for name, entries in directory.inventory.items():
        file = TensorFile(directory.path / name)
        for entry in entries:
            format = directory.format_of(entry)
            size = sum(file.info(plane.name).nbytes for plane in planes(entry, format))
            found.append(Listed(entry.name, entry.component, format, entry.shape, size))
    return found


def _from_source(source: Source) -> list[Listed]:
    entries = [entry for listed in source.inventory.values() for entry in listed]
    return [
        Listed(e.name, e.component, source.dtype(e), e.shape, source.nbytes(e)) for e in entries
    ]
