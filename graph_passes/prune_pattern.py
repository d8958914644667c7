"""N:M patterns: of every M consecutive inputs of an output, at most N weights are not zero."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparamx_onnx.ops.errors import SparamxError

# Weights scored together: the scores and their order are what is held beside the matrix.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Pattern:
    """How many weights of each group may stay.

    Attributes:
        kept: Weights of a group that stay.
        of: Inputs that make a group.
    """

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern that ``N:M`` names.

        Raises:
            SparamxError: It is none.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        pattern = None if match is None else cls(int(match[1]), int(match[2]))
        if pattern is None or not 1 <= pattern.kept < pattern.of <= 64:
            raise SparamxError(
                f"'{text}' is no pattern; 2:4 means that of 4 consecutive weights at most 2 are not zero."
            )
        return pattern

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def sparsity(self) -> float:
        """The share of zeros in whole groups."""
        return 1.0 - self.kept / self.of

    def zeros(self, k: int, n: int) -> int:
        """Zeros that a matrix [k, n] gets; a group that is cut off by its end keeps as many as a whole one."""
        return n * (k // self.of * (self.of - self.kept) + max(0, k % self.of - self.kept))

    def smallest(self, scores: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
        """Which weights become zero: the ones with the smallest scores of each group, of equal ones the first.

        Args:
            scores: Floating-point [rows, n]; groups begin at the first row.

        Returns:
            Boolean [rows, n].
        """
        rows, n = scores.shape
        chosen = np.zeros((rows, n), np.bool_)
        whole = rows - rows % self.of
        groups = scores[:whole].reshape(-1, self.of, n)
        order = np.argsort(groups, axis=1, kind="stable")[:, : self.of - self.kept]
        np.put_along_axis(chosen[:whole].reshape(-1, self.of, n), order, True, axis=1)
        surplus = rows - whole - self.kept
        if surplus > 0:
            np.put_along_axis(chosen[whole:], np.argsort(scores[whole:], axis=0, kind="stable")[:surplus], True, axis=0)
        return chosen


def prune_to_pattern(
    w: npt.NDArray[np.generic], pattern: Pattern, factors: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.generic]:
    """Sets the smallest weights of every group to zero.

    Args:
        w: The weight [K, N], float32, float16 or bfloat16; groups run along K.
        pattern: The pattern.
        factors: float32 [K]: what the magnitudes of each input's weights are multiplied by before they are compared.

    Returns:
        A copy with zeros, of the same shape and dtype.
    """
    pruned = np.array(w, order="K")
    k, n = w.shape
    rows = max(1, _CHUNK // max(1, n * pattern.of)) * pattern.of
    for start in range(0, k, rows):
        part = pruned[start : start + rows]
        scores = np.abs(part.astype(np.float32))
        if factors is not None:
            scores *= factors[start : start + rows, None]
        part[pattern.smallest(scores)] = 0
    return pruned
