"""The official Hugging Face layout, read and checked: config, index, shards, every tensor's header.

Everything that headers can tell is checked before anything is converted: names, shapes, types.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from ds4mlx.config import ModelConfig, read_json
from ds4mlx.convert import codecs
from ds4mlx.convert.downloads import Downloads
from ds4mlx.convert.special_tokens import check_special_tokens
from ds4mlx.errors import DataError
from ds4mlx.formats import TAGS
from ds4mlx.text.tokenizer import NoTokenizer, Tokenizer
from ds4mlx.weights.directory import JOURNAL, MANIFEST
from ds4mlx.weights.hub import Repository, may_be_repository
from ds4mlx.weights.inventory import Entry, experts, inventory
from ds4mlx.weights.tensor_file import TensorFile, TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Types a source may store each kind of tensor in; the first is the official one.
ACCEPTED = {
    "matrix": ("F8_E4M3", "BF16", "F32"),
    "experts": ("I8", "F8_E4M3", "BF16", "F32"),
    "plain": ("BF16", "F32"),
    "exact": ("F32",),
    "ids": ("I64", "I32"),
}
# A source type -> the format that holds it exactly.
EXACT = {
    "F8_E4M3": "mxfp8",
    "I8": "mxfp4",
    "BF16": "bf16",
    "F32": "f32",
    "I64": "i32",
    "I32": "i32",
}
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


class OfficialSource:
    """A checkpoint in the official layout. Raises DataError naming file, tensor and cause."""

    def __init__(self, location: str | Path):
        self.name = str(location)
        self.path, self.downloads = _look_up(location)
        self.config_values = read_json(self.path / "config.json")
        self.config = ModelConfig.from_dict(self.config_values, str(self.path / "config.json"))
        self.files = _open_files(self.path, self.downloads)
        self.inventory = inventory(self.config)
        self.skipped = self._skipped_drafts()
        self._check_names()
        for entries in self.inventory.values():
            for entry in entries:
                self._check(entry)
        tokenizer = Tokenizer.from_dir(self.path)  # a broken one is refused here, not when loaded
        if not isinstance(tokenizer, NoTokenizer):
            check_special_tokens(tokenizer, self.path / "tokenizer.json", self.config)

    def info(self, name: str) -> TensorInfo:
        """Header of an official tensor."""
        return self.file(name).info(name)

    def file(self, name: str) -> TensorFile:
        """The file that holds an official tensor."""
        if name not in self.files:
            raise DataError(f"{self.path}: tensor {name} is missing")
        return self.files[name]

    def dtype(self, entry: Entry) -> str:
        """Type tag that the source stores an entry in."""
        return self.info(entry.official()).dtype

    def exact(self, entry: Entry) -> str:
        """The format that holds an entry's values exactly."""
        return EXACT[self.dtype(entry)]

    def origin(self, entry: Entry) -> tuple[str, list[str]]:
        """Official name of an entry (`{expert}` in a stack's) and the shards that hold it."""
        name = entry.official("{expert}") if entry.kind == "experts" else entry.official()
        return name, sorted({self.file(entry.official(e)).path.name for e in range(experts(entry))})

    def nbytes(self, entry: Entry) -> int:
        """Bytes of an entry in the source, scales included."""
        return sum(self.info(name).nbytes for name in self._names(entry))

    def remote(self, entry: Entry) -> set[str]:
        """The files that hold an entry or its scales, and are still to be downloaded."""
        names = {self.file(name).path.name for name in self._names(entry)}
        return names & self.downloads.remote.keys() if self.downloads else set()

    def _names(self, entry: Entry) -> list[str]:
        names = [entry.official(expert) for expert in range(experts(entry))]
        return names + [scale_name(name) for name in names if scale_name(name) in self.files]

    def small_files(self) -> dict[str, bytes]:
        """The tokenizer's files, {name: bytes}."""
        there = (name for name in COPIED if (self.path / name).exists())
        return {name: (self.path / name).read_bytes() for name in there}

    def stored(self, entry: Entry, expert: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows of an entry as planes of its exact format."""
        name, dtype = entry.official(expert), self.dtype(entry)
        if dtype not in ("F8_E4M3", "I8"):
            values = self.values if entry.kind == "ids" else self._rows
            return {"weight": values(entry, expert, start, stop)}
        codes = self.rows(name, start, stop).view(np.uint32)
        if dtype == "F8_E4M3":
            return {"weight": codes, "scales": self.tile_scales(name, start, stop)}
        return {"weight": codes, "scales": self.rows(scale_name(name), start, stop)}

    def _rows(self, entry: Entry, expert: int, start: int, stop: int) -> np.ndarray:
        return self.rows(entry.official(expert), start, stop)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 of an official tensor, as stored (8-bit types as uint8, BF16 as uint16)."""
        info = self.info(name)
        dtype = np.uint8 if TAGS[info.dtype].nbytes == 1 else TAGS[info.dtype].numpy
        row = info.nbytes // max(1, info.shape[0])
        raw = self.file(name).read(name, start * row, (stop - start) * row)
        values = np.frombuffer(raw, dtype).reshape(stop - start, *info.shape[1:])
        codecs.check(values, info.dtype, self.file(name).path, name)
        return values

    def values(self, entry: Entry, expert: int, start: int, stop: int) -> np.ndarray:
        """Rows of an entry (of one expert if it is a stack) decoded exactly: float32, or int32 ids."""
        name = entry.official(expert)
        stored, dtype = self.rows(name, start, stop), self.info(name).dtype
        if dtype == "F8_E4M3":
            return codecs.decode_fp8(stored, self.tile_scales(name, start, stop))
        if dtype == "I8":
            return codecs.decode_fp4(stored, self.rows(scale_name(name), start, stop))
        if dtype == "BF16":
            return codecs.from_bf16(stored)
        if entry.kind == "ids":
            count = self.config.n_routed_experts
            return codecs.check_ids(stored, count, self.file(name).path, name)
        return stored

    def tile_scales(self, name: str, start: int, stop: int) -> np.ndarray:
        """E8M0 codes of FP8 rows, one per row and group of 32: uint8 (rows, in / 32)."""
        tiles = self.rows(scale_name(name), start // 128, -(-stop // 128))
        rows = np.arange(start, stop) // 128 - start // 128
        return np.repeat(tiles[rows], 4, axis=1)[:, : -(-self.info(name).shape[1] // 32)]

    def fingerprint(self) -> str:
        """Digest of the configuration and of every tensor's name, type, shape, and place."""
        digest = hashlib.sha256(json.dumps(self.config_values, sort_keys=True).encode())
        for file in sorted(set(self.files.values()), key=lambda f: f.path.name):
            digest.update(file.path.name.encode() + file.header)
        return digest.hexdigest()

    def _skipped_drafts(self) -> list[str]:
        """The 0731 release's own draft modules; they are another kind of block."""
        if not any(key.startswith("dspark_") for key in self.config_values):
            return []
        skipped = [name for name in self.files if name.startswith("mtp.")]
        if skipped:
            modules = {name.split(".")[1] for name in skipped}
            print(f"note: the {len(modules)} draft modules under mtp. are skipped", file=sys.stderr)
        return skipped

    def _check_names(self) -> None:
        known = set(self.skipped)
        for entries in self.inventory.values():
            for entry in entries:
                names = [entry.official(e) for e in range(experts(entry))]
                known.update(names, map(scale_name, names))
        unknown = sorted(set(self.files) - known)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            where = self.files[unknown[0]].path
            raise DataError(f"{where}: unsupported tensor {', '.join(unknown[:3])}{more}")

    def _check(self, entry: Entry) -> None:
        """Type, shape and scale of every official tensor of an entry."""
        types = {self._check_one(entry, expert) for expert in range(experts(entry))}
        if len(types) > 1:
            stack = entry.official("*")
            raise DataError(f"{self.path}: experts {stack} are stored in several types: {types}")

    def _check_one(self, entry: Entry, expert: int) -> str:
        name = entry.official(expert)
        info, where = self.info(name), self.file(name).path
        if info.dtype not in ACCEPTED[entry.kind]:
            wanted = " or ".join(ACCEPTED[entry.kind])
            raise DataError(f"{where}: tensor {name} has type {info.dtype}, expected {wanted}")
        shape = entry.shape[1:] if entry.kind == "experts" else entry.shape
        scale: tuple[int, ...] | None = None
        if info.dtype == "I8":
            scale, shape = (shape[0], shape[1] // 32), (shape[0], shape[1] // 2)
        elif info.dtype == "F8_E4M3":
            scale = (-(-shape[0] // 128), -(-shape[1] // 128))
        self._check_shape(name, shape)
        self._check_scale(scale_name(name), scale)
        return info.dtype

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        actual = self.info(name).shape
        if actual != shape:
            where = self.file(name).path
            raise DataError(
                f"{where}: tensor {name} has shape {list(actual)}, expected {list(shape)}"
            )

    def _check_scale(self, name: str, shape: tuple[int, ...] | None) -> None:
        if shape is None:
            if name in self.files:
                raise DataError(
                    f"{self.files[name].path}: {name} scales a weight that has no codes"
                )
            return
        if self.info(name).dtype != "F8_E8M0":
            actual = self.info(name).dtype
            raise DataError(
                f"{self.file(name).path}: tensor {name} has type {actual}, expected F8_E8M0"
            )
        self._check_shape(name, shape)


def scale_name(name: str) -> str:
    """The block scale that belongs to an official weight."""
    return name.removesuffix("weight") + "scale" if name.endswith(".weight") else name + ".scale"


def _look_up(location: str | Path) -> tuple[Path, Downloads | None]:
    """The directory of a checkpoint's small files; for a hub repository, what fetches the others."""
    path = Path(location).expanduser()
    if path.is_dir():
        _check_unconverted(path)
        return path, None
    if path.exists():
        raise DataError(f"{path}: not a directory")
    if not may_be_repository(location):
        raise DataError(f"{path}: no such directory")
    repository = Repository(str(location), "config.json")
    ModelConfig.from_file(repository.path / "config.json")  # refused before anything else is asked
    for name in (INDEX, *COPIED):
        repository.fetch_if_any(name)
    return repository.path, Downloads(repository)


def _check_unconverted(path: Path) -> None:
    """DataError for a model directory, finished or not, in the place of a source."""
    official = any((path / name).exists() for name in (INDEX, SINGLE))
    if not official and any((path / name).exists() for name in (MANIFEST, JOURNAL)):
        raise DataError(
            f"{path}: was converted already; a source is an official directory, a repository of the "
            "hub or a GGUF file"
        )


def _open_files(path: Path, downloads: Downloads | None) -> dict[str, TensorFile]:
    """Official tensor name -> its file, from the index or a single unsharded file."""
    if not (path / INDEX).exists():
        if downloads is None and not (path / SINGLE).exists():
            raise DataError(f"{path}: neither {INDEX} nor {SINGLE} is there")
        (single,) = _open(path, [SINGLE], downloads).values()
        return dict.fromkeys(single.tensors, single)
    names = read_json(path / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(_plain(shard) for shard in names.values()):
        raise DataError(f"{path / INDEX}: weight_map is not an object of tensor and file names")
    for name, shard in names.items():
        if downloads is None and not (path / shard).is_file():
            raise DataError(f"{path / INDEX}: tensor {name} is in {shard}, which is missing")
    files = _open(path, sorted(set(names.values())), downloads)
    for shard, file in files.items():
        for name in set(file.tensors) - {n for n, s in names.items() if s == shard}:
            raise DataError(f"{file.path}: tensor {name} is not listed there by {INDEX}")
    for name, shard in names.items():
        files[shard].info(name)
    return {name: files[shard] for name, shard in names.items()}


def _open(path: Path, shards: list[str], downloads: Downloads | None) -> dict[str, TensorFile]:
    if downloads is not None:
        return downloads.open(shards)
    return {shard: TensorFile(path / shard) for shard in shards}


def _plain(shard: object) -> bool:
    """A file name without a way out of its directory."""
    return isinstance(shard, str) and Path(shard).name == shard
