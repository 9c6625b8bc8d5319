"""GGUF files as a source of weights: ds4's own, mainline llama.cpp's, split ones, and an MTP file.

Everything headers can tell is checked when it is opened: architecture, names, shapes, types.
"""

import hashlib
from pathlib import Path

import numpy as np

from ds4mlx.config import ModelConfig
from ds4mlx.convert import codecs
from ds4mlx.convert.downloads import Downloads
from ds4mlx.convert.gguf_config import config_values
from ds4mlx.convert.gguf_container import GGUFFile, GGUFTensor
from ds4mlx.convert.gguf_files import GGUFFiles
from ds4mlx.convert.gguf_names import draft_name, main_name, mainline_draft_name
from ds4mlx.convert.gguf_tokenizer import tokenizer_files
from ds4mlx.convert.quantise import decode
from ds4mlx.errors import DataError
from ds4mlx.formats import FORMATS
from ds4mlx.formats.gguf_blocks import block_planes
from ds4mlx.weights.inventory import Entry, inventory

LISTED = 8  # tensors that a refusal names
FLOATS = ("F32", "F16", "BF16")
# Types a file may store each kind of tensor in.
MATRIX_TYPES = (*FLOATS, "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ3_XXS", "MXFP4")
ACCEPTED = {
    "matrix": MATRIX_TYPES,
    "experts": MATRIX_TYPES,
    "plain": MATRIX_TYPES,
    "exact": FLOATS,
    "ids": ("I32",),
}


