"""Every kernel that this CPU runs, against the reference, over random shapes."""

from __future__ import annotations

import os

import numpy as np
import pytest

from sparamx_onnx.ops import library, packing, reference
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packing import GROUP_SIZES, Form, PackOptions, ScaleType, WeightType

LEVELS = {level["name"]: level for level in library.cpu_info()["levels"]}
# SPARAMX_TEST_LEVEL narrows them to one.
SUPPORTED = [
    name for name, level in LEVELS.items() if level["supported"] and name == os.environ.get("SPARAMX_TEST_LEVEL", name)
]
EPILOGUES = ["none", "relu", "gelu", "gelu_tanh", "silu"]
QUANTIZED = (WeightType.INT8, WeightType.INT4)

# What docs/numerics.md promises of every path: relative to 1 plus the sum of the magnitudes of the products.
SUM_ERROR = 2e-6
# And of the activation functions: relative to 1 or the result; their slope is below 1.13.
EPILOGUE_ERROR = 2e-7
SLOPE = 1.13

# The kernel that runs where a forced level has none of its own for these weights: fp32 has nothing to gain beyond
# AVX-512, bf16 nothing from VNNI, int8 and int4 nothing from BF16.
_PATHS = {
    WeightType.FP32: dict.fromkeys(("avx512_vnni", "avx512_vbmi2", "avx512_bf16", "amx"), "avx512"),
    WeightType.BF16: {"avx512_vnni": "avx512"},
    WeightType.INT8: {},
    WeightType.INT4: {},
}


def _path_of(level: str, weight_type: WeightType) -> str:
    return _PATHS[weight_type].get(level, level)


def _options(weight_type: WeightType, form: Form = Form.AUTO, index: int = 0) -> PackOptions:
    """For int4, every group size and type of scales in turn."""
    if weight_type is not WeightType.INT4:
        return PackOptions(weight_type, form)
    scale_type = (ScaleType.FP16, ScaleType.FP32, ScaleType.INT8)[index % 3]
    return PackOptions(weight_type, form, scale_type, GROUP_SIZES[index % len(GROUP_SIZES)])


def _check(case, blob: np.ndarray, epilogue: str, y: np.ndarray, path: str) -> None:
    """Compares with the reference, every element within what the documentation promises for it."""
    info = packing.describe(blob)
    w, x = reference.unpack_blob(blob.tobytes()), case.x
    activations = {WeightType.FP32: "fp32", WeightType.BF16: "bf16"}.get(info.weight_type, "int8")
    if activations == "int8" and path == "amx" and info.weight_type is WeightType.INT4 and len(x) > 23:
        # What docs/numerics.md says of AMX: both sides become bf16 numbers.
        activations, w = "bf16", reference.round_to_bf16(w)
    if activations == "int8":
        codes, scales = reference.quantize_int8(x, info.group_size)
        x = codes * scales
    expected = reference.sparse_amx_matmul(case.x, w, case.bias, epilogue, activations, info.group_size)
    magnitudes = np.abs(x).astype(np.float64) @ np.abs(w) + (0 if case.bias is None else np.abs(case.bias))
    allowed = SLOPE * SUM_ERROR * (1 + magnitudes) + EPILOGUE_ERROR * np.maximum(1, np.abs(expected))
    assert y.shape == expected.shape
    assert y.dtype == np.float32
    excess = np.abs(y.astype(np.float64) - expected) - allowed
    assert excess.max(initial=0.0) <= 0, f"{path} {info} {case} {epilogue}: {excess.max()} too far"


@pytest.mark.parametrize("weight_type", list(WeightType))
@pytest.mark.parametrize("isa", SUPPORTED)
def test_kernels_agree_with_the_reference(cases, isa: str, weight_type: WeightType) -> None:
    for index, case in enumerate(cases(100, 45)):
        form = (Form.AUTO, Form.SPARSE, Form.DENSE)[index % 3]
        blob = packing.pack(case.w, _options(weight_type, form, index))
        epilogue = EPILOGUES[index % len(EPILOGUES)]
        y, path = packing.matmul(blob, case.x, case.bias, epilogue, isa, threads=1 + index % 3)
        assert path == _path_of(isa, weight_type), str(case)
        _check(case, blob, epilogue, y, path)


