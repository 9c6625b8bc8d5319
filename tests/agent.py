"""A stand-in for a coding agent: writes down how it was started, and may wait.

$RECORD: the file to write. $ASK: whether to ask the server how it is. $WAIT: wait for Ctrl-C.
"""

import json
import os
import signal
import sys
import urllib.request
from pathlib import Path


def files() -> dict[str, str]:
    """The contents of files that arguments name, by their base names."""
    named = [Path(word) for word in sys.argv[1:] if word.startswith("/")]
    return {path.name: path.read_text() for path in named if path.is_file()}


def main() -> None:
    """Record, then do what the variables ask for."""
    told = {
        "arguments": sys.argv[1:],
        "variables": dict(os.environ),
        "files": files(),
        "interrupts": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    }
    if os.environ.get("ASK"):
        with urllib.request.urlopen(f"{os.environ['ASK']}/health", timeout=20) as answer:
            told["health"] = json.load(answer)
    record = Path(os.environ["RECORD"])
    record.with_suffix(".part").write_text(json.dumps(told))
    record.with_suffix(".part").rename(record)
    if os.environ.get("WAIT"):
        try:
            signal.pause()
        except KeyboardInterrupt:
            sys.exit(3)


if __name__ == "__main__":
    main()
