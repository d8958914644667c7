"""Packing against the reference that reads docs/format.md on its own."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from sparamx_onnx.ops import packing, reference
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packing import GROUP_SIZES, Form, PackOptions, ScaleType, WeightType

FLOATS = [WeightType.FP32, WeightType.BF16]
TYPES = list(WeightType)
QUANTIZED = [
    PackOptions(WeightType.INT8),
    *(
        PackOptions(WeightType.INT4, scale_type=scale_type, group_size=group_size)
        for scale_type in (ScaleType.INT8, ScaleType.FP16, ScaleType.FP32)
        for group_size in GROUP_SIZES
    ),
]
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


def _quantized_by(w: np.ndarray, scales: np.ndarray, lowest: int, highest: int) -> np.ndarray:
    """Weights rounded to multiples of their scales, [K, N] each."""
    codes = np.rint(w / np.where(scales == 0, 1, scales))
    return (np.clip(codes, lowest, highest) * scales).astype(np.float32)


def _groups(w: np.ndarray, group_size: int) -> np.ndarray:
    """[groups, group size, N], filled up with zeros."""
    k, n = w.shape
    return np.pad(w, ((0, -k % group_size), (0, 0))).reshape(-1, group_size, n)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", QUANTIZED, ids=lambda o: f"{o.weight_type}-{o.scale_type}-{o.group_size}")
def test_quantized_round_trip(cases, options: PackOptions, form: Form) -> None:
    options = dataclasses.replace(options, form=form)
    for case in cases(10 + options.group_size, 5):
        w = case.w
        blob = packing.pack(w, options)
        packing.validate(blob)
        stored = packing.unpack(blob)
        np.testing.assert_array_equal(reference.unpack_blob(blob.tobytes()), stored, err_msg=str(case))
        assert not stored[w == 0].any(), "zeros stay zeros"
        info = packing.describe(blob)
        header = reference.read_header(blob.tobytes())
        assert info.weight_type is options.weight_type
        assert info.group_size == header.group_size == options.group_size
        assert info.scale_type is (ScaleType.FP32 if options.weight_type is WeightType.INT8 else options.scale_type)
        assert (info.k, info.n, info.nnz, info.blob_bytes) == (*w.shape, np.count_nonzero(stored), blob.size)
        assert packing.packed_size(w, options) == blob.size
        if form is Form.AUTO:
            sizes = {f: packing.packed_size(w, dataclasses.replace(options, form=f)) for f in FORMS}
            assert blob.size == min(sizes.values())
        else:
            assert info.form is form
        if options.weight_type is WeightType.INT8:
            scales = np.broadcast_to(np.abs(w).max(axis=0) / np.float32(127), w.shape)
            np.testing.assert_array_equal(stored, _quantized_by(w, scales, -127, 127), err_msg=str(case))
            assert packing.expected_size(*w.shape, info.nnz, WeightType.INT8, form) == (blob.size, info.form)


@pytest.mark.parametrize("options", QUANTIZED[1:], ids=lambda o: f"{o.scale_type}-{o.group_size}")
def test_int4_scales_are_at_least_as_good_as_the_usual_one(cases, options: PackOptions) -> None:
    """docs/numerics.md: by the one sum of errors never worse than largest weight / -8, by the other hardly."""
    plain = np.zeros(2)
    for case in cases(30 + options.group_size, 3):
        groups = _groups(case.w, options.group_size)
        largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1, keepdims=True), axis=1)
        scales = largest / np.float32(-8)
        if options.scale_type is ScaleType.FP16:
            scales = scales.astype(np.float16).astype(np.float32)
        elif options.scale_type is ScaleType.INT8:
            columns = np.abs(case.w).max(axis=0) / np.float32(840)
            numbers = np.rint(scales / np.where(columns == 0, 1, columns))
            numbers = np.where(numbers == 0, np.sign(scales), numbers)
            scales = (numbers * columns).astype(np.float32)
        usual = groups - _quantized_by(groups, np.broadcast_to(scales, groups.shape), -8, 7)
        stored = groups - _groups(packing.unpack(packing.pack(case.w, options)), options.group_size)
        magnitudes = np.abs(groups).astype(np.float64)
        for power, factor in ((0.5, 1.0), (2.0, 1.5)):
            ours, theirs = ((errors**2 * magnitudes**power).sum(axis=1) for errors in (stored, usual))
            rounding = 1e-6 * np.abs(largest[:, 0]) ** (2 + power)
            assert (ours <= factor * theirs + rounding).all(), f"{case} {power}"
        # Of a matrix of a few groups it may be larger.
        plain += [(errors**2).sum(dtype=np.float64) / max((case.w**2).sum(), 1e-30) for errors in (stored, usual)]
    assert plain[0] <= plain[1] * (1 + 1e-6)


@pytest.mark.parametrize("weight_type", [WeightType.INT8, WeightType.INT4])
def test_weights_that_cannot_be_quantized(weight_type: WeightType) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        w = np.ones((40, 20), np.float32)
        w[17, 3] = bad
        with pytest.raises(SparamxError, match="not finite, which int8 and int4 cannot hold"):
            packing.pack(w, PackOptions(weight_type))


def test_weights_beyond_fp16_scales() -> None:
    w = np.linspace(-1e6, 1e6, 64 * 5, dtype=np.float32).reshape(64, 5)
    with pytest.raises(SparamxError, match="take fp32 scales"):
        packing.pack(w, PackOptions(WeightType.INT4, scale_type=ScaleType.FP16))
    for scale_type in (ScaleType.INT8, ScaleType.FP32):
        stored = packing.unpack(packing.pack(w, PackOptions(WeightType.INT4, scale_type=scale_type)))
        np.testing.assert_allclose(stored, w, atol=1e6 / 7)


def test_int8_scales_are_as_accurate_as_fp16_ones_with_fewer_bytes(weight) -> None:
    rng = np.random.default_rng(8)
    for sparsity, spread in ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0)):
        w = weight(rng, 2048, 160, sparsity, holes=False) * np.exp(spread * rng.standard_normal((2048, 1)))
        w = w.astype(np.float32)
        errors, sizes = {}, {}
        for scale_type in (ScaleType.INT8, ScaleType.FP16):
            blob = packing.pack(w, PackOptions(WeightType.INT4, Form.SPARSE, scale_type))
            errors[scale_type] = ((packing.unpack(blob) - w).astype(np.float64) ** 2).sum()
            sizes[scale_type] = blob.size
        assert errors[ScaleType.INT8] <= 1.01 * errors[ScaleType.FP16]
        saved = 2048 * 160 / 32 - 160 * 4
        assert abs(sizes[ScaleType.FP16] - sizes[ScaleType.INT8] - saved) < 0.02 * saved


@pytest.mark.parametrize("weight_type", TYPES)
def test_auto_takes_the_smaller_form(weight, weight_type: WeightType) -> None:
    rng = np.random.default_rng(0)
    # Of random weights in int4, a sixth rounds to zero, which is not enough for the sparse form to be smaller.
    for sparsity, form in ((0.0, Form.DENSE), (0.5, Form.SPARSE), (1.0, Form.SPARSE)):
        w = weight(rng, 640, 320, sparsity, holes=False)
        sizes = {f: packing.packed_size(w, PackOptions(weight_type, f)) for f in FORMS}
        assert sizes[Form.AUTO] == min(sizes[Form.SPARSE], sizes[Form.DENSE])
        assert packing.describe(packing.pack(w, PackOptions(weight_type))).form is form


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("weight_type", TYPES)
def test_source_types_and_strides(weight, source: type, weight_type: WeightType) -> None:
    rng = np.random.default_rng(1)
    options = PackOptions(weight_type)
    w = weight(rng, 70, 45, 0.4, holes=True).astype(source)
    expected = packing.pack(np.ascontiguousarray(w), options)
    if weight_type in FLOATS:
        np.testing.assert_array_equal(packing.unpack(expected), _stored(w, weight_type))
    else:
        np.testing.assert_array_equal(expected, packing.pack(w.astype(np.float32), options))
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


@pytest.mark.parametrize("weight_type", TYPES)
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
@pytest.mark.parametrize("weight_type", TYPES)
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
        (np.zeros((2, 2), np.float32), PackOptions(WeightType.INT8, group_size=32), "int8 weights take no groups"),
        (np.zeros((2, 2), np.float32), PackOptions(WeightType.INT8, scale_type=ScaleType.FP16), "take fp32 scales"),
        (np.zeros((2, 2), np.float32), PackOptions(WeightType.INT4, group_size=48), "16, 32, 64, 128 or 256"),
        (np.zeros((2, 2), np.float32), PackOptions(WeightType.INT4, group_size=512), "16, 32, 64, 128 or 256"),
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


@pytest.mark.parametrize("weight_type", TYPES)
def test_the_reference_checks_what_the_format_promises(weight, weight_type: WeightType) -> None:
    options = PackOptions(weight_type, Form.SPARSE)
    blob = packing.pack(weight(np.random.default_rng(6), 100, 100, 0.5, holes=False), options)
    header = reference.read_header(blob.tobytes())
    # Of int4, the emptier half of a tile has room for more, so that the offsets still agree.
    for section, sentence in ((reference.SECTION_OFFSETS, "offsets"), (reference.SECTION_BITMAP, "offsets|as many")):
        damaged = blob.copy()
        damaged[header.sections[section][0] + 8] ^= 0b10101
        with pytest.raises(SparamxError, match=sentence):
            reference.unpack_blob(damaged.tobytes())


def test_what_shape_and_non_zeros_do_not_tell() -> None:
    with pytest.raises(SparamxError, match="size of int4"):
        packing.expected_size(10, 10, 5, WeightType.INT4)
    for weight_type in (WeightType.INT8, WeightType.INT4):
        with pytest.raises(SparamxError, match=f"non-zeros of {weight_type.value}"):
            packing.count_nonzero(np.ones((2, 2), np.float32), weight_type)


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


def _codes(options: PackOptions, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the type's whole range, a third of them zero, and scales [groups, N] of both signs."""
    rng = np.random.default_rng(seed)
    low, high = (-128, 127) if options.weight_type is WeightType.INT8 else (-8, 7)
    codes = rng.integers(low, high + 1, shape) * (rng.random(shape) < 2 / 3)
    codes[0, :2] = low, high
    scales = rng.standard_normal((options.scale_groups(shape[0]), shape[1])).astype(np.float32) * 10.0 ** rng.integers(
        -4, 4, shape[1]
    )
    return codes, scales.astype(np.float16 if options.scale_type is ScaleType.FP16 else np.float32).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [options for options in QUANTIZED if options.scale_type is not ScaleType.INT8],
    ids=lambda o: f"{o.weight_type}-{o.scale_type}-{o.group_size}",
)
def test_given_scales_keep_every_code(options: PackOptions, form: Form) -> None:
    options = dataclasses.replace(options, form=form)
    for seed, (k, n) in enumerate([(1, 1), (70, 45), (256, 32), (700, 19)]):
        codes, scales = _codes(options, (k, max(n, 2)), seed)
        spread = np.repeat(scales, options.group_size or k, axis=0)[:k]
        w = codes.astype(np.float32) * spread
        blob = packing.pack(w, options, scales)
        packing.validate(blob)
        assert packing.describe(blob).nnz == np.count_nonzero(w)
        np.testing.assert_array_equal(packing.unpack(blob), w)
        np.testing.assert_array_equal(reference.unpack_blob(blob.tobytes()), w)
        # From a transposed view too.
        np.testing.assert_array_equal(packing.pack(np.asfortranarray(w), options, np.asfortranarray(scales)), blob)


