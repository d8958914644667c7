"""Compiles the C++ beside the benchmarks when it is new."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def build(source: Path, folder: Path) -> Path:
    """The shared library of one source file, made in `folder` if it is missing or older than the source.

    Raises RuntimeError with the compiler's words if it does not compile. $CXX names the compiler, c++ by default.
    """
    library = folder / f"lib{source.stem}.so"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CXX", "c++"), "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread"]
    _run([*command, "-o", str(library), str(source)], str(source))
    return library


def build_kernel_time(folder: Path) -> Path:
    """The library of kernel_time.cc with the kernels of this checkout, made in `folder` by CMake.

    Raises RuntimeError with the compiler's words if it does not compile.
    """
    options = ["-DSPARAMX_BUILD_PLUGIN=OFF", "-DSPARAMX_BUILD_BENCHMARKS=ON"]
    _run(["cmake", "-G", "Ninja", "-S", str(_ROOT), "-B", str(folder), *options], "CMakeLists.txt")
    _run(["cmake", "--build", str(folder), "--target", "sparamx_kernel_time"], "kernel_time.cc")
    return folder / "libsparamx_kernel_time.so"


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{what} does not compile:\n{done.stdout}{done.stderr}")
