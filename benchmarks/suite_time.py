"""How long the whole suite takes on this machine, with nothing else running; kept in results/suite_cpu.json.

The file has one entry a run: commit, date, processor, what pytest says, seconds.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

from device import device

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/suite_cpu.json"


def output(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    begin = time.perf_counter()
    summary = output(sys.executable, "-m", "pytest").splitlines()[-1]
    entry = {
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "summary": summary,
        "seconds": round(time.perf_counter() - begin),
    }
    print(json.dumps(entry))
    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*runs, entry], indent=1) + "\n")


if __name__ == "__main__":
    main()
