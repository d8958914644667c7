"""Results that grow: a JSON file of cells that a later run goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Cells:
    """The machine that measured, and one dictionary per combination of the keys."""

    def __init__(self, path: Path | None, machine: dict[str, Any], keys: Iterable[str]) -> None:
        """Reads what `path` has, unless another machine measured it; None keeps everything in memory."""
        self._path = path
        self._machine = machine
        self._keys = tuple(keys)
        self._cells: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        document = json.loads(path.read_text())
        if document["machine"]["cpu"] != machine["cpu"] or document["machine"]["cores"] != machine["cores"]:
            other = document["machine"]["cpu"]
            raise SystemExit(f"{path} was measured on another machine ({other}); name another file")
        for cell in document["cells"]:
            self.add(cell)

    def _key(self, cell: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(cell.get(key) for key in self._keys)

    def has(self, cell: dict[str, Any]) -> bool:
        """Whether this combination was measured."""
        return self._key(cell) in self._cells

    def add(self, cell: dict[str, Any]) -> None:
        """Keeps a result in place of an older one of the same combination."""
        self._cells[self._key(cell)] = cell

    def __iter__(self) -> Any:
        return iter(self._cells.values())

    def save(self) -> None:
        """Writes the file, a line per cell, complete or not at all."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join("  " + json.dumps(cell) for cell in self._cells.values())
        head = json.dumps({"machine": self._machine}, indent=1)[:-2]
        draft = self._path.with_name(self._path.name + ".part")
        draft.write_text(f'{head},\n "cells": [\n{lines}\n ]\n}}\n')
        draft.replace(self._path)
