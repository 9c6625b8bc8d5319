"""Draws docs/feedback.svg: what error feedback does to two weights, and what it gains.

The gains are those of `benchmarks/results/two_bits.json`.
"""

import json
import math
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/two_bits.json"
BLUE, RED, GREY, INK = "#30638e", "#d1495b", "#b8bec6", "#22272e"
# Two weights whose inputs have this correlation; storable are the whole numbers.
WEIGHTS, CORRELATION = (0.40, 0.45), 0.8
SIDE, LEFT, TOP = 240, 60, 70  # the left panel: points a unit, and where (0, 0) and 1 lie
ROWS = (
    ("q2 with importances at 2f2d5eb", "importances, before", GREY),
    ("q2 with importances", "importances", BLUE),
    ("q2 with moments", "second moments of a layer", RED),
    ("q2 with moments, down per expert", "and of each expert for down", "#edae49"),
)


def picture(results: dict) -> str:
    """Both panels."""
    body = [text(30, 28, "Two weights whose inputs go together", 15, weight="bold")]
    body += [text(430, 28, "KL divergence to float32, nats a token", 15, weight="bold")]
    body += weights() + bars(results)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 420" '
        'font-family="Helvetica, Arial, sans-serif">\n<rect width="840" height="420" '
        f'fill="white"/>\n{chr(10).join(body)}\n</svg>\n'
    )


def weights() -> list[str]:
    """The plane of both weights, with the ellipses of equal error in the output."""
    plain = tuple(round(w) for w in WEIGHTS)
    goal = WEIGHTS[1] + CORRELATION * (WEIGHTS[0] - plain[0])
    fed = (plain[0], round(goal))
    shapes = ['<clipPath id="left"><rect x="20" y="45" width="390" height="330"/></clipPath>']
    shapes += ['<g clip-path="url(#left)">', ellipse(error(plain), GREY)]
    shapes += [ellipse(error(fed), BLUE), "</g>"]
    shapes += [dot((x, y), GREY, 4) for x in (0, 1) for y in (0, 1)]
    shapes += [arrow(WEIGHTS, plain, GREY), arrow(WEIGHTS, (plain[0], goal), BLUE)]
    shapes += [arrow((plain[0], goal), fed, BLUE)]
    shapes += [dot(plain, GREY, 7), dot(fed, BLUE, 7), dot(WEIGHTS, INK, 5)]
    x, y = place(WEIGHTS)
    shapes.append(text(x + 10, y + 4, "exact", 13))
    shapes.append(label(plain, f"each to the nearest: error {error(plain):.2f}", GREY, 26))
    shapes.append(label(fed, f"the second makes good the first: {error(fed):.2f}", BLUE, -16))
    return [*shapes, text(30, 400, "The smaller the ellipse, the less the output is off.", 13)]


def error(stored: tuple[float, float]) -> float:
    """What the output is off by, squared, for inputs of size 1."""
    a, b = (w - s for w, s in zip(WEIGHTS, stored, strict=True))
    return a * a + b * b + 2 * CORRELATION * a * b


def place(point: tuple[float, float]) -> tuple[float, float]:
    return LEFT + 30 + SIDE * point[0], TOP + SIDE * (1 - point[1])


def ellipse(size: float, colour: str) -> str:
    """The weights whose error is `size`."""
    x, y = place(WEIGHTS)
    long, short = (SIDE * math.sqrt(size / (1 + sign * CORRELATION)) for sign in (-1, 1))
    return (
        f'<ellipse rx="{long:.1f}" ry="{short:.1f}" fill="{colour}" fill-opacity="0.12" '
        f'stroke="{colour}" transform="translate({x:.1f} {y:.1f}) rotate(45)"/>'
    )


def dot(point: tuple[float, float], colour: str, radius: int) -> str:
    x, y = place(point)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'


def arrow(a: tuple[float, float], b: tuple[float, float], colour: str) -> str:
    (x, y), (u, v) = place(a), place(b)
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{u:.1f}" y2="{v:.1f}" stroke="{colour}" '
        'stroke-width="2" stroke-dasharray="5 3"/>'
    )


def label(point: tuple[float, float], words: str, colour: str, below: int) -> str:
    x, y = place(point)
    return text(x - 50, y + below, words, 13, INK if colour == GREY else colour)


def bars(results: dict) -> list[str]:
    """One group of bars for each text."""
    shapes, base, scale = [], 340, 1000
    for column, (name, what) in enumerate((("A", "code"), ("B", "code"), ("C", "prose"))):
        for row, (key, _, colour) in enumerate(ROWS):
            value, x = results[key][name]["kl"], 440 + 130 * column + 27 * row
            height = scale * value
            shapes.append(
                f'<rect x="{x}" y="{base - height:.1f}" width="24" height="{height:.1f}" '
                f'fill="{colour}"/>'
            )
            shapes.append(text(x + 12, base - height - 4, f"{value:.3f}"[1:], 10, anchor="middle"))
        shapes.append(text(493 + 130 * column, base + 16, f"{name}, {what}", 13, anchor="middle"))
    for row, (_, words, colour) in enumerate(ROWS):
        x, y = 440 + 200 * (row % 2), 380 + 20 * (row // 2)
        shapes.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{colour}"/>')
        shapes.append(text(x + 16, y, words, 13))
    return shapes


def text(
    x: float, y: float, words: str, size: int, colour: str = INK, anchor: str = "start", **more: str
) -> str:
    rest = "".join(f' font-{name}="{value}"' for name, value in more.items())
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}"{rest}>{words}</text>'
    )


if __name__ == "__main__":
    (ROOT / "docs/feedback.svg").write_text(picture(json.loads(RESULTS.read_text())))
