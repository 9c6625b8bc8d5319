"""How much longer `import ds4mlx` takes than importing what it stands on.

    python benchmarks/import_time.py

Medians of five warm runs in fresh processes: of MLX and NumPy alone, with `import ds4mlx` after them,
and with every name that ds4mlx exports. Exits with 1 if the second is more than 0.3 s above the first.
"""

import json
import statistics
import subprocess
import sys
import time

BASE = "import mlx.core, mlx.nn, numpy"
STATEMENTS = {
    "base": BASE,
    "ds4mlx": f"{BASE}, ds4mlx",
    "every name": f"{BASE}; from ds4mlx import *",
}
RUNS, MOST = 5, 0.3


def seconds(statement: str) -> float:
    """Wall-clock seconds of a fresh Python that runs one statement."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begun


def main() -> None:
    """Print the medians in seconds, and as the last line the same as JSON."""
    for statement in STATEMENTS.values():
        seconds(statement)
    runs: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(RUNS):  # in turn, so that a busy machine slows all alike
        for name, statement in STATEMENTS.items():
            runs[name].append(seconds(statement))
    medians = {name: round(statistics.median(times), 3) for name, times in runs.items()}
    for name, median in medians.items():
        print(f"{median:6.3f} s  {STATEMENTS[name]}")
    print(json.dumps(medians))
    sys.exit(medians["ds4mlx"] - medians["base"] > MOST)


if __name__ == "__main__":
    main()
