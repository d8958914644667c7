"""The text that tinylm learns from: the sources of Python's documentation in Debian's package `python3.11-doc`.

Copyright Python Software Foundation, PSF License Version 2 (checkpoint/LICENSE-PSF.txt). Eleven million characters in
497 documents of reStructuredText. Every 40th document is held out: neither tokenizer nor weights have seen it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "python3.11-doc"
_SOURCES = Path("usr/share/doc/python3.11/html/_sources")
_HELD_OUT_STRIDE = 40


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from, and documents to judge by."""

    training: list[str]
    held_out: list[str]


def fetch() -> Corpus:
    """Reads the installed package, or downloads it with apt without installing it.

    Raises:
        RuntimeError: There is neither the package nor an apt-get that gets it.
    """
    installed = Path("/") / _SOURCES
    if installed.is_dir():
        return read(installed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=folder, check=True, capture_output=True)
            package = next(Path(folder).glob("*.deb"))
            subprocess.run(["dpkg", "-x", package, folder], check=True, capture_output=True)
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"tinylm's text is Debian's package {PACKAGE}, and apt-get could not get it") from error
        return read(Path(folder) / _SOURCES)


def read(folder: Path) -> Corpus:
    """The documents below `folder`, in the order of their names."""
    paths = sorted(folder.rglob("*.rst.txt"), key=lambda path: path.relative_to(folder).parts)
    texts = [path.read_text(encoding="utf-8") for path in paths]
    held_out = texts[_HELD_OUT_STRIDE // 2 :: _HELD_OUT_STRIDE]
    training = [text for index, text in enumerate(texts) if index % _HELD_OUT_STRIDE != _HELD_OUT_STRIDE // 2]
    return Corpus(training, held_out)


def without_addresses(text: str) -> str:
    """Links keep their words and lose their targets."""
    return re.sub(r"\s*<https?://[^>]*>", "", text)
