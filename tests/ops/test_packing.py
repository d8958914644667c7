"""Packing against the reference that reads docs/format.md on its own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sparamx_onnx.ops import packing, reference
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packing import Form, PackOptions, ScaleType, WeightType

FLOATS = [WeightType.FP32, WeightType.BF16]
FORMS = [Form.AUTO, Form.SPARSE, Form.DENSE]


def _stored(w: np.ndarray, weight_type: WeightType) -> np.ndarray:
    """What a weight is after packing and unpacking."""
    w = w.astype(np.float32)
    return w if weight_type is WeightType.FP32 else reference.round_to_bf16(w)


@pytest.mark.parametrize("weight_type", FLOATS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_round_trip(cases, seed: int, form: Form, weight_type: WeightType) -> None:
    options = PackOptions(weight_type=weight_type, form=form)
    for case in cases(seed, 10):
        blob = packing.pack(case.w, options)
        expected = _stored(case.w, weight_type)
        packing.validate(blob)
        np.testing.assert_array_equal(packing.unpack(blob), expected, err_msg=str(case))
        np.testing.assert_array_equal(reference.unpack_blob(blob.tobytes()), expected, err_msg=str(case))

        info = packing.describe(blob)
        header = reference.read_header(blob.tobytes())
        nnz = np.count_nonzero(expected)
        assert (info.k, info.n, info.nnz, info.blob_bytes) == (*case.w.shape, nnz, blob.size)
        assert (header.k, header.n, header.nnz, header.blob_bytes) == (*case.w.shape, nnz, blob.size)
        assert info.weight_type is weight_type
        assert info.sparsity == 1 - nnz / case.w.size
        assert info.form is (form if form is not Form.AUTO else info.form)
        assert header.form == {Form.SPARSE: 1, Form.DENSE: 2}[info.form]
        assert packing.expected_size(*case.w.shape, nnz, weight_type, form) == (blob.size, info.form)


@pytest.mark.parametrize("weight_type", FLOATS)
def test_auto_takes_the_smaller_form(weight, weight_type: WeightType) -> None:
    rng = np.random.default_rng(0)
    for sparsity, form in ((0.0, Form.DENSE), (0.5, Form.SPARSE), (1.0, Form.SPARSE)):
        w = weight(rng, 640, 320, sparsity, holes=False)
        sizes = {f: packing.packed_size(w, PackOptions(weight_type, f)) for f in FORMS}
        assert sizes[Form.AUTO] == min(sizes[Form.SPARSE], sizes[Form.DENSE])
        assert packing.describe(packing.pack(w, PackOptions(weight_type))).form is form


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("weight_type", FLOATS)
def test_source_types_and_strides(weight, source: type, weight_type: WeightType) -> None:
    rng = np.random.default_rng(1)
    options = PackOptions(weight_type)
    w = weight(rng, 70, 45, 0.4, holes=True).astype(source)
    expected = packing.pack(np.ascontiguousarray(w), options)
    np.testing.assert_array_equal(packing.unpack(expected), _stored(w, weight_type))
    padded = np.zeros((140, 100), source)
    padded[::2, 3:93:2] = w
    views = {
        "column-major": np.asfortranarray(w),
        "transposed": np.ascontiguousarray(w.T).T,
        "strided": padded[::2, 3:93:2],
        "reversed": np.ascontiguousarray(w[::-1, ::-1])[::-1, ::-1],
    }
    for name, view in views.items():
        np.testing.assert_array_equal(packing.pack(view, options), expected, err_msg=name)


def test_foreign_byte_order_and_unaligned_memory(weight) -> None:
    w = weight(np.random.default_rng(2), 33, 18, 0.5, holes=False)
    expected = packing.pack(w, PackOptions())
    np.testing.assert_array_equal(packing.pack(w.astype(">f4"), PackOptions()), expected)
    buffer = np.zeros(w.nbytes + 1, np.uint8)
    unaligned = buffer[1:].view(np.float32).reshape(w.shape)
    unaligned[...] = w
    np.testing.assert_array_equal(packing.pack(unaligned, PackOptions()), expected)


@pytest.mark.parametrize("weight_type", FLOATS)
def test_threads_do_not_change_the_bytes(weight, weight_type: WeightType) -> None:
    w = weight(np.random.default_rng(3), 600, 333, 0.5, holes=True)
    blobs = [packing.pack(w, PackOptions(weight_type, threads=threads)).tobytes() for threads in (1, 2, 5, 0)]
    assert len(set(blobs)) == 1
    unpacked = [packing.unpack(np.frombuffer(blobs[0], np.uint8), threads).tobytes() for threads in (1, 3, 0)]
    assert len(set(unpacked)) == 1


def test_special_values() -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-39, 3.4e38, 1.0 + 2**-8], np.float32)
    w = np.tile(special, (40, 2))
    fp32 = packing.unpack(packing.pack(w, PackOptions(WeightType.FP32, Form.SPARSE)))
    np.testing.assert_array_equal(fp32, w)
    assert not np.signbit(fp32[w == 0]).any()
    # Denormal values become zero; 3.4e38 rounds to infinity; 1 + 2^-8 lies halfway and rounds to even.
    bf16 = packing.pack(w, PackOptions(WeightType.BF16, Form.SPARSE))
    expected = [0, 0, np.inf, -np.inf, np.nan, 0, 0, np.inf, 1]
    np.testing.assert_array_equal(packing.unpack(bf16)[0, :9], expected)
    assert packing.describe(bf16).nnz == 5 * w.size // special.size


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("weight_type", FLOATS)
def test_empty_matrices(shape: tuple[int, int], weight_type: WeightType) -> None:
    for form in FORMS:
        blob = packing.pack(np.zeros(shape, np.float32), PackOptions(weight_type, form))
        assert packing.unpack(blob).shape == shape
        assert reference.unpack_blob(blob.tobytes()).shape == shape
        assert packing.describe(blob).sparsity == 0.0


def test_pack_into_a_buffer_of_the_callers(weight) -> None:
    w = weight(np.random.default_rng(4), 50, 60, 0.5, holes=False)
    options = PackOptions()
    buffer = np.full(packing.packed_size(w, options), 255, np.uint8)
    packing.pack_into(w, options, buffer)
    np.testing.assert_array_equal(buffer, packing.pack(w, options))
    with pytest.raises(SparamxError, match="bytes"):
        packing.pack_into(w, options, buffer[:-1].copy())
    buffer.flags.writeable = False
    with pytest.raises(SparamxError, match="writable"):
        packing.pack_into(w, options, buffer)
    with pytest.raises(SparamxError, match="writable"):
        packing.pack_into(w, options, np.zeros(10, np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("w", "options", "sentence"),
    [
        (np.zeros(4, np.float32), PackOptions(), r"two dimensions \[K, N\], not the shape \[4\]"),
        (np.zeros((2, 2), np.float64), PackOptions(), "must be float32, float16 or bfloat16, not float64"),
        (np.zeros((2, 2), np.int8), PackOptions(), "not int8"),
        (np.zeros((2, 2), np.float32), PackOptions(group_size=32), "groups"),
        (np.zeros((2, 2), np.float32), PackOptions(scale_type=ScaleType.FP16), "scales"),
    ],
)
def test_what_cannot_be_packed(w: np.ndarray, options: PackOptions, sentence: str) -> None:
    with pytest.raises(SparamxError, match=sentence):
        packing.pack(w, options)


def test_damaged_blobs_are_refused(weight) -> None:
    blob = packing.pack(weight(np.random.default_rng(5), 100, 100, 0.5, holes=False), PackOptions())
    for damaged in (blob[:-1], blob[:100], blob[:0], np.zeros(300, np.uint8)):
        for function in (packing.validate, packing.describe, packing.unpack):
            with pytest.raises(SparamxError):
                function(damaged)
        with pytest.raises(SparamxError):
            reference.unpack_blob(damaged.tobytes())
    newer = blob.copy()
    newer[8] = 2
    with pytest.raises(SparamxError, match="version 2"):
        packing.validate(newer)
    with pytest.raises(SparamxError, match="uint8 vector"):
        packing.describe(blob.reshape(-1, 64))


def test_the_reference_checks_what_the_format_promises(weight) -> None:
    blob = packing.pack(weight(np.random.default_rng(6), 100, 100, 0.5, holes=False), PackOptions())
    header = reference.read_header(blob.tobytes())
    for section, sentence in ((reference.SECTION_OFFSETS, "offsets"), (reference.SECTION_BITMAP, "offsets")):
        damaged = blob.copy()
        damaged[header.sections[section][0] + 8] ^= 1
        with pytest.raises(SparamxError, match=sentence):
            reference.unpack_blob(damaged.tobytes())


def test_size_of_types_that_are_not_predicted() -> None:
    with pytest.raises(SparamxError, match="int8"):
        packing.expected_size(10, 10, 5, WeightType.INT8)


@pytest.mark.parametrize("weight_type", FLOATS)
@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_counting_agrees_with_packing(monkeypatch: pytest.MonkeyPatch, source: type, weight_type: WeightType) -> None:
    special = [0.0, -0.0, 1.0, -1.0, np.nan, np.inf, 1e-45, -1e-39, 1e-40, 2.0**-126, -(2.0**-127), 6e-8, -6e-8, 1e-6]
    w = np.tile(np.array(special, np.float32), (9, 5)).astype(source)
    monkeypatch.setattr(packing, "_CHUNK", 17)
    for view in (w, w.T, np.asfortranarray(w), w[::2], w[:, 1:4]):
        blob = np.empty(packing.packed_size(view, PackOptions(weight_type)), np.uint8)
        packing.pack_into(view, PackOptions(weight_type), blob)
        assert packing.count_nonzero(view, weight_type) == packing.describe(blob).nnz
        np.testing.assert_array_equal(packing.pack(view, PackOptions(weight_type)), blob)
