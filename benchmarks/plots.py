"""Charts as SVG files, from the measured documents: small, without a plotting library, the same bytes every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 44, 52
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000", "#999933", "#661100")
DARK, LIGHT = "#333333", "#dddddd"

Point = tuple[float, float]


@dataclass
class Axis:
    """Where values lie: `ticks` are the values that get a line and a label."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]
    logarithmic: bool = False
    label: Callable[[float], str] = "{:g}".format

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass
class Chart:
    """One picture: axes first, then what is drawn over them, then the legend."""

    title: str
    x: Axis
    y: Axis
    _marks: list[str] = field(default_factory=list)
    _legend: list[str] = field(default_factory=list)

    def _at(self, x: float, y: float) -> Point:
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + self.x.place(x) * width, TOP + (1 - self.y.place(y)) * height

    def line(self, name: str, points: Sequence[Point], colour: str, dashed: bool = False) -> None:
        """Points joined by a line."""
        placed = [self._at(*point) for point in points]
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        self._marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        self._marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        self._add_to_legend(name, f'stroke="{colour}" stroke-width="2"{dash}')

    def band(self, points: Sequence[tuple[float, float, float]], colour: str) -> None:
        """The room between two values at every x."""
        upper = [self._at(x, high) for x, _, high in points]
        lower = [self._at(x, low) for x, low, _ in reversed(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in upper + lower)
        self._marks.append(f'<polygon points="{path}" fill="{colour}" fill-opacity="0.12"/>')

    def bars(self, series: Mapping[str, Sequence[float | None]]) -> None:
        """Bars side by side at x = 0, 1, 2 and so on, one of each series; None leaves a gap."""
        width = 0.8 / len(series)
        for index, (name, values) in enumerate(series.items()):
            colour = COLOURS[index]
            for group, value in enumerate(values):
                if value is None:
                    continue
                left, top = self._at(group - 0.4 + index * width, value)
                right, bottom = self._at(group - 0.4 + (index + 0.92) * width, self.y.low)
                self._marks.append(
                    f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
                    f'fill="{colour}"/>'
                )
            self._add_to_legend(name, f'stroke="{colour}" stroke-width="9"')

    def rule(self, y: float, name: str) -> None:
        """A level line across the chart."""
        (left, height), (right, _) = self._at(self.x.low, y), self._at(self.x.high, y)
        style = f'stroke="{DARK}" stroke-dasharray="2 3"'
        self._marks.append(f'<line x1="{left:.1f}" y1="{height:.1f}" x2="{right:.1f}" y2="{height:.1f}" {style}/>')
        self._add_to_legend(name, style)

    def _add_to_legend(self, name: str, style: str) -> None:
        x, y = WIDTH - RIGHT + 14, TOP + 10 + 20 * (len(self._legend) // 2)
        self._legend.append(f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" {style}/>')
        self._legend.append(f'<text x="{x + 28}" y="{y + 4}">{escape(name)}</text>')

    def svg(self) -> str:
        """The whole file."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="sans-serif" font-size="12" fill="{DARK}">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            f'<text x="{LEFT}" y="24" font-size="15">{escape(self.title)}</text>',
            *self._grid(),
            *self._marks,
            *self._legend,
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def _grid(self) -> list[str]:
        parts = []
        middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        for tick in self.y.ticks:
            (left, height), (right, _) = self._at(self.x.low, tick), self._at(self.x.high, tick)
            ends = f'x1="{left:.1f}" y1="{height:.1f}" x2="{right:.1f}" y2="{height:.1f}"'
            parts.append(f'<line {ends} stroke="{LIGHT}"/>')
            parts.append(_text(self.y.label(tick), f'x="{left - 8:.1f}" y="{height + 4:.1f}" text-anchor="end"'))
        for tick in self.x.ticks:
            x, bottom = self._at(tick, self.y.low)
            parts.append(_text(self.x.label(tick), f'x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle"'))
        turned = f'transform="translate(16 {middle_y:.1f}) rotate(-90)" text-anchor="middle"'
        parts.append(_text(self.x.title, f'x="{middle_x:.1f}" y="{HEIGHT - 12}" text-anchor="middle"'))
        parts.append(_text(self.y.title, turned))
        return parts


def _text(text: str, where: str) -> str:
    return f"<text {where}>{escape(text)}</text>"
