"""The streaming loops must read every byte, or the yardstick of the benchmarks is too long."""

import ctypes
import functools
import operator
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("native")
    build = (
        f"import native, pathlib; print(native.build(pathlib.Path('stream_read.cc'), pathlib.Path({str(folder)!r})))"
    )
    path = subprocess.run(
        [sys.executable, "-c", build], cwd=BENCHMARKS, check=True, capture_output=True, text=True
    ).stdout
    loaded = ctypes.CDLL(path.strip())
    loaded.stream_pool_create.restype = ctypes.c_void_p
    loaded.stream_pool_destroy.argtypes = [ctypes.c_void_p]
    loaded.stream_read.restype = ctypes.c_uint64
    loaded.stream_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    return loaded


@pytest.mark.parametrize("loop", [0, 1])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 4096, 100_001])
def test_every_byte_is_read_once(library: ctypes.CDLL, loop: int, threads: int, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    pool = library.stream_pool_create(threads)
    try:
        first = library.stream_read(pool, data.ctypes.data, size, loop)
        assert library.stream_read(pool, data.ctypes.data, size, loop) == first
        for position in {0, size // 3, size // 2, size - 1} if size else ():
            for bit in (1, 128):
                data[position] ^= bit
                assert library.stream_read(pool, data.ctypes.data, size, loop) != first
                data[position] ^= bit
        # Folded to one byte, the sum is the exclusive or of all bytes, however they were split.
        folded = functools.reduce(operator.xor, first.to_bytes(8, "little"))
        assert folded == functools.reduce(operator.xor, data.tolist(), 0)
    finally:
        library.stream_pool_destroy(pool)
