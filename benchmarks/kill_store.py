"""kill -9 at random moments while a KV store is written, evicted from and read.

One writer saves prefixes of a few branching conversations, two readers restore them and compare
every byte, and another process probes all the while what is in use and writes lines of another
version into the index. The writer is killed at a random moment, now and then the others too; then
everything that was acknowledged is looked for. Four stores in turn: one without a limit, one whose
budget makes nearly every save evict, one from which the probing process evicts whatever is free (what
the writer has just saved is in use, so it must stay), and one on a full file system (a tmpfs; needs
the right to mount).

    python benchmarks/kill_store.py [--kills 1000] [--renew N] [--seed N] [--scratch DIR] [--results FILE]

Processes are forked, so it runs on Linux, on the CPU.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from device import device

from ds4mlx import DataError, KVStore, Model
from ds4mlx.bench.synthetic_state import SMALL, same_state, synthetic_state
from ds4mlx.store import eviction
from ds4mlx.store.catalogue import Catalogue
from ds4mlx.store.directory import INDEX
from ds4mlx.store.eviction import StoreFull
from ds4mlx.store.journal import Journal
from ds4mlx.store.locks import is_pinned

LONGEST = 1500
DISK = 3 << 20
EVICTED = "evicted beside"
BUDGETS = {"unlimited": 1 << 40, "evicting": 1 << 20, EVICTED: 1 << 40, "full disk": 1 << 40}
LONGEST_LIFE = 0.4  # seconds until a writer is killed
RENEW = 60  # kills after which a store is begun anew


def conversation(branch: int) -> np.ndarray:
    """Tokens of one of 16 conversations: 4 beginnings, each with 4 ends."""
    start = np.random.default_rng(branch % 4).integers(0, 512, 700)
    return np.concatenate([start, np.random.default_rng(100 + branch).integers(0, 512, 800)])


class Trial:
    """A store in `directory`, and what was acknowledged in it."""

    def __init__(self, directory: Path, kind: str, model: Model):
        self.directory, self.kind, self.model = directory / "store", kind, model
        self.acknowledged = directory / "acknowledged"
        self.acknowledged.touch()
        self.begun, self.begin = os.pipe()
        self.seen = 0  # acknowledged saves of the writers before

    def open(self) -> KVStore:
        """The store as every process opens it."""
        least = -(1 << 50) if self.kind == "full disk" else 0
        return KVStore(self.directory, BUDGETS[self.kind], self.model, min_free_bytes=least)

    def write(self, seed: int) -> None:
        """Save until killed; every line of `acknowledged` is a save that has returned."""
        rng, store, last = random.Random(seed), self.open(), None
        log = os.open(self.acknowledged, os.O_WRONLY | os.O_APPEND)
        os.write(self.begin, b"!")
        while True:
            branch, length = rng.randrange(16), rng.randint(1, LONGEST)
            tokens = conversation(branch)[:length]
            state = synthetic_state(self.model, tokens, 256)
            with contextlib.suppress(DataError):  # full: then it is not acknowledged
                store.save(tokens, state, rng.choice(["cold", "continue", "evict", "shutdown"]))
                os.write(log, f"{branch} {length}\n".encode())
                last = state  # in use: it must outlive all evictions until the next save
                if self.kind == EVICTED:
                    count = self.compare(store, branch, length)
                    assert count == length, f"{branch} {length} is in use, but {count} is there"
        assert last is None

    def read(self, seed: int) -> None:
        """Restore and compare until killed."""
        rng, store = random.Random(seed), self.open()
        while True:
            self.compare(store, rng.randrange(16), rng.randint(1, LONGEST))

    def probe(self, seed: int) -> None:
        """Probe what is in use, and speak as another version, until killed; evict where asked."""
        rng, catalogue = random.Random(seed), Catalogue(self.directory)
        index = Journal(self.directory / INDEX)
        while True:
            catalogue.refresh()
            for segment in list(catalogue.segments.values()):
                is_pinned(catalogue.path(segment))
            items = [*catalogue.segments.values(), *catalogue.records.values()]
            if items and rng.random() < 0.1:
                changed = {**asdict(rng.choice(items)), "colour": "blue"}
                with contextlib.suppress(OSError):  # a full disk
                    index.append([{"add": changed}, {"another": "version"}])
            if self.kind == EVICTED:
                with contextlib.suppress(StoreFull), catalogue.writing():
                    catalogue.refresh()
                    wanted = catalogue.nbytes // rng.randint(1, 4)
                    eviction.evict(catalogue, eviction.plan(catalogue, wanted))

    def check(self, seed: int) -> None:
        """Look for what was acknowledged: some of it and the last; where saves evict, only the last.

        And that only if it was the writer just killed who saved it: what a dead process had in use
        may be evicted.
        """
        rng, store = random.Random(seed), self.open()
        lines = self.lines()
        wanted = lines[-4:] + rng.sample(lines, min(12, len(lines)))
        if self.kind == "evicting":
            wanted = lines[self.seen :][-1:]
        if self.kind == EVICTED:
            wanted = []
        for branch, length in wanted:
            found = self.compare(store, branch, length)
            assert found == length, f"{branch} {length} was acknowledged, but {found} is there"
        before = len(list((self.directory / "damaged").iterdir()))
        assert before == 0, "a file was found damaged"

    def lines(self) -> list[list[int]]:
        """Branch and length of every acknowledged save."""
        whole = self.acknowledged.read_text().split("\n")[:-1]
        return [[int(word) for word in line.split()] for line in whole]

    def compare(self, store: KVStore, branch: int, length: int) -> int:
        """Restore a prefix; AssertionError if anything in it is not as it was saved."""
        tokens = conversation(branch)[:length]
        state, found = store.restore(tokens)
        if found:
            assert same_state(state, synthetic_state(self.model, tokens[:found])), "wrong bytes"
        return found


def forked(work: Callable[[int], None], seed: int) -> int:
    """Do work(seed) in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work(seed)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the parent only sees the exit code
        traceback.print_exc()
        os._exit(1)


