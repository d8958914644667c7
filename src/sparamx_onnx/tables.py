"""Plain text tables that fit the terminal, and sizes and times that people can read."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence

_GAP = "  "
_NARROWEST = 12
# What a pipe or a file gets: wide enough for real names, narrow enough for a mail.
_WIDTH_WITHOUT_TERMINAL = 120


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its heading.
        right: Whether its cells are aligned to the right, as numbers are.
        shrinks: Whether its cells may be shortened (in the middle) to make the table fit.
    """

    title: str
    right: bool = False
    shrinks: bool = False


def terminal_width() -> int:
    """Columns to fill: the terminal's, or 120 without one; ``COLUMNS`` wins over both."""
    return shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns


def render(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """The table as text, a heading and one line per row, without a newline at the end.

    Args:
        columns: At most one of them shrinks.
        rows: Cells, as many per row as there are columns.
        width: Columns to fit into; the terminal's if None.
    """
    titles = [column.title for column in columns]
    widths = [max(len(row[index]) for row in (titles, *rows)) for index in range(len(columns))]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - (terminal_width() if width is None else width)
    for index, column in enumerate(columns):
        if column.shrinks and excess > 0:
            widths[index] = max(widths[index] - excess, min(_NARROWEST, widths[index]))
    lines = []
    for row in (titles, *rows):
        cells = [_fit(cell, size, column.right) for cell, size, column in zip(row, widths, columns, strict=True)]
        lines.append(_GAP.join(cells).rstrip())
    return "\n".join(lines)


def size(number: int | None) -> str:
    """Bytes for people, in decimal units."""
    if number is None:
        return "-"
    amount, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while abs(amount) >= 999.95 and len(units) > 1:
        amount /= 1000.0
        del units[0]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """A time for people, with four significant digits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"


def rate(per_second: float | None) -> str:
    """A number of tokens a second for people."""
    if per_second is None:
        return "-"
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def percent(share: float | None) -> str:
    """A share as a percentage. Never rounded to 0 or 100 % from anything else."""
    if share is None:
        return "-"
    shown = min(max(share * 100, 0.1), 99.9) if 0.0 < share < 1.0 else share * 100
    return f"{shown:.1f}%"


def shorten(text: str, width: int) -> str:
    """Cuts the middle out of a text that is too long: both ends of a node's name tell it from its neighbours."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _fit(cell: str, width: int, right: bool) -> str:
    cell = shorten(cell, width)
    return cell.rjust(width) if right else cell.ljust(width)
