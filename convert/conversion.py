"""Convert official weights to a model directory: streaming, resumable, all or nothing.

Whatever interrupts it (Ctrl-C, kill, a full disk), the next run goes on from the journal and the
result has the same bytes; until the manifest is written, last, the directory does not load.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ds4mlx.convert.journal import Journal, check_unlocked
from ds4mlx.convert.plan import OutTensor, Plan
from ds4mlx.convert.planes import CHUNK
from ds4mlx.convert.source import Source, experts
from ds4mlx.convert.writer import PARTIAL, FileWriter, write_whole
from ds4mlx.directory import CONFIG, FORMAT_VERSION, JOURNAL, MANIFEST, canonical, read_manifest
from ds4mlx.errors import DataError

COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
JOURNAL_SECONDS = 5.0
# What lies beside the data while it is written: manifest, journal, headers.
SPARE = 16 << 20


def convert(
    src: str | Path,
    dst: str | Path,
    recipe: str = "official",
    *,
    release: str | None = None,
    max_memory: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    journal_seconds: float = JOURNAL_SECONDS,
) -> Plan:
    """Convert `src`, a local directory or hub repo id in the official layout, into `dst`.

    recipe: a key of RECIPES. release: "april" or "0731", where the source does not say.
    max_memory: bytes that one chunk of rows may take when decoded (default 32 MiB; a few such
    exist at a time). dry_run: only plan. overwrite: replace an earlier conversion in `dst`.
    Returns the plan. Raises DataError naming file, tensor and cause.
    """
    if release not in (None, "april", "0731"):
        raise DataError(f"release must be 'april' or '0731', not {release!r}")
    plan = Plan(Source(src), recipe, release)
    if dry_run:
        return plan
    target = Path(dst).expanduser()
    if _ready(target, plan, overwrite):
        _say(f"{target}: already complete", progress)
        return plan
    journal = Journal(target, plan.fingerprint())
    try:
        _write(plan, target, journal, max_memory or CHUNK, journal_seconds, progress)
        journal.remove()
    except OSError as error:
        cause = f"{error.filename or target}: {error.strerror}"
        raise DataError(f"{cause}; nothing is lost, the same command goes on from here") from error
    finally:
        journal.close()
    _say(f"{target}: {plan.nbytes:,} bytes in {len(plan.files)} weight files", progress)
    return plan


def _ready(target: Path, plan: Plan, overwrite: bool) -> bool:
    """Prepare the directory; whether it holds the plan's result already."""
    if target.exists() and target.resolve() == plan.source.path.resolve():
        raise DataError(f"{target}: is the source itself")
    target.mkdir(parents=True, exist_ok=True)
    finished, begun = (target / MANIFEST).exists(), (target / JOURNAL).exists()
    if not finished and not begun and any(target.iterdir()):
        raise DataError(f"{target}: is not empty and holds no conversion, finished or unfinished")
    if overwrite:
        _clear(target)
        return False
    if finished and read_manifest(target)["plan"] != plan.fingerprint():
        raise DataError(
            f"{target}: holds a model of another source, recipe or release; use --overwrite"
        )
    if finished:
        (target / JOURNAL).unlink(missing_ok=True)
    return finished


def _clear(target: Path) -> None:
    """Delete an earlier conversion, its manifest first; files that are not ours stay."""
    check_unlocked(target)
    ours = [MANIFEST, CONFIG, *COPIED, JOURNAL]
    weights = [
        p.name for p in target.glob("*.safetensors*") if p.suffix in (".safetensors", PARTIAL)
    ]
    for name in [*ours, *weights]:
        (target / name).unlink(missing_ok=True)


def _write(
    plan: Plan, target: Path, journal: Journal, chunk: int, seconds: float, progress: bool
) -> None:
    _check_space(plan, target, journal)
    visible = progress and sys.stderr.isatty()
    _say(f"{target}: writing {plan.nbytes:,} bytes, recipe {plan.recipe}", progress and not visible)
    bar = tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=not visible, smoothing=0.05)
    with bar:
        for file in plan.files:
            bar.set_description(file.name.removesuffix(".safetensors"))
            if file.name in journal.done and _whole(target / file.name, file.nbytes):
                bar.update(file.nbytes)
                continue
            writer = FileWriter(file, plan.source, target, journal, chunk, seconds, bar.update)
            writer.write()
            journal.done[file.name] = {"tensors": writer.checksums}
    files = _write_small_files(plan, target)
    write_whole(target / MANIFEST, canonical(_manifest(plan, journal, files)))


def _whole(path: Path, nbytes: int) -> bool:
    return path.exists() and path.stat().st_size == nbytes


def _check_space(plan: Plan, target: Path, journal: Journal) -> None:
    """Refuse to start what the disk cannot hold."""
    missing = sum(file.nbytes for file in plan.files if file.name not in journal.done)
    there = sum(p.stat().st_size for p in target.glob("*" + PARTIAL))
    needed, free = missing - there + SPARE, shutil.disk_usage(target).free
    if needed > free:
        raise DataError(f"{target}: {needed:,} bytes are still needed, the disk has {free:,} free")


def _write_small_files(plan: Plan, target: Path) -> dict[str, bytes]:
    """Write config.json with the release, and the source's tokenizer files; {name: bytes}."""
    values = {**plan.source.config_values, "release": plan.release}
    files = {CONFIG: (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()}
    for name in COPIED:
        if (plan.source.path / name).exists():
            files[name] = (plan.source.path / name).read_bytes()
    if "tokenizer.json" not in files:
        print(
            f"note: {plan.source.path} has no tokenizer.json, so text cannot be encoded",
            file=sys.stderr,
        )
    for name, data in files.items():
        write_whole(target / name, data)
    return files


def _manifest(plan: Plan, journal: Journal, small: dict[str, bytes]) -> dict[str, Any]:
    from ds4mlx import __version__

    files: dict[str, Any] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in small.items()
    }
    tensors = {}
    for file in plan.files:
        header = hashlib.sha256(file.header).hexdigest()
        files[file.name] = {"bytes": file.nbytes, "header_sha256": header}
        checksums = journal.done[file.name]["tensors"]
        for tensor in file.tensors:
            tensors[tensor.plane.name] = _listed(plan.source, tensor, file.name, checksums)
    return {
        "format": FORMAT_VERSION,
        "ds4mlx": __version__,
        "plan": plan.fingerprint(),
        "source": plan.source.fingerprint(),
        "recipe": plan.recipe,
        "release": plan.release,
        "files": files,
        "tensors": tensors,
    }


def _listed(
    source: Source, tensor: OutTensor, file: str, checksums: dict[str, str]
) -> dict[str, Any]:
    """A tensor's line of the manifest."""
    entry = tensor.entry
    shards = {source.file(entry.official(e)).path.name for e in range(experts(entry))}
    return {
        "file": file,
        "dtype": tensor.plane.dtype,
        "shape": list(tensor.plane.shape),
        "format": tensor.storage,
        "sha256": checksums[tensor.plane.name],
        "source": {
            "tensor": entry.official("{expert}") if entry.kind == "experts" else entry.official(),
            "files": sorted(shards),
        },
        "lossless": tensor.lossless,
    }


def _say(text: str, wanted: bool) -> None:
    if wanted:
        print(text, file=sys.stderr)