@pytest.mark.parametrize("weight_type", list(WeightType))
@pytest.mark.parametrize("isa", SUPPORTED)
def test_threads_do_not_change_a_bit(cases, isa: str, weight_type: WeightType) -> None:
    for index, case in enumerate(cases(200, 6)):
        blob = packing.pack(case.w, _options(weight_type, index=index))
        results = [
            packing.matmul(blob, case.x, case.bias, "gelu", isa, threads)[0].tobytes() for threads in (1, 2, 3, 8)
        ]
        assert len(set(results)) == 1, str(case)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weight_type", list(WeightType))
@pytest.mark.parametrize("isa", SUPPORTED)
def test_a_row_does_not_depend_on_the_others(isa: str, weight_type: WeightType, bad: float) -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((130, 70), np.float32)
    w[rng.random(w.shape) < 0.5] = 0
    x = rng.standard_normal((4, 130), np.float32)
    blob = packing.pack(w, _options(weight_type))
    expected, _ = packing.matmul(blob, x, isa=isa)
    x[2, 101] = bad  # the other groups of the row are fine
    y, _ = packing.matmul(blob, x, isa=isa)
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(y[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("weight_type", QUANTIZED)
def test_activations_round_to_the_even_code(isa: str, weight_type: WeightType) -> None:
    # A scale of one on both sides: the outputs are the codes, times the weight.
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]], np.float32)
    weight = 127.0 if weight_type is WeightType.INT8 else -8.0
    blob = packing.pack(np.diag(np.full(8, weight, np.float32)), PackOptions(weight_type))
    y, _ = packing.matmul(blob, x, isa=isa)
    codes = [127, 0, 2, 2, 0, -2, -2, -127]
    np.testing.assert_array_equal(y[0], weight * np.array(codes))


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("weight_type", QUANTIZED)
def test_tiny_activations_are_zeros(isa: str, weight_type: WeightType) -> None:
    smallest = np.float32(2.0**-100)
    x = np.full((3, 64), smallest * np.float32(0.99), np.float32)
    x[1] = smallest
    x[2] = 1e-45
    bias = np.linspace(-1, 1, 20, dtype=np.float32)
    blob = packing.pack(np.full((64, 20), 2.0**70, np.float32), PackOptions(weight_type, scale_type=ScaleType.FP32))
    y, _ = packing.matmul(blob, x, bias, isa=isa)
    np.testing.assert_array_equal(y[2], bias)
    np.testing.assert_array_equal(y[0], bias)
    np.testing.assert_allclose(y[1] - bias, 2.0**-24, rtol=0.01, atol=6e-8)


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("weight_type", list(WeightType))
def test_empty_sizes(isa: str, weight_type: WeightType) -> None:
    for m, k, n in ((0, 40, 24), (3, 0, 24), (3, 40, 0), (0, 0, 0)):
        for form in (Form.SPARSE, Form.DENSE):
            blob = packing.pack(np.ones((k, n), np.float32), PackOptions(weight_type, form))
            bias = np.linspace(-1, 1, n, dtype=np.float32)
            y, _ = packing.matmul(blob, np.ones((m, k), np.float32), bias, "relu", isa)
            assert y.shape == (m, n)
            if k == 0:
                np.testing.assert_array_equal(y, np.broadcast_to(np.maximum(bias, 0), (m, n)))


@pytest.mark.parametrize("weight_type", list(WeightType))
def test_no_level_named_takes_the_kernel_that_info_names(cases, weight_type: WeightType) -> None:
    kernels = library.cpu_info()["kernels"][weight_type.value]
    for index, case in enumerate(cases(300, 5)):
        blob = packing.pack(case.w, _options(weight_type, index=index))
        y, path = packing.matmul(blob, case.x, case.bias)
        assert path == kernels[str(max(int(first) for first in kernels if int(first) <= case.x.shape[0]))]
        _check(case, blob, "none", y, path)


