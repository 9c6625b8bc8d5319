"""What NVIDIA's Nsight Compute says of the launches that a script makes of itself."""

import csv
import os
import subprocess
import sys
from collections.abc import Mapping

# What a value in a unit is in seconds or in bytes.
UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "nsecond": 1e-9,
    "usecond": 1e-6,
    "byte": 1.0,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
}

Launch = dict[str, str]  # what a line of a table says, by its column


def profile(
    wanted: list[str], script: str, options: list[str], environment: Mapping[str, str] | None = None
) -> str:
    """What `ncu` (or $NCU) prints of a script's launches, with clocks as they are. Exits where it fails."""
    ncu = [os.environ.get("NCU", "ncu"), "--clock-control", "none", *wanted]
    command = [*ncu, sys.executable, script, *options]
    given = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def raw(metrics: tuple[str, ...]) -> list[str]:
    """The options for a table of metrics that `table` reads."""
    return ["--csv", "--page", "raw", "--metrics", ",".join(metrics)]


def table(text: str) -> tuple[Launch, list[Launch]]:
    """The units of the columns, and the launches, of a raw page."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    units, *launches = csv.DictReader(lines[begin:])
    return units, launches


def value(text: str, unit: str) -> float:
    """A number of a table in seconds or in bytes."""
    return float(text.replace(",", "")) * UNITS[unit]
