"""What a finished conversion says of itself: every file, weight, checksum, source and loss."""

import hashlib
from typing import Any

from ds4mlx.convert.journal import Journal
from ds4mlx.convert.plan import OutEntry, Plan
from ds4mlx.convert.quantise import Loss
from ds4mlx.convert.sources import Source
from ds4mlx.weights.directory import FORMAT_VERSION


def manifest(plan: Plan, journal: Journal, small: dict[str, bytes]) -> dict[str, Any]:
    """The manifest of a finished conversion; `small`: its files that are not weights."""
    from ds4mlx import __version__

    files: dict[str, Any] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in small.items()
    }
    tensors: dict[str, Any] = {}
    for file in plan.files:
        header = hashlib.sha256(file.header).hexdigest()
        files[file.name] = {"bytes": file.nbytes, "header_sha256": header}
        records = journal.done[file.name]["entries"]
        for out in file.entries:
            tensors |= _listed(plan.source, out, file.name, records[out.entry.name])
    return {
        "format": FORMAT_VERSION,
        "ds4mlx": __version__,
        "plan": plan.fingerprint(),
        "source": plan.source.fingerprint(),
        "recipe": plan.recipe,
        "release": plan.release,
        "importance": plan.importance and plan.importance.name,
        "moments": plan.moments and plan.moments.name,
        "files": files,
        "tensors": tensors,
    }


def _listed(source: Source, out: OutEntry, file: str, record: dict[str, Any]) -> dict[str, Any]:
    """An entry's lines of the manifest, one a plane."""
    name, shards = source.origin(out.entry)
    shared = {
        "file": file,
        "format": out.format,
        "source": {"tensor": name, "files": shards},
        "lossless": out.lossless,
    }
    return {
        plane.name: {
            **shared,
            **(_loss(record) if out.quantised and plane.plane == "weight" else {}),
            "dtype": plane.dtype,
            "shape": list(plane.shape),
            "sha256": record["planes"][plane.name],
        }
        for plane in out.planes
    }


def _loss(record: dict[str, Any]) -> dict[str, Any]:
    """What quantising lost: relative errors of the whole entry and of each matrix in it."""
    loss = Loss(*record["loss"])
    errors = {"all": loss.relative, "weighted": loss.weighted, "matrices": record["errors"]}
    return {"relative_errors": errors}


def quality_report(manifest: dict[str, Any]) -> str:
    """Table of what quantising lost, by layer; with importances or moments, also as they weigh it."""
    tables = [_table(manifest, "relative error", "all")]
    if manifest["importance"] or manifest["moments"]:
        title = "in the outputs" if manifest["moments"] else "by importance"
        tables.append(_table(manifest, title, "weighted"))
    return "\n".join(table for table in tables if table)


def _table(manifest: dict[str, Any], title: str, which: str) -> str:
    """The relative errors of the routed experts, a line a layer; nothing if none were quantised."""
    rows: dict[str, dict[str, float]] = {}
    for name, listed in manifest["tensors"].items():
        if "relative_errors" in listed:
            layer, _, part = name.removesuffix(".weight").partition(".ffn.experts.")
            rows.setdefault(layer, {})[part] = listed["relative_errors"][which]
    if not rows:
        return ""
    lines = [f"{title:<16} {'gate':>9} {'down':>9} {'up':>9}"]
    for layer, parts in rows.items():
        errors = (f"{parts[p]:.5f}" if p in parts else "exact" for p in ("w1", "w2", "w3"))
        lines.append(f"{layer:<16} " + " ".join(f"{each:>9}" for each in errors))
    return "\n".join(lines)
