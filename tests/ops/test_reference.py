"""The reference itself, against values known from elsewhere."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from sparamx_onnx.ops import packing, reference
from sparamx_onnx.ops.errors import SparamxError


def test_rounding_to_bf16() -> None:
    smallest = 2.0**-126
    x = np.array(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), smallest, -smallest * 0.999, 1e-45, 3.4e38, np.inf],
        np.float32,
    )
    expected = [1.0, 1.0, 1 + 2**-6, -(1 + 2**-7), smallest, 0.0, 0.0, np.inf, np.inf]
    np.testing.assert_array_equal(reference.round_to_bf16(x), np.array(expected, np.float32))
    assert np.isnan(reference.round_to_bf16(np.array([np.nan], np.float32)))[0]
    assert np.signbit(reference.round_to_bf16(np.array([-1e-40], np.float32)))[0]


@pytest.mark.parametrize(
    ("epilogue", "expected"),
    [
        ("none", [-3.0, -0.5, 0.0, 0.5, 3.0]),
        ("relu", [0.0, 0.0, 0.0, 0.5, 3.0]),
        # Normal distribution tables: x * Phi(x).
        ("gelu", [-0.004049694, -0.154268770, 0.0, 0.345731230, 2.995950306]),
        ("gelu_tanh", [-0.003637392, -0.154285990, 0.0, 0.345714010, 2.996362608]),
        ("silu", [-0.142277620, -0.188770334, 0.0, 0.311229666, 2.857722380]),
    ],
)
def test_epilogues(epilogue: str, expected: list[float]) -> None:
    x = np.array([-3.0, -0.5, 0.0, 0.5, 3.0])
    np.testing.assert_allclose(reference.apply_epilogue(x, epilogue), expected, atol=1e-8)


def test_epilogues_far_out() -> None:
    far = np.array([-1e30, 1e30])
    for epilogue in ("gelu", "silu", "relu"):
        np.testing.assert_array_equal(reference.apply_epilogue(far, epilogue), [0.0, 1e30])


def test_activations_in_bf16() -> None:
    x = np.array([[1 + 2**-10, 2.0**-130, 2.0**126]], np.float32)
    w = np.array([[3.0], [2.0**127], [2.0**-130]], np.float32)
    assert reference.sparse_amx_matmul(x, w, activations="bf16")[0, 0] == 3.0
    exact = reference.sparse_amx_matmul(x, w, np.array([1.0], np.float32), activations="fp32")[0, 0]
    assert exact == np.float32(3.0 * (1 + 2**-10) + 2.0**-3 + 2.0**-4 + 1.0)


def test_activations_in_int8() -> None:
    x = np.array([[127.0, 0.5, 1.5, -2.5, -127.0, 0.0], [0.0, -0.0, 0.0, 0.0, 0.0, 254.0]], np.float32)
    # Rows span 254 numbers from their least element or zero on.
    codes, scales = reference.quantize_int8(x)
    np.testing.assert_array_equal(codes, [[127, 0, 2, -2, -127, 0], [0, 0, 0, 0, 0, 254]])
    np.testing.assert_array_equal(scales[:, 0], [1, 1])
    codes, scales = reference.quantize_int8(np.array([[-50.4, 203.2, 1.0, 0.0]], np.float32))
    np.testing.assert_array_equal(codes, [[-50, 204, 1, 0]])
    np.testing.assert_allclose(scales, 253.6 / 254)
    # Groups of a row have scales of their own, the last one may be shorter.
    codes, scales = reference.quantize_int8(x, 4)
    np.testing.assert_array_equal(codes[1], [0, 0, 0, 0, 0, 127])
    np.testing.assert_array_equal(scales, [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 2, 2]])


def test_int8_activations_that_are_tiny_or_not_finite() -> None:
    smallest = np.float32(2.0**-100)
    x = np.array([[smallest, 0], [smallest * np.float32(0.999), 0], [np.inf, 1], [1, np.nan]], np.float32)
    codes, scales = reference.quantize_int8(x)
    np.testing.assert_array_equal(codes, [[254, 0], [0, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(scales[:, 0], np.array([smallest / 254, 0, np.nan, np.nan], np.float32))
    y = reference.sparse_amx_matmul(x, np.zeros((2, 3), np.float32), activations="int8")
    assert np.isnan(y[2:]).all()
    assert not y[:2].any()


def test_products_with_int8_activations() -> None:
    x = np.array([[2.0, -1.0, 0.01, 0.02]], np.float32)
    w = np.array([[1.0], [1.0], [100.0], [100.0]], np.float32)
    # A row has one scale of 3/254: 0.01 is 1 of it (0.85), 0.02 is 2 (1.69), and 2 and -1 are 169 and -85.
    row = reference.sparse_amx_matmul(x, w, activations="int8")
    np.testing.assert_allclose(row, [[(169 - 85 + 300) * 3 / 254]], rtol=1e-6)
    # A group of two has 2/127, which makes 64 of 1; the other 0.02/127.
    step = 2 / 127
    grouped = reference.sparse_amx_matmul(x, w, activations="int8", group_size=2)
    np.testing.assert_allclose(grouped, [[2 - 64 * step + 2 + 100 * 64 * 0.02 / 127]], rtol=1e-6)


def test_leading_dimensions() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    assert reference.sparse_amx_matmul(x, w).shape == (2, 3, 4)
    assert reference.sparse_amx_matmul(x[0, 0], w).shape == (4,)


def test_unknown_names() -> None:
    x, w = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    with pytest.raises(SparamxError, match="'swish'"):
        reference.sparse_amx_matmul(x, w, epilogue="swish")
    with pytest.raises(SparamxError, match="'int4'"):
        reference.sparse_amx_matmul(x, w, activations="int4")


# Where fields of the header stand, and those of the section table that follows it (docs/format.md).
VERSION_AT, NNZ_AT, WEIGHT_TYPE_AT, SECTIONS_AT, SECTION_BYTES = 8, 48, 56, 128, 24


def _with(blob: np.ndarray, at: int, kind: str, value: int) -> bytes:
    damaged = bytearray(blob.tobytes())
    struct.pack_into(kind, damaged, at, value)
    return bytes(damaged)


def _section_at(blob: np.ndarray, identifier: int) -> int:
    found = range(SECTIONS_AT, SECTIONS_AT + 8 * SECTION_BYTES, SECTION_BYTES)
    return next(at for at in found if struct.unpack_from("<I", blob.tobytes(), at) == (identifier,))


@pytest.mark.parametrize(
    ("weights", "form", "damage", "what"),
    [
        ("bf16", "sparse", lambda b: _with(b, VERSION_AT, "<I", 9), "not of format version 1"),
        ("bf16", "sparse", lambda b: _with(b, WEIGHT_TYPE_AT, "B", 7), "does not read the weight type 7"),
        (
            "bf16",
            "sparse",
            lambda b: _with(b, SECTIONS_AT + 4, "<I", 1),
            "Section 1 of the packed weight is out of place",
        ),
        ("bf16", "sparse", lambda b: _with(b, _section_at(b, 2) + 16, "<Q", 64), "bitmap of the packed weight"),
        ("bf16", "sparse", lambda b: _with(b, NNZ_AT, "<Q", 1), "as many values as its bitmap"),
        ("bf16", "dense", lambda b: _with(b, _section_at(b, 3) + 16, "<Q", 64), "values of the packed weight"),
        ("int8", "sparse", lambda b: _with(b, _section_at(b, 4) + 16, "<Q", 64), "scales of the packed weight"),
        (
            "int8",
            "dense",
            lambda b: _with(b, struct.unpack_from("<Q", b.tobytes(), _section_at(b, 6) + 8)[0], "<i", 77),
            "sums of the packed weight",
        ),
    ],
)
def test_a_blob_that_breaks_the_format_is_refused(weights: str, form: str, damage, what: str) -> None:
    w = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    w[w < 0] = 0
    options = packing.PackOptions(packing.WeightType(weights), packing.Form(form))
    blob = packing.pack(w, options)
    assert np.allclose(reference.unpack_blob(blob.tobytes()), w, atol=0.05)
    with pytest.raises(SparamxError, match=what):
        reference.unpack_blob(damage(blob))