class GGUFSource:
    """One model in one or several GGUF files. Raises DataError naming file, tensor and cause."""

    downloads: Downloads | None = None

    def __init__(self, path: str | Path, mtp: Path | None = None):
        path = Path(path).expanduser()
        self.name, self.path = str(path), path
        self.main = GGUFFiles(path)
        self._refuse_draft_file()
        self.draft = None if mtp is None else GGUFFiles(mtp)
        self.config_values = config_values(self.main, 0 if self.draft is None else 1)
        self.config = ModelConfig.from_dict(self.config_values, f"{path} metadata")
        self.inventory = inventory(self.config)
        self._check_names()
        self._check_types()
        for entries in self.inventory.values():
            for entry in entries:
                self._check_shape(entry)
        self.tokenizer = tokenizer_files(self.main, self.config)

    def remote(self, entry: Entry) -> set[str]:
        """Nothing is to be downloaded."""
        return set()

    def place(self, entry: Entry) -> tuple[GGUFFile, str]:
        """The file that holds an entry, and its name there."""
        if not entry.name.startswith("mtp."):
            name = main_name(entry)
            return self.main.holder(name), name
        assert self.draft is not None
        name = draft_name(entry)
        if name not in self.draft.files:
            name = mainline_draft_name(entry, self.config.num_hidden_layers)
        return self.draft.holder(name), name

    def info(self, entry: Entry) -> GGUFTensor:
        """Header of an entry's tensor."""
        file, name = self.place(entry)
        return file.tensor(name)

    def dtype(self, entry: Entry) -> str:
        """GGUF type of an entry."""
        return self.info(entry).type

    def exact(self, entry: Entry) -> str:
        """The format that holds an entry exactly: its own, or float32 where blocks cannot be used."""
        found = self.dtype(entry).lower()
        return found if found in ("f32", "i32") or entry.is_matrix else "f32"

    def stored(self, entry: Entry, expert: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows of an entry as planes of its exact format."""
        name, raw = self.dtype(entry).lower(), self._raw(entry, expert, start, stop)
        planes = block_planes(raw, name)
        self._check_values(entry, name, planes)
        if entry.kind == "ids":
            file, tensor = self.place(entry)
            count = self.config.n_routed_experts
            codecs.check_ids(planes["weight"], count, file.path, tensor)
        found = planes if self.exact(entry) == name else {"weight": decode(name, planes)}
        return {p: a if len(entry.shape) > 1 else a[:, 0] for p, a in found.items()}

    def values(self, entry: Entry, expert: int, start: int, stop: int) -> np.ndarray:
        """Rows of an entry decoded exactly: float32, or int32 ids."""
        planes, format = self.stored(entry, expert, start, stop), self.exact(entry)
        return planes["weight"] if format in ("f32", "i32") else decode(format, planes)

    def origin(self, entry: Entry) -> tuple[str, list[str]]:
        """GGUF name of an entry and its file."""
        file, name = self.place(entry)
        return name, [file.path.name]

    def nbytes(self, entry: Entry) -> int:
        """Bytes of an entry in the file."""
        halves = 2 if self.place(entry)[1].endswith("eh_proj.weight") else 1
        return self.info(entry).nbytes // halves

    def small_files(self) -> dict[str, bytes]:
        """The tokenizer's files."""
        return self.tokenizer

    def fingerprint(self) -> str:
        """Digest of every file's metadata and tensor headers."""
        found = [files.digest() for files in (self.main, self.draft) if files is not None]
        return hashlib.sha256(b"".join(found)).hexdigest()

    def _raw(self, entry: Entry, expert: int, start: int, stop: int) -> np.ndarray:
        """Rows of raw data, uint8 (rows, bytes); single values are rows of one."""
        file, name = self.place(entry)
        info = file.tensor(name)
        rows = int(np.prod(info.shape[: max(1, len(info.shape) - 1)]))
        row_bytes = info.nbytes // rows
        first = start + (expert * entry.shape[-2] if entry.kind == "experts" else 0)
        raw = file.read(name, first * row_bytes, (stop - start) * row_bytes)
        raw = raw.reshape(stop - start, row_bytes)
        if name.endswith("eh_proj.weight"):  # e_proj and h_proj side by side
            half = (
                slice(None, row_bytes // 2)
                if ".e_proj" in entry.name
                else slice(row_bytes // 2, None)
            )
            raw = raw[:, half]
        return raw

    def _check_values(self, entry: Entry, name: str, planes: dict[str, np.ndarray]) -> None:
        """Refuse NaN and infinite values and scales."""
        bad = name == "mxfp4" and bool((planes["scales"] == 255).any())
        for plane, (tag, _) in FORMATS[name].layout.items():
            if tag == "BF16":
                bad |= bool(((planes[plane] & 0x7F80) == 0x7F80).any())
            elif tag in ("F16", "F32"):
                bad |= not np.isfinite(planes[plane]).all()
        if bad:
            file, tensor = self.place(entry)
            raise DataError(
                f"{file.path}: tensor {tensor} holds a value or scale that is not finite"
            )

    def _refuse_draft_file(self) -> None:
        if self.main.text("general.architecture") == "deepseek4_mtp_support":
            raise DataError(
                f"{self.path}: holds only an MTP block: give it with --mtp to a main file"
            )

    def _check_names(self) -> None:
        """Every tensor must be one that the forward pass uses."""
        entries = [e for listed in self.inventory.values() for e in listed]
        known = {main_name(e) for e in entries if not e.name.startswith("mtp.")}
        unknown = sorted(set(self.main.files) - known)
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise DataError(f"{self.path}: unsupported tensor {', '.join(unknown[:3])}{more}")

    def _check_types(self) -> None:
        """Refuse types that are not supported, naming all the tensors."""
        entries = [entry for entries in self.inventory.values() for entry in entries]
        bad = [e for e in entries if self.dtype(e) not in ACCEPTED[e.kind]]
        if bad:
            listed = [f"{self.place(e)[1]} has type {self.dtype(e)}" for e in bad]
            more = f", and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
            wanted = ", ".join(ACCEPTED[bad[0].kind])
            where = self.place(bad[0])[0].path
            raise DataError(
                f"{where}: tensor {', '.join(listed[:LISTED])}{more}; supported there: {wanted}"
            )

    def _check_shape(self, entry: Entry) -> None:
        file, name = self.place(entry)
        info, shape = file.tensor(name), entry.shape
        if name.endswith("eh_proj.weight"):
            shape = (shape[0], 2 * shape[1])
        if info.shape != shape:
            raise DataError(
                f"{file.path}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}"
            )
