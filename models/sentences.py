"""English sentences that come with Python: the docstrings of its standard library (PSF licence), read at run time."""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Packages whose docstrings are data for tests or not written as prose.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "__pycache__"})
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()\-/\"]+[.!?]")
_MIN_WORDS, _MAX_WORDS = 6, 40


def collect(count: int, seed: int = 0) -> list[str]:
    """`count` different sentences in an order that `seed` decides; the same for the same Python version.

    Raises ValueError if the standard library on this machine has fewer.
    """
    found = list(_all_sentences())
    if len(found) < count:
        raise ValueError(f"the standard library's docstrings hold {len(found)} sentences; {count} were asked for")
    return random.Random(seed).sample(found, count)


@functools.cache
def _all_sentences() -> tuple[str, ...]:
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for source in sorted(library.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(source.relative_to(library).parts):
            found.update(dict.fromkeys(_sentences_of(source)))
    return tuple(found)


def _sentences_of(source: Path) -> Iterator[str]:
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return  # a deliberately broken or non-UTF-8 file
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                if _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS and _PROSE.fullmatch(sentence):
                    yield sentence