def killed(pid: int) -> bool:
    """Kill a process; whether it was still alive and well."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        return os.waitstatus_to_exitcode(status) == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def trial(directory: Path, kind: str, model: Model, kills: int, rng: random.Random) -> list[str]:
    """Kill `kills` writers on one store; what went wrong."""
    if kind == "full disk" and not filled(directory, rng):
        return ["no right to mount a tmpfs"]
    subject, faults = Trial(directory, kind, model), []
    subject.open().close()
    works = [subject.read, subject.read, subject.probe]
    others = [forked(work, rng.randrange(1 << 30)) for work in works]
    for number in range(kills):
        writer = forked(subject.write, rng.randrange(1 << 30))
        os.read(subject.begun, 1)
        time.sleep(rng.uniform(0, LONGEST_LIFE))
        if not killed(writer):
            faults.append(f"{kind}: a writer failed")
        if number % 7 == 6:
            place = rng.randrange(3)
            if not killed(others[place]):
                faults.append(f"{kind}: {works[place].__name__} failed")
            others[place] = forked(works[place], rng.randrange(1 << 30))
        checker = forked(subject.check, rng.randrange(1 << 30))
        if os.waitpid(checker, 0)[1]:
            faults.append(f"{kind}: what was acknowledged is not there after kill {number}")
        subject.seen = len(subject.lines())
    os.close(subject.begun)
    os.close(subject.begin)
    pairs = zip(works, others, strict=True)
    faults += [f"{kind}: {work.__name__} failed" for work, other in pairs if not killed(other)]
    return faults


def filled(directory: Path, rng: random.Random) -> bool:
    """Mount a small file system there and leave little of it free; False without the right to."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    (directory / "filler").write_bytes(bytes(rng.randint(0, DISK // 2)))
    return True


def run(kills: int, seed: int, scratch: Path | None, renew: int) -> dict:
    """The whole harness; its findings. A store is begun anew after `renew` kills."""
    model, rng, begun = Model(SMALL), random.Random(seed), time.perf_counter()
    model.identity = "synthetic"
    counts, faults, acknowledged = dict.fromkeys(BUDGETS, 0), [], 0
    skipped: set[str] = set()
    while sum(counts.values()) < kills:
        kind = min((k for k in BUDGETS if k not in skipped), key=lambda k: counts[k])
        some = min(renew, kills - sum(counts.values()))
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            found = trial(Path(place), kind, model, some, rng)
            log = Path(place) / "acknowledged"
            acknowledged += log.read_text().count("\n") if log.exists() else 0
            subprocess.run(["umount", place], capture_output=True, check=False)
        if found == ["no right to mount a tmpfs"]:
            skipped.add(kind)
            continue
        counts[kind] += some
        faults += found
        print(
            f"{sum(counts.values())} kills, {acknowledged} saves acknowledged, {len(faults)} faults"
        )
    return {
        "device": device(),
        "kills": counts,
        "skipped": sorted(skipped),
        "acknowledged": acknowledged,
        "faults": faults,
        "seconds": round(time.perf_counter() - begun),
    }


def main() -> None:
    """Run it; exit code 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--renew", type=int, default=RENEW, help="kills of one store")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    found = run(arguments.kills, arguments.seed, arguments.scratch, arguments.renew)
    print(json.dumps(found, indent=1))
    if arguments.results:
        arguments.results.write_text(json.dumps({**found, "seed": arguments.seed}, indent=1) + "\n")
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
