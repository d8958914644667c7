"""One HTML page that needs no other file and no network: tables that can be sorted, and bar charts.

Without JavaScript everything is there except that the tables can be sorted. Whatever comes from a model is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

Number = TypeVar("Number", int | None, float | None)

_CHART_WIDTH, _CHART_HEIGHT = 760, 170
_LEFT, _BOTTOM, _TOP = 64, 22, 8
_NARROWEST_BAR, _WIDEST_SLOT = 5, 60.0
_ALIGNMENT = {False: "text", True: "number"}
# By how many places stand side by side: one, or before and after.
_COLOURS = {1: ("after",), 2: ("before", "after")}

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #d0d7de; --before: #9aa4af; --after: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --faint: #444c56; --before: #768390; --after: #56b4e9; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--faint); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: bold; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
code { font-size: .92em; overflow-wrap: anywhere; unicode-bidi: isolate; }
svg { display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.before { fill: var(--before); } .after { fill: var(--after); } .axis { stroke: var(--faint); }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
""".strip()

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => {
        const cell = row.cells[column];
        return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
      };
      const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b);
      body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b))));
    });
  });
}
""".strip()


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        html: What it shows.
        value: What a number is sorted by; None for text. An absent number sorts below all others.
        is_number: Whether it stands at the right.
    """

    html: str
    value: float | None = None
    is_number: bool = False

    def __str__(self) -> str:
        if not self.is_number:
            return f"<td>{self.html}</td>"
        return f'<td class="number" data-value="{-1 if self.value is None else self.value:.9g}">{self.html}</td>'


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document.

    Args:
        title: As text.
        parts: The body, as HTML; empty parts are left out.
    """
    script_hash = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{_STYLE}\n</style>\n</head>\n<body>",
            *(part for part in parts if part),
            f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def bar_chart(
    places: Sequence[tuple[Sequence[float], str]],
    label: Callable[[float], str],
    below: Sequence[str] | None = None,
    *,
    counts: bool = False,
) -> str:
    """A bar chart: for each place the values side by side and what a pointer on them is told.

    Args:
        places: The values and what is told.
        label: How the axis writes a value.
        below: What stands below each place.
        counts: Whether values are whole numbers, so that the axis, which is marked in its middle too, shows no others.
    """
    slot = max((_CHART_WIDTH - _LEFT) / len(places), _NARROWEST_BAR * len(places[0][0]) + 1)
    slot = min(slot, _WIDEST_SLOT)
    width = _LEFT + slot * len(places)
    height = _CHART_HEIGHT - _TOP - _BOTTOM
    top = max((value for values, _ in places for value in values), default=0.0) or 1.0
    if counts:
        top += top % 2
    marks = []
    for part in (0.0, 0.5, 1.0):
        y = _TOP + (1 - part) * height
        marks.append(f'<line class="axis" x1="{_LEFT}" x2="{width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label(part * top))}</text>')
    for index, (values, title) in enumerate(places):
        bar = 0.85 * slot / len(values)
        rects = "".join(
            f'<rect class="{_COLOURS[len(values)][number]}"'
            f' x="{_LEFT + index * slot + number * bar:.1f}" width="{bar:.1f}"'
            f' y="{_TOP + (1 - value / top) * height:.1f}" height="{value / top * height:.1f}"/>'
            for number, value in enumerate(values)
        )
        marks.append(f"<g><title>{escape(title)}</title>{rects}</g>")
        if below is not None and below[index]:
            marks.append(f'<text x="{_LEFT + index * slot:.1f}" y="{_CHART_HEIGHT - 6}">{escape(below[index])}</text>')
    return (
        f'<div class="wide"><svg role="img" width="{width:.0f}" height="{_CHART_HEIGHT}"'
        f' viewBox="0 0 {width:.0f} {_CHART_HEIGHT}">{"".join(marks)}</svg></div>'
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], *, sortable: bool = False) -> str:
    """A table: its headings, as text, and its rows."""
    numbers = [bool(rows) and rows[0][index].is_number for index in range(len(heads))]
    head = "".join(
        f'<th class="{_ALIGNMENT[number]}">{escape(title)}</th>' for title, number in zip(heads, numbers, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(str, row))}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def text_cell(text: str) -> Cell:
    """A cell of text."""
    return Cell(escape(text))


def number_cell(value: Number, show: Callable[[Number], str]) -> Cell:
    """A cell of a number, as ``show`` writes it."""
    return Cell(escape(show(value)), value, True)


def code(text: str) -> str:
    """HTML of something that is written as it is: a name, a path, a value."""
    return f"<code>{escape(text)}</code>"
