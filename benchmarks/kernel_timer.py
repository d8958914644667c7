"""Times the library's kernels without ONNX Runtime, on so many copies of a packed matrix that no cache holds them."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import native
import numpy as np
from numpy.typing import NDArray

from sparamx_onnx.ops import packing

_HERE = Path(__file__).resolve().parent
_ALIGNMENT = 4096  # as packed weights lie in a converted model's data file
_ERROR_BYTES = 256
LOOPS = ("plain", "prefetched")
"""The streaming loops of stream_read.cc."""


@dataclass
class Kernel:
    """One kernel's products with all copies of a matrix."""

    products: ctypes.Array[ctypes.c_void_p]
    paths: dict[int, str] = field(default_factory=dict)


class Timer:
    """A mapped file in memory that is filled with copies of one packed matrix after the other. A context manager.

    Every turn goes on where the last one ended, whatever it timed: a byte is not read again before all others were.
    """

    def __init__(self, build: Path, threads: int, capacity: int) -> None:
        """Compiles what is new of the native part into `build`; `capacity` are the bytes of all copies together."""
        self._capacity = capacity
        self._library = ctypes.CDLL(str(native.build_kernel_time(build / "kernel_time")))
        self._library.kernel_pool_create.restype = ctypes.c_void_p
        self._library.kernel_pool_destroy.argtypes = [ctypes.c_void_p]
        self._library.kernel_create.restype = ctypes.c_void_p
        self._library.kernel_create.argtypes = [
            *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_char_p),
            *(ctypes.c_char_p, ctypes.c_size_t),
        ]
        self._library.kernel_destroy.argtypes = [ctypes.c_void_p]
        self._library.kernel_path.restype = ctypes.c_char_p
        self._library.kernel_path.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        self._library.kernel_run.restype = ctypes.c_double
        self._library.kernel_run.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)
        ]
        self._streams = ctypes.CDLL(str(native.build(_HERE / "stream_read.cc", build)))
        self._streams.stream_pool_create.restype = ctypes.c_void_p
        self._streams.stream_pool_destroy.argtypes = [ctypes.c_void_p]
        self._streams.stream_read.restype = ctypes.c_uint64
        self._streams.stream_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
        self._pool = self._library.kernel_pool_create(threads)
        self._stream_pool = self._streams.stream_pool_create(threads)
        descriptor = os.memfd_create("packed")
        os.ftruncate(descriptor, capacity)
        self._map = mmap.mmap(descriptor, capacity)
        os.close(descriptor)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._kernels: list[Kernel] = []
        self._stride = self._blob_bytes = self._copies = self._position = 0
        self._shape = (0, 0)
        self._x: NDArray[np.float32] = np.zeros(0, np.float32)
        self._y: NDArray[np.float32] = np.zeros(0, np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._forget()
        self._library.kernel_pool_destroy(self._pool)
        self._streams.stream_pool_destroy(self._stream_pool)

    @property
    def copies(self) -> int:
        """How many copies of the matrix there are."""
        return self._copies

    def fill(self, blob: packing.Blob) -> None:
        """Makes as many copies of a packed matrix as fit, one at least."""
        self._forget()
        info = packing.describe(blob)
        self._shape = (info.k, info.n)
        self._blob_bytes, self._stride = blob.size, -(-blob.size // _ALIGNMENT) * _ALIGNMENT
        self._copies = self._capacity // self._stride
        if self._copies == 0:
            raise RuntimeError(f"a packed matrix of {blob.size} bytes does not fit in {self._capacity}")
        self._position = 0
        for copy in range(self._copies):
            self._bytes[copy * self._stride :][: blob.size] = blob
        self.read(LOOPS[0], self._copies)

    def kernel(self, level: str | None = None, activations: str = "") -> Kernel | str:
        """A kernel for the copies: the library's choice, or that of one level; a sentence where there is none."""
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        name = None if level is None else level.encode()
        products = (ctypes.c_void_p * self._copies)()
        kernel = Kernel(products)
        for copy in range(self._copies):
            products[copy] = self._library.kernel_create(
                *(self._address(copy), self._blob_bytes, name, activations.encode(), error, _ERROR_BYTES)
            )
            if products[copy] is None:
                self._destroy(kernel)
                return error.value.decode()
        self._kernels.append(kernel)
        return kernel

    def path(self, kernel: Kernel, m: int) -> str:
        """The name of the kernel that runs for M = m."""
        name: bytes = self._library.kernel_path(kernel.products[0], m)
        return name.decode()

    def run(self, kernel: Kernel, m: int, count: int) -> float:
        """Seconds of a product with M = m, over `count` of them one after the other."""
        first, count = self._next(count)
        k, n = self._shape
        if self._x.size != m * k:
            self._x = np.random.default_rng(m).standard_normal(m * k, np.float32)
        if self._y.size != m * n:
            self._y = np.zeros(m * n, np.float32)
        products = ctypes.byref(kernel.products, first * ctypes.sizeof(ctypes.c_void_p))
        seconds: float = self._library.kernel_run(
            *(self._pool, products, count, m, self._x.ctypes.data, self._y.ctypes.data)
        )
        if not math.isfinite(float(self._y.sum())):
            raise RuntimeError(f"the kernel {self.path(kernel, m)} made numbers that are not finite")
        return seconds / count

    def read(self, loop: str, count: int) -> float:
        """Bytes a second that a streaming loop reads, over `count` copies."""
        first, count = self._next(count)
        size = count * self._stride
        start = time.perf_counter()
        self._streams.stream_read(self._stream_pool, self._address(first), size, LOOPS.index(loop))
        return size / (time.perf_counter() - start)

    def _next(self, count: int) -> tuple[int, int]:
        count = max(1, min(count, self._copies))
        if self._position + count > self._copies:
            self._position = 0
        first = self._position
        self._position += count
        return first, count

    def _address(self, copy: int) -> Any:
        return self._bytes.ctypes.data + copy * self._stride

    def _destroy(self, kernel: Kernel) -> None:
        for product in kernel.products:
            if product is not None:
                self._library.kernel_destroy(product)

    def _forget(self) -> None:
        for kernel in self._kernels:
            self._destroy(kernel)
        self._kernels = []


class Weights:
    """Random matrices of any shape, cut from one drawing: drawing takes longer than packing."""

    def __init__(self, elements: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._values = rng.standard_normal(elements, np.float32)
        self._levels = rng.random(elements, np.float32)

    def draw(self, k: int, n: int, sparsity: float) -> NDArray[np.float32]:
        """[k, n], of which `sparsity` are zero, at random places."""
        keep = self._levels[: k * n] >= sparsity
        return (self._values[: k * n] * keep).reshape(k, n)
