"""What `bench` measured of a model, as a table, as CSV, and as a plot."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict

from ds4mlx.bench.plot import Line, plot
from ds4mlx.bench.whole_model import Row

# Of a column: its title, the field it shows, and how.
COLUMNS = (
    ("depth", "depth", "d"),
    ("batch", "batch", "d"),
    ("prefill t/s", "prefill_tokens_per_s", ".1f"),
    ("decode t/s", "decode_tokens_per_s", ".2f"),
    ("ms/step", "decode_ms", ".2f"),
    ("host ms", "host_ms", ".2f"),
    ("launches/layer", "launches_per_layer", ".1f"),
    ("read GB", "read_gb", ".3f"),
    ("moved GB", "moved_gb", ".3f"),
    ("of limit", "bandwidth_share", ".1%"),
    ("peak GB", "peak_gb", ".2f"),
)
DRAFTED = (
    ("drafted t/s", "draft_tokens_per_s", ".2f"),
    ("accepted", "draft_acceptance", ".1%"),
    ("t/round", "draft_tokens_per_round", ".2f"),
)


def table(rows: Sequence[Row]) -> str:
    """For people: a line a depth, which of them are of random rows, and a step's launches by kernel."""
    drafted = any(row.draft_acceptance is not None for row in rows)
    columns = COLUMNS + DRAFTED if drafted else COLUMNS
    lines = ["".join(f"{title:>{_wide(title)}}" for title, _, _ in columns)]
    for row in rows:
        values = {**asdict(row), "read_gb": row.weights_gb + row.rows_gb}
        cells = ((title, values[name], form) for title, name, form in columns)
        lines.append(
            "".join(f"{_cell(value, form):>{_wide(title)}}" for title, value, form in cells)
        )
    for row in rows:
        if row.fill == "synthetic":
            lines.append(
                f"depth {row.depth}: after random rows; prefill of the last {row.prefill_tokens} tokens"
            )
    last = rows[-1]
    lines += ["", f"launches of a step at depth {last.depth}, counted for {last.counted_for}:"]
    for name, count in (*last.kernels.items(), *last.others.items()):
        kind = "" if name in last.kernels else "  (of MLX's own)"
        lines.append(f"{count:>8}  {name}{kind}")
    return "\n".join(lines)


def _wide(title: str) -> int:
    return max(10, len(title) + 2)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV, with a header; of launches by name, "name:count" with a space between."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(asdict(rows[0])))
    writer.writeheader()
    for row in rows:
        named = {name: _counts(getattr(row, name)) for name in ("kernels", "others")}
        writer.writerow({**asdict(row), **named})
    return out.getvalue()


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{name}:{count}" for name, count in counts.items())


def plot_text(rows: Sequence[Row], title: str) -> str:
    """Tokens a second against depth as SVG: of decoding, and of prefilling where it was measured."""
    decoded = [(row.depth, row.decode_tokens_per_s) for row in rows]
    read = [(row.depth, row.prefill_tokens_per_s) for row in rows if row.prefill_tokens_per_s]
    lines = [Line("decode", decoded), *([Line("prefill", read)] if read else [])]
    random = [row.depth for row in rows if row.fill == "synthetic"]
    title += f", after random rows from depth {min(random)} on" if random else ""
    return plot(lines, title, "depth, tokens", "tokens a second")
