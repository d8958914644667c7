"""The figures of ``verify``."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparamx_onnx.comparison import OutputError, compare


def _compare(wanted: object, got: object, tolerance: float = 0.01) -> OutputError:
    return compare("y", [np.asarray(wanted)], [np.asarray(got)], tolerance)


def test_the_figures_are_what_they_say() -> None:
    result = _compare([[3.0, 4.0], [0.0, 8.0]], [[3.0, 4.0], [2.0, 6.0]], tolerance=0.25)
    assert result.relative_error == pytest.approx(2 / 8)
    assert result.cosine == pytest.approx(6 / math.hypot(2, 6))
    assert result.argmax_agreement == 1.0
    assert result.within
    assert not _compare([[3.0, 4.0], [0.0, 8.0]], [[3.0, 4.0], [2.0, 6.0]], tolerance=0.24).within


def test_the_worst_of_several_runs_counts() -> None:
    good, bad = np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]])
    result = compare("y", [good, good, good], [good, bad, good], 0.01)
    assert result.relative_error == pytest.approx(0.5)
    assert result.argmax_agreement == 0.0
    assert result.cosine == pytest.approx(0.8)


def test_zeros() -> None:
    same = _compare(np.zeros((2, 3)), np.zeros((2, 3)))
    assert (same.relative_error, same.cosine, same.within) == (0.0, 1.0, True)
    different = _compare(np.zeros((2, 3)), np.full((2, 3), 1e-9))
    assert (different.relative_error, different.within) == (None, False)
    assert different.problem == "the reference is all zero, the output is not"
    assert _compare([[0.0, 0.0], [1.0, 0.0]], [[0.0, 1e-3], [1.0, 0.0]]).cosine == 0.0


def test_infinite_and_nan_values_must_agree() -> None:
    wanted = np.array([1.0, np.inf, -np.inf, np.nan])
    assert _compare(wanted, wanted).within
    for got in ([1.0, np.inf, np.inf, np.nan], [1.0, np.inf, -np.inf, 0.0], [np.nan, np.inf, -np.inf, np.nan]):
        result = _compare(wanted, got)
        assert (result.within, result.problem) == (False, "infinite or NaN values differ")


def test_where_nothing_can_be_compared_nothing_passes() -> None:
    nothing, something = np.array([np.nan, -np.inf]), np.array([np.nan, 1.0])
    result = compare("y", [nothing, nothing], [nothing, nothing], 0.01)
    assert (result.relative_error, result.within) == (None, False)
    assert result.problem == "the reference is infinite or NaN throughout"
    assert compare("y", [nothing, something], [nothing, something], 0.01).within


def test_shapes_scalars_and_integers() -> None:
    assert _compare(np.zeros((2, 3)), np.zeros((3, 2))).problem == "shape (3, 2) instead of (2, 3)"
    scalar = _compare(2.0, 2.0)
    assert (scalar.relative_error, scalar.argmax_agreement, scalar.within) == (0.0, None, True)
    assert _compare(np.array([1, 2]), np.array([1, 3])).relative_error == pytest.approx(0.5)
    assert _compare(np.array([True, False]), np.array([True, False])).within
    assert _compare(np.zeros((0, 4)), np.zeros((0, 4))).within
    half = _compare(np.array([1, 2], np.float16), np.array([1, 2], np.float16))
    assert half.relative_error == 0.0
