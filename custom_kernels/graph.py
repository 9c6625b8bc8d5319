"""MLX's own operations in a graph that is not evaluated yet: which, how large, and what they move.

And what of their outputs, and of those of recorded launches, is in memory at a time.
"""

import io
import math
import re
from collections import Counter
from itertools import accumulate
from typing import Any

import mlx.core as mx

from ds4mlx.custom_kernels.recorder import Operation, Spec

# Operations that only look at memory another way.
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten"),
    *("Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}
# Operations that read no more of their first input than they write.
GATHERS = {"Gather", "GatherAxis"}
# Products with chosen matrices: between their first input and the last two are stacks.
CHOOSING = {"GatherMM", "GatherQMM"}


def kinds(*outputs: mx.array) -> Counter[str]:
    """Operations that `outputs` wait for, by kind, views left out; nothing is evaluated."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    names = re.findall(r'label ?= ?"(\w+)"[^\]]*shape ?= ?rectangle', text.getvalue())
    return Counter(name for name in names if name not in VIEWS)


def operations(*outputs: mx.array) -> list[Operation]:
    """The same in the order of the graph, with shapes and bytes.

    Of the bytes that an operation reads: a broadcast array counts as the memory it stands for; where
    rows or matrices are chosen, only as many count as are; other inputs count in full. Raises
    ValueError where MLX does not tell an operation's shapes, as for its compiled ones.
    """
    told: list[dict[str, Any]] = []
    mx.export_function(told.append, lambda unused: list(outputs), mx.array(0))
    behind: dict[str, int] = {}  # bytes that a larger array, a broadcast one, stands for
    listed = []
    for part in told:
        if part["type"] != "primitive":
            continue
        if part["name"] in VIEWS:
            behind |= _behind(part, behind)
        else:
            listed.append(_operation(part, behind))
    return listed


def alive(*outputs: mx.array, late: int = 0) -> int:
    """The most bytes of what operations and recorded launches make that are in memory at a time.

    In the order of the graph; what an operation reads for the last time is given back as many
    operations later as `late` says, as by a GPU that many of them have been submitted to. Neither
    zeros nor what was evaluated before counts. Raises ValueError as `operations` does.
    """
    told: list[dict[str, Any]] = []
    mx.export_function(told.append, lambda unused: list(outputs), mx.array(0))
    parts = [part for part in told if part["type"] == "primitive"]
    memory = _Memory()
    for number, part in enumerate(parts):
        memory.see(number, part)
    changes = [0] * (len(parts) + late + 2)
    for buffer, size in memory.sizes.items():
        changes[memory.made[buffer]] += size
        changes[memory.read[buffer] + 1 + late] -= size
    return max(accumulate(changes))


class _Memory:
    """The buffers behind the arrays of a graph: when each is made and last read, and its bytes."""

    def __init__(self) -> None:
        self.behind: dict[str, str] = {}  # the buffer that an array lies in
        self.sizes: dict[str, int] = {}
        self.made: dict[str, int] = {}
        self.read: dict[str, int] = {}

    def see(self, number: int, part: dict[str, Any]) -> None:
        """Take in the next operation."""
        inputs = [self.behind[name] for name, *_ in part["inputs"] if name in self.behind]
        self.read |= dict.fromkeys(inputs, number)
        for place, (name, *spec) in enumerate(part["outputs"]):
            source = part["inputs"][place if part["name"] == "Depends" else 0][0]
            source, size = self.behind.get(source), Spec(*spec).nbytes
            if part["name"] == "Full" or (part["name"] in VIEWS and source is None):
                size = (
                    0  # zeros, a recorded launch's among them, or a view of what was there before
                )
            elif part["name"] == "Depends" and source is not None and not self.sizes[source]:
                source = None  # an output of a recorded launch
            if part["name"] in VIEWS and source is not None:
                self.behind[name] = source
                continue
            self.behind[name], self.sizes[name] = name, size
            self.made[name] = self.read[name] = number


def _behind(view: dict[str, Any], behind: dict[str, int]) -> dict[str, int]:
    """The outputs of a view that stand for fewer bytes than they have, and for how many."""
    sizes = []
    for name, *spec in view["inputs"]:
        sizes.append(behind.get(name, Spec(*spec).nbytes))
    if view["name"] != "Depends":  # whose outputs are its first inputs
        sizes = sizes[:1] * len(view["outputs"])
    outputs = ((name, Spec(*spec).nbytes) for name, *spec in view["outputs"])
    pairs = zip(outputs, sizes, strict=False)
    return {name: size for (name, nbytes), size in pairs if size < nbytes}


def _operation(part: dict[str, Any], behind: dict[str, int]) -> Operation:
    inputs, outputs = ([Spec(*spec) for _, *spec in part[side]] for side in ("inputs", "outputs"))
    read = [
        min(spec.nbytes, behind.get(name, spec.nbytes))
        for (name, *_), spec in zip(part["inputs"], inputs, strict=True)
    ]
    if part["name"] in GATHERS:
        read[0] = min(read[0], sum(output.nbytes for output in outputs))
    if part["name"] in CHOOSING:
        count = math.prod(outputs[0].shape[:-2])
        for i, stack in enumerate(inputs[1:-2], 1):
            read[i] = round(read[i] * min(1.0, count / stack.shape[0]))
    return Operation(part["name"], tuple(inputs), tuple(outputs), sum(read))
