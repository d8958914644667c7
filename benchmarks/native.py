"""Compiles the C++ beside the benchmarks when it is new."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def build(source: Path, folder: Path) -> Path:
    """The shared library of one source file, made in `folder` if it is missing or older than the source.

    Raises RuntimeError with the compiler's words if it does not compile. $CXX names the compiler, c++ by default.
    """
    library = folder / f"lib{source.stem}.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CXX", "c++"), "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread"]
    done = subprocess.run([*command, "-o", str(library), str(source)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
    return library
