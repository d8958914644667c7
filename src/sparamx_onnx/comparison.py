"""How far apart two results are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sparamx_onnx.feeds import Array


@dataclasses.dataclass(frozen=True)
class OutputError:
    """How far one output of the second model is from the first one's, the worst over all runs.

    Attributes:
        name: The output.
        shape: Its shape in the first run.
        relative_error: max |difference| / max |reference|; None where shapes or non-finite values differ, or where the
            reference holds no number but those.
        cosine: The lowest cosine between corresponding vectors along the last axis; None as above.
        argmax_agreement: Share of those vectors whose largest element is at the same place; None for vectors of one.
        problem: What makes the outputs incomparable, or None.
        within: Whether the error is within the tolerance.
    """

    name: str
    shape: tuple[int, ...]
    relative_error: float | None
    cosine: float | None
    argmax_agreement: float | None
    problem: str | None
    within: bool


def compare(name: str, expected: Sequence[Array], actual: Sequence[Array], tolerance: float) -> OutputError:
    """Compares one output over several runs.

    Args:
        name: Its name, for the result.
        expected: The reference, one array per run, any numeric type.
        actual: The output to judge, one array per run.
        tolerance: Largest relative error that passes.
    """
    shape = expected[0].shape
    errors, cosines, agreements, numbers = [], [], [], 0
    for wanted, got in zip(expected, actual, strict=True):
        if wanted.shape != got.shape:
            return OutputError(name, shape, None, None, None, f"shape {got.shape} instead of {wanted.shape}", False)
        wanted, got = np.asarray(wanted, np.float64), np.asarray(got, np.float64)
        finite = np.isfinite(wanted)
        numbers += int(np.count_nonzero(finite))
        # Infinities and NaNs of the reference are results like others: they must be there again, and only they.
        if not np.array_equal(wanted[~finite], got[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
            return OutputError(name, shape, None, None, None, "infinite or NaN values differ", False)
        wanted, got = np.where(finite, wanted, 0.0), np.where(finite, got, 0.0)
        errors.append(_relative_error(wanted, got))
        cosines.append(_lowest_cosine(wanted, got))
        if wanted.ndim and wanted.shape[-1] > 1 and wanted.size:
            agreements.append(float(np.mean(wanted.argmax(-1) == got.argmax(-1))))
    if not numbers and any(run.size for run in expected):
        return OutputError(name, shape, None, None, None, "the reference is infinite or NaN throughout", False)
    error = max(errors)
    agreement = min(agreements) if agreements else None
    if math.isinf(error):
        return OutputError(
            name, shape, None, min(cosines), agreement, "the reference is all zero, the output is not", False
        )
    return OutputError(name, shape, error, min(cosines), agreement, None, error <= tolerance)


def _relative_error(wanted: Array, got: Array) -> float:
    difference = float(np.abs(wanted - got).max(initial=0.0))
    if difference == 0.0:
        return 0.0
    largest = float(np.abs(wanted).max(initial=0.0))
    return difference / largest if largest else math.inf


def _lowest_cosine(wanted: Array, got: Array) -> float:
    rows = [array.reshape(-1, array.shape[-1] if array.ndim else 1) for array in (wanted, got)] if wanted.size else None
    if rows is None:
        return 1.0
    lengths = [np.linalg.norm(row, axis=-1) for row in rows]
    product = lengths[0] * lengths[1]
    dots = np.einsum("ij,ij->i", *rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where(product > 0, dots / product, np.where(lengths[0] == lengths[1], 1.0, 0.0))
    return float(cosines.min())
