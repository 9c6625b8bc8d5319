"""The host's time for a decoded token, of several trees or settings that take turns on one GPU.

    python benchmarks/step_pairs.py [--layers 8] [--batch 1] [--rounds 50] [--results FILE] \
        NAME=DIRECTORY[,VARIABLE=VALUE...] ...

A host's pace changes by half within seconds, so that one run after the other says little. Here each
directory's package, with its environment, has a process and a model of Flash's sizes with random weights;
in every round each takes some steps, and what counts is its share of the first one's time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from device import device

STEPS, SETTLING = 46, 6  # of a turn, and those at its beginning that do not count


def main() -> None:
    """Take turns, and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sides", nargs="*", help="NAME=DIRECTORY[,VARIABLE=VALUE...]")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.layers, asked.batch)
        return
    names = [side.partition("=")[0] for side in asked.sides]
    if not names or len(set(names)) < len(names) or not all("=" in side for side in asked.sides):
        parser.error("each side is NAME=DIRECTORY, of a name of its own")
    processes = dict(zip(names, (started(side, asked) for side in asked.sides), strict=True))
    name_of = [line(each.stdout) for each in processes.values()].pop()
    turns: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(asked.rounds):
        for name, process in processes.items():
            turns[name].append(turn(process))
    first = next(iter(turns.values()))
    rows = {name: summary(own, first) for name, own in turns.items()}
    found = {"device": name_of, "layers": asked.layers, "batch": asked.batch, "ms": rows}
    print(json.dumps(found, indent=1))
    if asked.results:
        asked.results.write_text(json.dumps(found, indent=1) + "\n")
    for process in processes.values():
        process.communicate()


def started(side: str, asked: argparse.Namespace) -> subprocess.Popen[str]:
    """The process of a side, which waits for turns."""
    named, *settings = side.partition("=")[2].split(",")
    directory = str(Path(named).resolve(strict=True))
    path = os.pathsep.join([directory, os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        **dict(each.split("=", 1) for each in settings),
        "PYTHONPATH": path,
    }
    sizes = ["--layers", str(asked.layers), "--batch", str(asked.batch)]
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", *sizes]
    return subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def turn(process: subprocess.Popen[str]) -> float:
    """Milliseconds of the host for a step, in one turn."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(line(process.stdout))


def line(stream: IO[str] | None) -> str:
    """The next line that a process writes. Exits where it has ended."""
    text = stream.readline().strip() if stream is not None else ""
    return text or sys.exit("a side has ended")


def summary(own: list[float], first: list[float]) -> dict[str, float]:
    """Of turns: the median, the least, and the median share of the first side's time."""
    shares = [a / b for a, b in zip(own, first, strict=True)]
    parts = {
        "median": statistics.median(own),
        "least": min(own),
        "share": statistics.median(shares),
    }
    return {name: round(value, 3) for name, value in parts.items()}


def serve(layers: int, batch: int) -> None:
    """Take a turn for every line of standard input."""
    import mlx.core as mx

    from ds4mlx.bench.synth import config_like, synth_model
    from ds4mlx.bench.whole_model import synthetic_state

    model = synth_model(config_like("flash", layers), "q2")
    states = [synthetic_state(model, 2048) for _ in range(batch)]
    token = mx.ones((batch,), mx.int32)

    def steps(count: int) -> list[float]:
        nonlocal token
        times = []
        for _ in range(count):
            before, begun = token, time.perf_counter()
            token = mx.argmax(model.step(token, states), axis=-1)
            mx.async_eval(token)
            times.append(1000 * (time.perf_counter() - begun))
            mx.eval(before)
        mx.synchronize()
        return times

    steps(STEPS)
    print(device(), flush=True)
    for _ in sys.stdin:
        print(statistics.median(steps(STEPS)[SETTLING:]), flush=True)


if __name__ == "__main__":
    main()