def test_leading_dimensions_and_no_rows() -> None:
    w = np.random.default_rng(8).standard_normal((40, 24), np.float32)
    blob = packing.pack(w, PackOptions(WeightType.FP32))
    for shape in ((40,), (2, 40), (3, 2, 40), (0, 40), (2, 0, 40)):
        x = np.random.default_rng(9).standard_normal(shape, np.float32)
        y, _ = packing.matmul(blob, x)
        assert y.shape == (*shape[:-1], 24)
        np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)


def test_arguments_that_do_not_fit() -> None:
    blob = packing.pack(np.ones((4, 3), np.float32), PackOptions())
    x = np.ones((2, 4), np.float32)
    with pytest.raises(SparamxError, match="K = 4"):
        packing.matmul(blob, np.ones((2, 5), np.float32))
    with pytest.raises(SparamxError, match="N = 3"):
        packing.matmul(blob, x, np.ones(4, np.float32))
    with pytest.raises(SparamxError, match="'swish'"):
        packing.matmul(blob, x, epilogue="swish")
    with pytest.raises(SparamxError):
        packing.matmul(blob[:200], x)


def test_levels_that_are_not_there_are_errors() -> None:
    blob = packing.pack(np.ones((4, 3), np.float32), PackOptions())
    for isa in ["pentium", *(name for name, level in LEVELS.items() if not level["supported"])]:
        with pytest.raises(SparamxError, match=isa):
            packing.matmul(blob, np.ones((1, 4), np.float32), isa=isa)


@pytest.mark.parametrize("form", [Form.SPARSE, Form.DENSE])
@pytest.mark.parametrize("weight_type", QUANTIZED)
@pytest.mark.parametrize("isa", SUPPORTED)
def test_the_ends_of_the_range_of_codes(isa: str, weight_type: WeightType, form: Form) -> None:
    """The packer's own scales never give the lowest int8 code; those of a model that was quantized before do."""
    low, high = (-128, 127) if weight_type is WeightType.INT8 else (-8, 7)
    options = _options(weight_type, form)
    rng = np.random.default_rng(7)
    k, n = 1100, 40
    codes = rng.choice([low, high, 0], (k, n), p=[0.6, 0.2, 0.2]).astype(np.float32)
    codes[:, 0] = low
    scales = np.full((options.scale_groups(k), n), 0.125, np.float32)
    scales[:, ::3] *= -1
    w = codes * np.repeat(scales, options.group_size or k, axis=0)[:k]
    blob = packing.pack(w, options, scales)
    for m in (1, 5, 40):
        # Whole numbers up to 127 are their own codes, and every sum is exact.
        x = rng.integers(-127, 128, (m, k)).astype(np.float32)
        x[:, :: options.group_size or k] = 127
        x[:, 1] = -127
        y, path = packing.matmul(blob, x, isa=isa)
        if path == "amx" and weight_type is WeightType.INT4 and m > 23:
            x = reference.round_to_bf16(x)
        expected = x.astype(np.float64) @ w
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(x).astype(np.float64).dot(np.abs(w)).max())


@pytest.mark.parametrize("isa", SUPPORTED)
def test_relu_of_infinite_sums(isa: str) -> None:
    bias = np.array([-np.inf, np.inf, np.nan, -1.0, -0.0, 2.0], np.float32)
    blob = packing.pack(np.zeros((8, bias.size), np.float32), PackOptions(WeightType.FP32))
    y, _ = packing.matmul(blob, np.ones((3, 8), np.float32), bias, "relu", isa)
    np.testing.assert_array_equal(y, np.tile(np.array([0, np.inf, np.nan, 0, 0, 2], np.float32), (3, 1)))
    assert not np.signbit(y[:, [0, 3]]).any()
