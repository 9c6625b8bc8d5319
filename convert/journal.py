"""The journal of an unfinished conversion: what is durable already, and who is at work.

One JSON object a line, appended after the data it speaks of has reached the disk. A torn last line
(a kill, a full disk) is ignored. The open journal is locked, so two conversions never share a
directory.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ds4mlx.durable import Busy, open_locked, sync, write_all
from ds4mlx.errors import DataError
from ds4mlx.weights.directory import JOURNAL


class Journal:
    """Opens or starts the journal of `directory` for the plan with this fingerprint.

    Raises DataError if another process holds it or it belongs to another plan.
    """

    def __init__(self, directory: Path, plan: str):
        self.path = directory / JOURNAL
        self._fd = _locked(directory, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.done: dict[str, dict[str, Any]] = {}  # complete file -> its entry
        self.progress: dict[str, dict[str, Any]] = {}  # unfinished file -> its last entry
        try:
            self._take_up(plan)
        except BaseException:
            self.close()
            raise

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry and wait until it is on the disk."""
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        write_all(self._fd, line)
        sync(self._fd)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)

    def remove(self) -> None:
        """Delete the journal of a finished conversion; it stays locked until it is closed."""
        self.path.unlink(missing_ok=True)

    def _take_up(self, plan: str) -> None:
        """Begin, or learn what the runs before have done."""
        entries = self._read()
        if not entries:
            self.append({"plan": plan})
        elif entries[0].get("plan") != plan:
            raise DataError(
                f"{self.path.parent}: holds an unfinished conversion of another source, or by other "
                "options; finish that one or use --overwrite"
            )
        for entry in entries[1:]:
            (self.done if "header" in entry else self.progress)[entry["file"]] = entry

    def _read(self) -> list[dict[str, Any]]:
        """All whole entries; a torn tail is cut off."""
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.ftruncate(self._fd, len(whole))
        try:
            entries = [json.loads(line) for line in whole.splitlines()]
            sound = all(isinstance(e, dict) and ("plan" in e or "file" in e) for e in entries)
        except ValueError:
            entries, sound = [], False
        if not sound:
            raise DataError(f"{self.path}: damaged; use --overwrite to begin anew")
        return entries


def check_unlocked(directory: Path) -> None:
    """DataError if a conversion is at work in the directory."""
    with contextlib.suppress(FileNotFoundError):
        os.close(_locked(directory, os.O_RDWR))


def _locked(directory: Path, flags: int) -> int:
    try:
        return open_locked(directory / JOURNAL, flags, 0o644, wait=False)
    except Busy:
        raise DataError(f"{directory}: another conversion is writing here") from None
