"""Collects importances in a process that a signal ends at its n-th change to the disk.

python collecting.py MODEL PROMPTS OUTPUT [MOMENTS] N SIGNAL: saves after every sequence; prints how many
changes there were in all.
"""

import gc
import subprocess
import sys
from pathlib import Path

import dying
import mlx.core as mx

from ds4mlx import load
from ds4mlx.imatrix.collect import collect

LENGTH = 48


def collected(model_dir, prompts, output, model=None, at=None, **options):
    """Collect with the tests' settings; the report. at: InterruptAt, from the model's loading on.

    Garbage is left meanwhile: what is called to collect it would be counted, and swallows Ctrl-C.
    """

    def load_model():
        if at is not None:
            at.__enter__()
        return model or load(model_dir, mx.float32)[0]

    gc.disable()
    known = {"length": LENGTH, "progress": False, **options}
    try:
        return collect(Path(model_dir), Path(prompts), Path(output), load_model, **known)
    finally:
        sys.setprofile(None)
        gc.enable()


def run_dying(model_dir, prompts, output, last, number, moments=()) -> subprocess.CompletedProcess:
    """Collect in such a process; moments: the file for them, if one is wanted."""
    arguments = [__file__, model_dir, prompts, output, *moments, last, int(number)]
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


if __name__ == "__main__":
    *paths, last, number = sys.argv[1:]
    countdown = dying.Countdown(int(last), int(number))
    moments = Path(paths.pop()) if len(paths) > 3 else None
    collected(*paths, save_seconds=0, moments=moments, per_expert=moments is not None)
    print(countdown.count)
