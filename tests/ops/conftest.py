"""Random matrices of every awkward kind, for the tests of packing and of the kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

FULL = bool(os.environ.get("SPARAMX_TEST_FULL"))

SPARSITIES = (0.0, 0.3, 0.5, 0.9, 1.0)
PRIMES = (1, 2, 3, 5, 7, 13, 17, 31, 37, 67, 127, 131, 257, 263, 509, 521, 599)
EDGES = (15, 16, 32, 33, 48, 64, 65, 96, 512, 513, 544, 600)


@dataclass(frozen=True)
class Case:
    """Activations [M, K], a weight [K, N] and a bias [N], or None."""

    x: npt.NDArray[np.float32]
    w: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32] | None

    def __str__(self) -> str:
        zeros = 1 - np.count_nonzero(self.w) / max(1, self.w.size)
        bias = "no" if self.bias is None else "a"
        return f"M={self.x.shape[0]} K={self.w.shape[0]} N={self.w.shape[1]}, {zeros:.0%} zeros, {bias} bias"


def random_weight(rng: np.random.Generator, k: int, n: int, sparsity: float, holes: bool) -> npt.NDArray[np.float32]:
    """Normal weights with random zeros; with holes, whole rows, columns and blocks of 32 x 16 are empty too."""
    w = rng.standard_normal((k, n), np.float32)
    w[rng.random((k, n)) < sparsity] = 0
    if holes:
        w[rng.random(k) < 0.2] = 0
        w[:, rng.random(n) < 0.2] = 0
        for row in range(0, k, 32):
            for column in range(0, n, 16):
                if rng.random() < 0.3:
                    w[row : row + 32, column : column + 16] = 0
    return w


def _dimension(rng: np.random.Generator) -> int:
    """1 to 600: any number, a prime, or a number at an edge of the format."""
    kind = rng.integers(3)
    return int(rng.integers(1, 601) if kind == 0 else rng.choice(PRIMES if kind == 1 else EDGES))


def make_cases(seed: int, count: int) -> Iterator[Case]:
    """Random cases: M 1 to 70, K and N 1 to 600; ten times as many with SPARAMX_TEST_FULL."""
    rng = np.random.default_rng(seed)
    for index in range(count * (10 if FULL else 1)):
        m = int(rng.integers(1, 71)) if index % 3 else 1
        k, n = _dimension(rng), _dimension(rng)
        w = random_weight(rng, k, n, SPARSITIES[index % len(SPARSITIES)], holes=index % 2 == 1)
        bias = rng.standard_normal(n, np.float32) if rng.integers(2) else None
        yield Case(rng.standard_normal((m, k), np.float32), w, bias)


@pytest.fixture(scope="session")
def cases() -> Callable[[int, int], Iterator[Case]]:
    return make_cases


@pytest.fixture(scope="session")
def weight() -> Callable[..., npt.NDArray[np.float32]]:
    return random_weight
