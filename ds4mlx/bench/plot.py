"""A plot of lines as SVG, both axes logarithmic: enough for speed against depth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 70, 110, 40, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


@dataclass(frozen=True)
class Line:
    """A line of a plot: its name, and its points, all above zero."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: values `low` to `high` lie at `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of every power of ten on the axis; the powers alone, if those are many."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(powers) <= 4 else (1,)
        values = [step * 10.0**power for power in powers for step in steps]
        return [value for value in values if self.low <= value <= self.high]


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """One that has all values on it, with some room."""
    return Axis(min(values) / 1.3, max(values) * 1.3, start, end)


def plot(lines: Sequence[Line], title: str, across: str, up: str) -> str:
    """The SVG text; `across` and `up` say what the axes are of."""
    points = [point for line in lines for point in line.points]
    x = axis([point[0] for point in points], LEFT, WIDTH - RIGHT)
    y = axis([point[1] for point in points], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text((LEFT + WIDTH - RIGHT) / 2, 22, title, "middle"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, across, "middle"),
        _text(8, TOP - 12, up, "start"),
    ]
    for value in x.ticks():
        parts.append(_rule(x.at(value), TOP, x.at(value), HEIGHT - BOTTOM))
        parts.append(_text(x.at(value), HEIGHT - BOTTOM + 18, f"{value:,.12g}", "middle"))
    for value in y.ticks():
        parts.append(_rule(LEFT, y.at(value), WIDTH - RIGHT, y.at(value)))
        parts.append(_text(LEFT - 6, y.at(value) + 4, f"{value:,.12g}", "end"))
    for number, line in enumerate(lines):
        parts += _line(line, x, y, COLOURS[number % len(COLOURS)])
    return "\n".join([*parts, "</svg>", ""])


def _line(line: Line, x: Axis, y: Axis, colour: str) -> list[str]:
    places = [(x.at(a), y.at(b)) for a, b in sorted(line.points)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
    drawn = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    end = places[-1]
    return [drawn, *dots, _text(end[0] + 8, end[1] + 4, line.name, "start", colour)]


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "black") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
