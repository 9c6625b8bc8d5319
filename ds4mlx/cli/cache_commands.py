"""`ds4mlx cache`: look at, check and thin the disk KV store."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ds4mlx.cli import arguments as arg
from ds4mlx.cli import opening

app = typer.Typer(no_args_is_help=True, help="Look at, check and thin the disk KV store.")

Directory = Annotated[
    Path | None,
    typer.Option("--kv-dir", help=f"Directory of the KV store; {arg.KV_PLACE} unless named."),
]
DAY = 86400.0


@app.command()
def ls(
    kv_dir: Directory = None,
    boundaries: Annotated[
        bool, typer.Option("--all", help="Also the boundaries that saves left behind them.")
    ] = False,
    as_json: arg.Json = False,
) -> None:
    """List the stored prefixes, newest first, with their hits."""
    from ds4mlx.store import admin

    catalogue = admin.open_directory(opening.kv_place(kv_dir))
    prefixes, sums = admin.entries(catalogue, boundaries), admin.totals(catalogue)
    if as_json:
        listed = [asdict(entry) for entry in prefixes]
        print(json.dumps({"prefixes": listed, "total": sums}, indent=1))
        return
    print(
        f"{'key':<12} {'tokens':>9} {'bytes':>13} {'hits':>5}  {'last used':<16} {'reason':<9} model"
    )
    for e in prefixes:
        used = _date(e.last_used)
        marks = (" (in use)" if e.in_use else "") + ("" if e.complete else " (incomplete)")
        print(
            f"{e.key[:12]:<12} {e.tokens:>9,} {e.nbytes:>13,} {e.hits:>5}  {used:<16} "
            f"{e.reason:<9} {e.label} {e.model}{marks}"
        )
    print(
        f"{len(prefixes)} prefixes; {sums['segments']} segments and {sums['records']} boundary records, "
        f"{sums['tokens']:,} tokens, {sums['bytes']:,} bytes, {sums['hits']} hits"
    )


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="Key of a prefix, or its beginning.")],
    kv_dir: Directory = None,
    as_json: arg.Json = False,
) -> None:
    """Show a stored prefix: its segments, boundaries, hits, and its text if that was kept."""
    from ds4mlx.store import admin

    catalogue = admin.open_directory(opening.kv_place(kv_dir))
    record = admin.find(catalogue, key)
    details = admin.details(catalogue, record)
    if as_json:
        print(json.dumps(details, indent=1))
        return
    use = catalogue.uses.get(record.key)
    lines = {
        "key": record.prefix,
        "tokens": f"{record.tokens:,}",
        "saved": f"{_date(record.created)} ({record.reason})",
        "last used": _date(use.last if use and use.last else record.created),
        "hits": use.total if use else 0,
        "model": record.model,
        "record": f"{record.nbytes:,} bytes",
        "boundaries": ", ".join(f"{n:,}" for n in details["boundaries"]),
    }
    for name, value in lines.items():
        print(f"{name:<12} {value}")
    print(f"\n{'segment':<12} {'tokens':>19} {'bytes':>13}")
    for segment in details["chain"]:
        span = f"{segment['start']:,}..{segment['used_to']:,}"
        print(f"{segment['key'][:12]:<12} {span:>19} {segment['nbytes']:>13,}")
    print("\n" + (details["text"] or "(the text was not kept)"))


@app.command()
def verify(kv_dir: Directory = None, as_json: arg.Json = False) -> None:
    """Read every byte of the store and check it; exit code 1 if something is damaged."""
    from ds4mlx.store import admin

    catalogue = admin.open_directory(opening.kv_place(kv_dir))
    faults = admin.check(catalogue)
    if as_json:
        print(json.dumps({"faults": faults, "total": admin.totals(catalogue)}, indent=1))
    else:
        for fault in faults:
            print(fault)
        count = len(catalogue.segments) + len(catalogue.records)
        print(f"{count} files, {len(faults)} faults")
    if faults:
        raise typer.Exit(1)


@app.command()
def prune(
    kv_dir: Directory = None,
    budget: Annotated[str | None, typer.Option(help="Evict down to this size, such as 8G.")] = None,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Delete what was not used for so many days.")
    ] = None,
) -> None:
    """Delete what is damaged or incomplete, and what is old or beyond a budget if asked."""
    from ds4mlx.store import admin

    limit = None if budget is None else arg.size(budget)
    seconds = None if older_than is None else older_than * DAY
    freed = admin.prune(admin.open_directory(opening.kv_place(kv_dir)), limit, seconds)
    print(f"{freed:,} bytes deleted")


@app.command()
def clear(
    kv_dir: Directory = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
) -> None:
    """Delete everything that the store has written; asks first, and leaves other files alone."""
    from ds4mlx.store import admin

    place = opening.kv_place(kv_dir)
    sums = admin.totals(admin.open_directory(place))
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("there is no terminal to ask at", param_hint="--yes")
        question = f"Delete {sums['bytes']:,} bytes, all that the KV store in {place} holds?"
        if not typer.confirm(question, err=True):
            print("nothing deleted")
            return
    freed, others = admin.clear(place)
    print(f"{freed:,} bytes deleted")
    for path in others:
        print(f"{path}: was not made by the store, and stays")


def _date(seconds: float) -> str:
    """A time of a store, in seconds since 1970, as the user's clock showed it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