def test_given_scales_that_cannot_be_used() -> None:
    w = np.ones((64, 3), np.float32)
    int8, int4 = PackOptions(WeightType.INT8), PackOptions(WeightType.INT4)
    for options, groups in ((int8, 1), (int4, 2)):
        with pytest.raises(SparamxError, match=rf"must have the shape \[{groups}, 3\], not \[5, 3\]"):
            packing.pack(w, options, np.ones((5, 3), np.float32))
        with pytest.raises(SparamxError, match="a given scale is not finite"):
            packing.pack(w, options, np.full((groups, 3), np.inf, np.float32))
        with pytest.raises(SparamxError, match="not finite, which int8 and int4 cannot hold"):
            packing.pack(w * np.float32(np.nan), options, np.ones((groups, 3), np.float32))
    with pytest.raises(SparamxError, match="no fp16 number"):
        packing.pack(w, int4, np.full((2, 3), 1e-3, np.float32))
    with pytest.raises(SparamxError, match=r"must have the shape \[0, 3\]"):
        packing.pack(w, PackOptions(WeightType.BF16), np.ones((1, 3), np.float32))


@pytest.mark.parametrize("weight_type", list(WeightType))
@pytest.mark.parametrize("form", [Form.SPARSE, Form.DENSE])
@pytest.mark.parametrize(("k", "widths"), [(70, (16, 32, 5)), (1100, (48, 64)), (512, (16,)), (3, (32, 16, 16))])
def test_joined_blobs_are_those_of_the_joined_matrix(
    weight_type: WeightType, form: Form, k: int, widths: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(k)
    parts = [rng.standard_normal((k, n), np.float32) for n in widths]
    for part in parts:
        part[rng.random(part.shape) < 0.5] = 0
    options = PackOptions(weight_type, form)
    joined = packing.join([packing.pack(part, options) for part in parts])
    assert joined.tobytes() == packing.pack(np.concatenate(parts, axis=1), options).tobytes()


def test_blobs_that_cannot_be_joined() -> None:
    w = np.ones((8, 24), np.float32)
    blob = packing.pack(w, PackOptions())
    others = [(w, WeightType.INT8), (np.ones((9, 16), np.float32), WeightType.BF16)]
    for other, weight_type in others:
        with pytest.raises(SparamxError, match="must have the same K, type, form"):
            packing.join([blob, packing.pack(other, PackOptions(weight_type))])
    with pytest.raises(SparamxError, match="multiple of 16 columns"):
        packing.join([blob, blob])
    with pytest.raises(SparamxError, match="must have the same"):
        packing.join([])
