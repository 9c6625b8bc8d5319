"""How much each input column of a routed expert matters: what imatrix files hold.

Two forms: the legacy `.dat` that ds4 and older llama.cpp tools write, and llama.cpp's GGUF form. Both
hold, per expert and column, the mean of x^2 over the tokens that were routed to the expert. Both are
read; the second is written.
"""

import contextlib
import hashlib
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from ds4mlx.convert.gguf_container import MAGIC, GGUFFile
from ds4mlx.errors import DataError
from ds4mlx.weights.inventory import Entry

PARTS = {"w1": "gate", "w2": "down", "w3": "up"}
SUMS, COUNTS = ".in_sum2", ".counts"
# Of which run the file is the result: ours, other readers pass over it.
RUN = "ds4mlx.imatrix_run"


class Importance:
    """Importances of stacks of experts: GGUF name -> float32 (experts, columns) once checked."""

    def __init__(self, name: str, stacks: dict[str, np.ndarray], fingerprint: str):
        self.name, self.stacks, self.fingerprint = name, stacks, fingerprint

    @classmethod
    def read(cls, path: Path) -> "Importance":
        """Read either form. Raises DataError naming file and entry."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        stacks = _from_gguf(path) if raw[:4] == MAGIC else _from_dat(raw, path)
        if not stacks:
            raise DataError(f"{path}: holds no importance of routed experts")
        for name, stack in stacks.items():
            if not (np.isfinite(stack).all() and (stack >= 0).all()):
                raise DataError(f"{path}: {name} has importances that are negative or not finite")
        return cls(path.name, stacks, hashlib.sha256(raw).hexdigest())

    def of(self, entry: Entry, expert: int) -> np.ndarray | None:
        """Importance (columns,) of one expert of a stack; None for the MTP block, which has none."""
        stack = self.stacks.get(stack_name(entry) or "")
        return None if stack is None else stack[expert]

    def check(self, entries: Iterable[Entry]) -> None:
        """DataError if a main layer's entry has no importance, or one of another shape."""
        for entry in entries:
            name = stack_name(entry)
            if name is None:
                continue
            if name not in self.stacks:
                raise DataError(f"{self.name}: has no importance of {name}")
            experts, _, columns = entry.shape
            stack = self.stacks[name]
            if stack.size not in (experts * columns, columns):
                raise DataError(
                    f"{self.name}: {name} has {stack.size} values, expected {experts} x {columns}"
                )
            self.stacks[name] = np.broadcast_to(stack.reshape(-1, columns), (experts, columns))


def stack_name(entry: Entry) -> str | None:
    """What imatrix files call a stack of routed experts; None for other entries."""
    found = re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(w[123])\.weight", entry.name)
    return found and imatrix_name(int(found[1]), found[2])


def imatrix_name(layer: int, part: str) -> str:
    """What imatrix files call the stack w1, w2 or w3 of a main layer."""
    return f"blk.{layer}.ffn_{PARTS[part]}_exps.weight"


def is_stack(name: str) -> bool:
    """Whether an entry of an imatrix file is of routed experts; others are not used."""
    return re.fullmatch(r"blk\.\d+\.ffn_(gate|down|up)_exps\.weight", name) is not None


def _from_dat(raw: bytes, path: Path) -> dict[str, np.ndarray]:
    """Entries of (length, name, calls, count, count floats); a reader divides by the calls."""
    stacks, position = {}, 4
    try:
        (entries,) = struct.unpack_from("<i", raw)
        for _ in range(entries):
            name, calls, values, position = _dat_entry(raw, position)
            if is_stack(name):
                stacks[name] = values / max(calls, 1)
    except (struct.error, ValueError) as error:
        raise DataError(f"{path}: not an imatrix file, or truncated: {error}") from None
    return stacks


def _dat_entry(raw: bytes, position: int) -> tuple[str, int, np.ndarray, int]:
    (length,) = struct.unpack_from("<i", raw, position)
    if not 0 < length < 1024:
        raise ValueError(f"a name of {length} bytes")
    name = raw[position + 4 : position + 4 + length].decode()
    calls, count = struct.unpack_from("<ii", raw, position + 4 + length)
    if min(calls, count) < 0:
        raise ValueError(f"{name} has {count} values of {calls} calls")
    start = position + 12 + length
    return name, calls, np.frombuffer(raw, "<f4", count, start), start + 4 * count


def _from_gguf(path: Path) -> dict[str, np.ndarray]:
    file = GGUFFile(path)
    if file.text("general.type") != "imatrix":
        raise DataError(f"{path}: is a GGUF file, but no imatrix")
    stacks = {}
    for name in [n.removesuffix(SUMS) for n in file.tensors if n.endswith(SUMS)]:
        if is_stack(name):
            sums, counts = file.floats(name + SUMS), file.floats(name + COUNTS).reshape(-1, 1)
            if len(counts) not in (1, len(sums)):
                raise DataError(f"{path}: {name} has {len(counts)} counts for {len(sums)} sums")
            if not (np.isfinite(counts).all() and (counts >= 0).all()):
                raise DataError(f"{path}: {name} has counts that are negative or not finite")
            # an expert that no token reached matters as little as possible, evenly
            with np.errstate(all="ignore"):  # what is not finite is refused later
                stacks[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)
    return {name: stack.astype(np.float32) for name, stack in stacks.items()}


class _Writer(GGUFWriter):
    """Without the architecture, which an imatrix does not have."""

    def add_architecture(self) -> None:
        pass


def write_gguf(
    path: Path, arrays: Mapping[str, np.ndarray], dataset: str, chunks: int, length: int, run: str
) -> None:
    """Write llama.cpp's GGUF form.

    arrays: sums (experts, columns) under `<stack>.in_sum2`, numbers of tokens (experts, 1) under
    `<stack>.counts`. dataset: where the tokens come from, in `chunks` pieces of at most `length`.
    run: see `run_of`. Equal arguments give equal bytes.
    """
    with contextlib.closing(_Writer(path, "")) as writer:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", length)
        writer.add_string(RUN, run)
        for name, array in arrays.items():
            writer.add_tensor(name, array.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def run_of(path: Path) -> str | None:
    """The `run` an imatrix was written with; None for any other file."""
    try:
        return GGUFFile(path).text(RUN)
    except DataError:
        return None
