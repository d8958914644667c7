"""Every kernel that this CPU runs, against the reference, over random shapes."""

from __future__ import annotations

import numpy as np
import pytest

from sparamx_onnx.ops import library, packing, reference
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packing import Form, PackOptions, WeightType

LEVELS = {level["name"]: level for level in library.cpu_info()["levels"]}
SUPPORTED = [name for name, level in LEVELS.items() if level["supported"]]
EPILOGUES = ["none", "relu", "gelu", "gelu_tanh", "silu"]

# What docs/numerics.md promises of every path: relative to 1 plus the sum of the magnitudes of the products.
SUM_ERROR = 2e-6
# And of the activation functions: relative to 1 or the result; their slope is below 1.13.
EPILOGUE_ERROR = 2e-7
SLOPE = 1.13


def _check(case, blob: np.ndarray, epilogue: str, y: np.ndarray, what: str) -> None:
    """Compares with the reference, every element within what the documentation promises for it."""
    activations = "bf16" if packing.describe(blob).weight_type is WeightType.BF16 else "fp32"
    w = reference.unpack_blob(blob.tobytes())
    expected = reference.sparse_amx_matmul(case.x, w, case.bias, epilogue, activations)
    magnitudes = np.abs(case.x).astype(np.float64) @ np.abs(w) + (0 if case.bias is None else np.abs(case.bias))
    allowed = SLOPE * SUM_ERROR * (1 + magnitudes) + EPILOGUE_ERROR * np.maximum(1, np.abs(expected))
    assert y.shape == expected.shape
    assert y.dtype == np.float32
    excess = np.abs(y.astype(np.float64) - expected) - allowed
    assert excess.max(initial=0.0) <= 0, f"{what} {case} {epilogue}: {excess.max()} too far"


def _path_of(level: str, weight_type: WeightType) -> str:
    """The kernel that a level runs: fp32 weights need nothing beyond AVX-512 without VBMI2."""
    return "avx512" if weight_type is WeightType.FP32 and level.startswith("avx512") else level


@pytest.mark.parametrize("weight_type", [WeightType.FP32, WeightType.BF16])
@pytest.mark.parametrize("isa", SUPPORTED)
def test_kernels_agree_with_the_reference(cases, isa: str, weight_type: WeightType) -> None:
    for index, case in enumerate(cases(100, 45)):
        form = (Form.AUTO, Form.SPARSE, Form.DENSE)[index % 3]
        blob = packing.pack(case.w, PackOptions(weight_type, form))
        epilogue = EPILOGUES[index % len(EPILOGUES)]
        y, path = packing.matmul(blob, case.x, case.bias, epilogue, isa, threads=1 + index % 3)
        assert path == _path_of(isa, weight_type), str(case)
        _check(case, blob, epilogue, y, f"{path} {form}")


@pytest.mark.parametrize("weight_type", [WeightType.FP32, WeightType.BF16])
@pytest.mark.parametrize("isa", SUPPORTED)
def test_threads_do_not_change_a_bit(cases, isa: str, weight_type: WeightType) -> None:
    for case in cases(200, 6):
        blob = packing.pack(case.w, PackOptions(weight_type))
        results = [
            packing.matmul(blob, case.x, case.bias, "gelu", isa, threads)[0].tobytes() for threads in (1, 2, 3, 8)
        ]
        assert len(set(results)) == 1, str(case)


@pytest.mark.parametrize("isa", SUPPORTED)
def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    rng = np.random.default_rng(7)
    w = rng.standard_normal((130, 70), np.float32)
    w[rng.random(w.shape) < 0.5] = 0
    x = rng.standard_normal((4, 130), np.float32)
    x[2] = np.nan
    y, _ = packing.matmul(packing.pack(w, PackOptions()), x, isa=isa)
    assert np.isnan(y[2]).all()
    assert np.isfinite(y[[0, 1, 3]]).all()


def test_no_level_named_takes_the_best_or_an_equal_one(cases) -> None:
    for case in cases(300, 5):
        blob = packing.pack(case.w, PackOptions())
        y, path = packing.matmul(blob, case.x, case.bias)
        assert path == library.cpu_info()["kernels"]["bf16"]
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
    for isa in ["pentium", *(name for name in LEVELS if name not in SUPPORTED)]:
        with pytest.raises(SparamxError, match=isa):
            packing.matmul(blob, np.ones((1, 4), np.float32), isa=isa)
