"""The loss curve of a run as a picture.

python -m train.plot RUN/log.json OUT.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from train.batches import VALUE_WEIGHT


def main(log: Path, out: Path) -> None:
    """Draw the text's and the drafts' loss against tokens; a line where the length changes."""
    records = json.loads(log.read_text())
    tokens = [r["tokens"] / 1e6 for r in records]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=100)
    axes.plot(tokens, [r["text"] for r in records], label="next token")
    drafts = [(t, r["draft"]) for t, r in zip(tokens, records, strict=True) if r["draft"]]
    axes.plot(*zip(*drafts, strict=True), label="token after next (MTP)")
    changes = [
        (t, r["length"])
        for t, r, before in zip(tokens[1:], records[1:], records, strict=False)
        if r["length"] != before["length"]
    ]
    for at, length in changes:
        axes.axvline(at, color="grey", linewidth=0.8)
        axes.text(at, 4.2, f" {int(length)} tokens", fontsize=8)
    axes.set(
        xlabel="million tokens",
        ylabel=f"loss, nats (values to look up weigh {VALUE_WEIGHT:g})",
        ylim=(0.8, 4.5),
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
