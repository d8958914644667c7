"""Measured documents, and tables in Markdown made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).resolve().parent / "measured"


def load(name: str) -> dict[str, Any]:
    """One measured document."""
    document: dict[str, Any] = json.loads((MEASURED / f"{name}.json").read_text())
    return document


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
