"""Convert official weights to a model directory: streaming, resumable, all or nothing.

Whatever interrupts it (Ctrl-C, kill, a full disk), the next run goes on from the journal and the
result has the same bytes; until the manifest is written, last, the directory does not load.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from ds4mlx.convert.choice import CHOICE
from ds4mlx.convert.choosing import Wanted, chosen
from ds4mlx.convert.encoder import CHUNK
from ds4mlx.convert.importance import Importance
from ds4mlx.convert.journal import Journal, check_unlocked
from ds4mlx.convert.manifest import manifest, quality_report
from ds4mlx.convert.moments import Moments
from ds4mlx.convert.plan import OutFile, Plan
from ds4mlx.convert.schedule import Schedule
from ds4mlx.convert.sources import open_source
from ds4mlx.convert.writer import FileWriter
from ds4mlx.durable import PARTIAL, write_whole
from ds4mlx.errors import DataError
from ds4mlx.weights.directory import CONFIG, JOURNAL, MANIFEST, canonical, read_manifest
from ds4mlx.weights.hub import HubError

JOURNAL_SECONDS = 5.0
GOES_ON = "nothing is lost, the same command goes on from here"
# Small files that a conversion may leave beside the weights.
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# What lies beside the data while it is written: manifest, journal, headers.
SPARE = 16 << 20
# Where files of a hub repository are until they are converted.
DOWNLOADS = ".download"


def convert(
    src: str | Path,
    dst: str | Path,
    recipe: str | None = None,
    *,
    imatrix: str | Path | None = None,
    moments: str | Path | None = None,
    mtp: str | Path | None = None,
    budget: int | None = None,
    sensitivity: str | Path | None = None,
    choice: str | Path | None = None,
    release: str | None = None,
    max_memory: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    keep_download: bool = False,
    progress: bool = True,
    journal_seconds: float = JOURNAL_SECONDS,
) -> Plan:
    """Convert `src` into the model directory `dst`.

    src: a local directory or hub repo id in the official layout, or a GGUF file (any of its shards).
    recipe: one of RECIPES; "official" unless told, and always "keep" for GGUF. imatrix: a file of
    importances that steers the 2- and 4-bit recipes. moments: a file of second moments, with which
    those recipes round with error feedback. mtp: a GGUF file with the MTP block of a GGUF
    source. budget, choice: for the recipe "q2-auto", the bytes that all weight files may take, or a
    file of an earlier choice to follow. sensitivity: for a budget, a file that says how much each
    layer matters; all alike without one. release: "april" or "0731", where the source does not say.
    max_memory: bytes that one chunk of rows may take when decoded (default 32 MiB; a few such
    exist at a time). dry_run: only plan. overwrite: replace an earlier conversion in `dst`.
    keep_download: leave what was downloaded in the hub's cache; otherwise each file is fetched to
    `dst` when it is first needed, and deleted as soon as everything in it is converted.
    Returns the plan. Raises DataError naming file, tensor and cause.
    """
    if release not in (None, "april", "0731"):
        raise DataError(f"release must be 'april' or '0731', not {release!r}")
    importance = None if imatrix is None else Importance.read(Path(imatrix).expanduser())
    second = None if moments is None else Moments(Path(moments).expanduser())
    source, target = open_source(src, mtp), Path(dst).expanduser()
    wanted = Wanted(budget, sensitivity, choice)
    picked = chosen(wanted, recipe, source, importance, second, target, progress)
    plan = Plan(source, recipe, release, importance, keep_download, second, picked)
    if importance is not None and not any(out.quantised for out in plan.entries):
        print(f"note: recipe {plan.recipe} rounds nothing by importance", file=sys.stderr)
    if second is not None:
        about = second.summary(plan.source.config)
        idle = f"note: recipe {plan.recipe} rounds nothing by second moments"
        _say(about if plan.feeds_back else idle, progress)
    if picked is not None:
        _say(str(picked), progress)
    if dry_run:
        return plan
    if ready(target, plan.source.path, plan.fingerprint(), overwrite):
        _say(f"{target}: already complete", progress)
        return plan
    try:
        with contextlib.closing(Journal(target, _mark(plan))) as journal:
            _write(plan, target, journal, max_memory or CHUNK, journal_seconds, progress)
            journal.remove()
    except HubError as error:
        raise DataError(f"{error}; {GOES_ON}") from error
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror}; {GOES_ON}") from error
    _say(quality_report(read_manifest(target)), progress)
    _say(f"{target}: {plan.nbytes:,} bytes in {len(plan.files)} weight files", progress)
    return plan


def _mark(plan: Plan) -> str:
    """What an unfinished conversion must agree in to go on: of a repository, its commit too."""
    downloads = plan.source.downloads
    return plan.fingerprint() + (f" {downloads.repository.commit}" if downloads else "")


def ready(target: Path, source: Path, plan: str, overwrite: bool) -> bool:
    """Prepare the directory; whether it holds the result already of what has the fingerprint `plan`."""
    if target.exists() and target.resolve() == source.resolve():
        raise DataError(f"{target}: is the source itself")
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is not a directory")
    target.mkdir(parents=True, exist_ok=True)
    finished, begun = (target / MANIFEST).exists(), (target / JOURNAL).exists()
    if not finished and not begun and any(target.iterdir()):
        raise DataError(f"{target}: is not empty and holds no conversion, finished or unfinished")
    if overwrite:
        _clear(target)
        return False
    if finished and read_manifest(target)["plan"] != plan:
        raise DataError(
            f"{target}: holds a model of another source, or made by other options; use --overwrite"
        )
    if finished:
        (target / JOURNAL).unlink(missing_ok=True)
    return finished


def _clear(target: Path) -> None:
    """Delete an earlier conversion, its manifest first; files that are not ours stay."""
    check_unlocked(target)
    ours = [MANIFEST, CONFIG, CHOICE, *TEXT_FILES, JOURNAL]
    weights = [
        p.name for p in target.glob("*.safetensors*") if p.suffix in (".safetensors", PARTIAL)
    ]
    for name in [*ours, *weights]:
        (target / name).unlink(missing_ok=True)
    shutil.rmtree(target / DOWNLOADS, ignore_errors=True)


def _write(
    plan: Plan, target: Path, journal: Journal, chunk: int, seconds: float, progress: bool
) -> None:
    if plan.choice is not None:
        write_whole(target / CHOICE, plan.choice.written())
    done = [f for f in plan.files if f.name in journal.done and whole(target / f.name, f.nbytes)]
    schedule = _scheduled(plan, target, [file for file in plan.files if file not in done])
    visible = progress and sys.stderr.isatty()
    _say(plan.peak(), progress)
    _say(f"{target}: writing {plan.nbytes:,} bytes, recipe {plan.recipe}", progress and not visible)
    bar = tqdm(total=plan.nbytes, unit="B", unit_scale=True, disable=not visible, smoothing=0.05)
    with bar:
        bar.update(sum(file.nbytes for file in done))
        for step in schedule.steps:
            bar.set_description(step.file.name.removesuffix(".safetensors"))
            writer = FileWriter(
                step.file, plan.encoder, target, journal, chunk, seconds, bar.update
            )
            writer.write()
            journal.done[step.file.name] = {"entries": writer.records}
            if plan.source.downloads is not None:
                plan.source.downloads.drop(step.done_with)
    shutil.rmtree(target / DOWNLOADS, ignore_errors=True)
    files = _write_small_files(plan, target)
    write_whole(target / MANIFEST, canonical(manifest(plan, journal, files)))


def whole(path: Path, nbytes: int) -> bool:
    """Whether a file is there with all its bytes."""
    return path.exists() and path.stat().st_size == nbytes


def _scheduled(plan: Plan, target: Path, left: list[OutFile]) -> Schedule[OutFile]:
    """The order of the files `left`. Refuses to start what the disk cannot hold."""
    downloads, there = plan.source.downloads, set()
    if downloads is not None and not plan.keep_download:
        downloads.use(target / DOWNLOADS)
        there = downloads.there()
    schedule = plan.schedule(left, there)
    begun = sum(p.stat().st_size for p in target.glob("*" + PARTIAL))
    if downloads is None or not plan.keep_download or _one_disk(target, downloads.repository.path):
        begun += sum(downloads.sizes()[name] for name in there) if downloads else 0
        check_space(target, schedule.peak - begun)
    else:
        check_space(target, schedule.written - begun)
        check_space(downloads.repository.path, schedule.downloaded)
    return schedule


def _one_disk(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


def check_space(directory: Path, nbytes: int) -> None:
    """Raises DataError unless the disk of a directory has so many bytes free."""
    needed, free = nbytes + SPARE, shutil.disk_usage(directory).free
    if needed > free:
        raise DataError(
            f"{directory}: {needed:,} bytes are still needed, the disk has {free:,} free"
        )


def _write_small_files(plan: Plan, target: Path) -> dict[str, bytes]:
    """Write config.json with the release, and the source's tokenizer files; {name: bytes}."""
    values = {**plan.source.config_values, "release": plan.release}
    files = {CONFIG: (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()}
    files |= plan.source.small_files()
    if plan.choice is not None:
        files[CHOICE] = plan.choice.written()
    if "tokenizer.json" not in files:
        print(
            f"note: {plan.source.path} has no tokenizer.json, so text cannot be encoded",
            file=sys.stderr,
        )
    for name, data in files.items():
        write_whole(target / name, data)
    return files


def _say(text: str, wanted: bool) -> None:
    if wanted and text:
        print(text, file=sys.stderr)
