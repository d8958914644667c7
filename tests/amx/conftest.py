"""AMX in software (tests/amx_emulator), built once, for processes that preload it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_SOURCES = Path(__file__).parents[1] / "amx_emulator"

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator's shared library."""
    library = tmp_path_factory.mktemp("amx") / "libamx_emulator.so"
    flags = ["-std=c++17", "-O2", "-mavx512f", "-fPIC", "-shared", "-ftls-model=initial-exec"]
    files = [str(_SOURCES / name) for name in ("preload.cc", "tiles.cc")]
    subprocess.run(["g++", *flags, "-o", str(library), *files], check=True)
    return library


@pytest.fixture(scope="session")
def cpu_flags() -> set[str]:
    """What Linux says of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())


@pytest.fixture
def run_python(emulator: Path) -> RunPython:
    """Runs Python with the emulator that pretends what it is told, or, told None, without any emulator."""

    def run(pretend: str | None, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        unset = ("LD_PRELOAD", "SPARAMX_AMX_EMULATOR", "SPARAMX_ISA")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        if pretend is not None:
            environment |= {"LD_PRELOAD": str(emulator), "SPARAMX_AMX_EMULATOR": pretend}
        return subprocess.run(
            [sys.executable, *arguments], env=environment | variables, text=True, capture_output=True, timeout=600
        )

    return run
