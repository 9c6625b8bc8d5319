"""The journal of an unfinished conversion: what is durable already, and who is at work.

One JSON object a line, appended after the data it speaks of has reached the disk. A torn last line
(a kill, a full disk) is ignored. The open journal is locked, so two conversions never share a
directory.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ds4mlx.directory import JOURNAL
from ds4mlx.errors import DataError


class Journal:
    """Opens or starts the journal of `directory` for the plan with this fingerprint.

    Raises DataError if another process holds it or it belongs to another plan.
    """

    def __init__(self, directory: Path, plan: str):
        self.path = directory / JOURNAL
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise DataError(f"{directory}: another conversion is writing here") from None
        self.done: dict[str, dict[str, Any]] = {}  # complete file -> its record
        self.progress: dict[str, dict[str, Any]] = {}  # unfinished file -> its last record
        records = self._read()
        if not records:
            self.append({"plan": plan})
        elif records[0].get("plan") != plan:
            self.close()
            raise DataError(
                f"{directory}: holds an unfinished conversion of another source, recipe or release; "
                "finish that one or use --overwrite"
            )
        for record in records[1:]:
            (self.done if "header" in record else self.progress)[record["file"]] = record

    def append(self, record: dict[str, Any]) -> None:
        """Add a record and wait until it is on the disk."""
        line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)

    def remove(self) -> None:
        """Delete the journal of a finished conversion."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _read(self) -> list[dict[str, Any]]:
        """All whole records; a torn tail is cut off."""
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.ftruncate(self._fd, len(whole))
        return [json.loads(line) for line in whole.splitlines()]
