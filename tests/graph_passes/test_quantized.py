"""Models that are quantized already: their codes and scales are kept bit for bit, or they stay as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from sparamx_onnx.graph_passes import pipeline
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.plan import Action, Reason
from sparamx_onnx.ops import packing
from sparamx_onnx.session import InferenceSession

K, N = 70, 45
node = helper.make_node
MICROSOFT = "com.microsoft"
EXACT = 1e-5
# What ONNX Runtime's one scale of activations for all rows and ours for every row may differ by.
DYNAMIC = 0.05


def _x(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _codes(low: int, high: int, shape: tuple[int, ...], zero: int = 0, seed: int = 0) -> np.ndarray:
    """Codes of the whole range; 0.4 of them mean zero."""
    rng = np.random.default_rng([seed, *shape])
    codes = rng.integers(low, high + 1, shape)
    codes[rng.random(shape) < 0.4] = zero
    codes.flat[:2] = low, high
    return codes


def _scales(*shape: int, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng([seed, *shape]).standard_normal(shape) - 4).astype(np.float32)


def _blob(converted, name: str) -> np.ndarray:
    (tensor,) = [t for t in onnx.load(converted.path).graph.initializer if t.name == name]
    return numpy_helper.to_array(tensor)


def _kept(converted, name: str, w: np.ndarray, weight_type: str, group_size: int = 0) -> None:
    """A node has kept its codes: what the packed weight means is what the model's weight [K, N] meant, to the bit."""
    plan = converted.node(name)
    assert plan.action is not Action.LEFT_ALONE
    assert (plan.keeps_codes, plan.weight_type, plan.group_size or 0) == (True, weight_type, group_size)
    assert (plan.k, plan.n) == w.shape
    np.testing.assert_array_equal(packing.unpack(_blob(converted, plan.packed)), w)
    assert plan.nnz == np.count_nonzero(w)


# --- DequantizeLinear in front of a MatMul or a Gemm ------------------------------------------------------------------

_TYPES = {
    np.int8: TensorProto.INT8, np.uint8: TensorProto.UINT8,
    "int4": TensorProto.INT4, "uint4": TensorProto.UINT4, np.int32: TensorProto.INT32,
}  # fmt: skip


def _tensor(name: str, codes: np.ndarray, dtype: object) -> onnx.TensorProto:
    return helper.make_tensor(name, _TYPES[dtype], codes.shape, codes.ravel())


def _dequantizing(
    make_model,
    codes: np.ndarray,
    dtype: object,
    scale: np.ndarray,
    zero: np.ndarray | None,
    *,
    gemm=False,
    **attributes,
) -> onnx.ModelProto:
    """x W or, with ``gemm``, x W^T + b, with W dequantized in the graph."""
    inputs = ["q", "s"] if zero is None else ["q", "s", "z"]
    nodes = [node("DequantizeLinear", inputs, ["w"], **attributes)]
    nodes.append(node("Gemm", ["x", "w", "b"], ["y"], transB=1) if gemm else node("MatMul", ["x", "w"], ["y"]))
    k, n = codes.shape[::-1] if gemm else codes.shape
    proto = make_model(nodes, {"x": (3, k)}, ["y"], {"s": scale, "b": _x(n)}, opset=21)
    proto.graph.initializer.append(_tensor("q", codes, dtype))
    if zero is not None:
        proto.graph.initializer.append(_tensor("z", zero, dtype))
    return proto


def _meaning(codes: np.ndarray, scale: np.ndarray, zero: object = 0) -> np.ndarray:
    return (codes - zero).astype(np.float32) * scale


_N = np.arange(N)
_INT8 = _codes(-128, 127, (K, N))
_UINT8 = _codes(0, 255, (K, N), 128)
_UINT4 = _codes(0, 15, (K, N), 8)


@pytest.mark.parametrize(
    ("codes", "dtype", "scale", "zero", "attributes", "kept"),
    [
        (_INT8, np.int8, _scales(), None, {}, ("int8", 0)),
        (_INT8, np.int8, _scales(1), np.zeros(1, int), {}, ("int8", 0)),
        (_INT8, np.int8, _scales(N), np.zeros(N, int), {"axis": 1}, ("int8", 0)),
        (_INT8, np.int8, -_scales(N), None, {"axis": -1}, ("int8", 0)),
        (_UINT8, np.uint8, _scales(N), np.full(N, 128), {"axis": 1}, ("int8", 0)),
        # The zero is not in the middle, but the codes fit around it.
        (_codes(20, 240, (K, N), 120), np.uint8, _scales(), np.array(120), {}, ("int8", 0)),
        (_codes(0, 255, (K, N), 3) // 2 + _N, np.uint8, _scales(N), _N + 3, {"axis": 1}, ("int8", 0)),
        (_codes(-8, 7, (K, N)), "int4", _scales(N), None, {"axis": 1}, ("int4", 256)),
        (_UINT4, "uint4", _scales(), np.array(8), {}, ("int4", 256)),
        (_UINT4, "uint4", _scales(), np.array(3), {}, ("int8", 0)),
        (_codes(3, 12, (K, N), 6), "uint4", _scales(), np.array(6), {}, ("int4", 256)),
        (_UINT4, "uint4", _scales(5, N), np.full((5, N), 8), {"axis": 0, "block_size": 16}, ("int4", 16)),
        (_codes(-8, 7, (K, N)), "int4", _scales(2, N), None, {"axis": 0, "block_size": 48}, ("int4", 16)),
        (_codes(-8, 7, (300, N)), "int4", _scales(2, N), None, {"axis": 0, "block_size": 256}, ("int4", 256)),
        (_codes(-8, 7, (700, N)), "int4", _scales(2, N), None, {"axis": 0, "block_size": 512}, ("int4", 256)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gemm", [False, True])
def test_dequantized_weights_keep_their_codes(
    workbench, make_model, codes, dtype, scale, zero, attributes, kept, gemm
) -> None:
    block = attributes.get("block_size", 0)
    spread = [None if v is None else np.repeat(v, block, axis=0)[: len(codes)] if block else v for v in (scale, zero)]
    w = _meaning(codes, spread[0], 0 if spread[1] is None else spread[1])
    if gemm:
        codes, scale = codes.T, scale.T
        zero = None if zero is None else zero.T
        attributes = {**attributes, **({"axis": 1 - attributes["axis"] % 2} if attributes else {})}
    proto = _dequantizing(make_model, codes, dtype, scale, zero, gemm=gemm, **attributes)
    converted = workbench.convert(proto, weights=None)
    assert converted.op_types == ["SparseAMXMatMul"]
    _kept(converted, "y", w, *kept)
    assert converted.plan.options["kept"] == [kept[0]]
    constants = ir.from_proto(proto).graph.initializers
    assert converted.node("y").bytes_before == sum(constants[name].const_value.nbytes for name in {*constants} - {"b"})
    assert 0 < converted.error({"x": _x(3, len(w))}, optimized=False) <= DYNAMIC
    # The same weights in float32: nothing is lost but the codes.
    exact = workbench.convert(proto, weights="fp32", name="fp32.onnx")
    assert (exact.node("y").weight_type, exact.node("y").keeps_codes) == ("fp32", False)
    assert exact.error({"x": _x(3, len(w))}, optimized=False) <= EXACT


@pytest.mark.parametrize(
    ("codes", "dtype", "scale", "zero", "attributes", "words"),
    [
        (_UINT8, np.uint8, _scales(), np.array(100), {}, "from -100 to 155"),
        (_INT8, np.int8, _scales(K), None, {"axis": 0}, "differ along the inputs"),
        (_INT8, np.int8, _scales(5, N), None, {"axis": 0, "block_size": 16}, "a scale for every 16 inputs"),
        (_UINT4, "uint4", _scales(K, 3), None, {"axis": 1, "block_size": 16}, "differ along the inputs"),
        (_codes(-8, 7, (K, N)), "int4", _scales(9, N), None, {"axis": 0, "block_size": 8}, "for every 8 inputs"),
        (_UINT4, "uint4", _scales(5, N), np.full((5, N), 5), {"axis": 0, "block_size": 16}, "from -5 to 10"),
        (_INT8, np.int8, np.array(np.inf, np.float32), None, {}, "not finite"),
    ],
)
def test_codes_that_packed_weights_cannot_hold(
    workbench, make_model, codes, dtype, scale, zero, attributes, words
) -> None:
    proto = _dequantizing(make_model, codes, dtype, scale, zero, **attributes)
    converted = workbench.convert(proto, weights=None)
    plan = converted.node("y")
    assert (plan.reason, plan.weight_type, plan.keeps_codes) == (Reason.QUANTIZED_WEIGHT, None, False)
    assert words in plan.detail
    assert "--weights" in plan.text
    assert converted.op_types == ["DequantizeLinear", "MatMul"]
    if np.isfinite(scale).all():
        # Asked for, it becomes what any weight becomes.
        for weights, tolerance in (("fp32", EXACT), ("bf16", 1e-2), ("int8", DYNAMIC)):
            asked = workbench.convert(proto, weights=weights, name=f"{weights}.onnx")
            assert asked.op_types == ["SparseAMXMatMul"]
            assert asked.error({"x": _x(3, K)}, optimized=False) <= tolerance


def test_codes_of_a_weight_that_is_rounded_later_are_not_kept(workbench, make_model) -> None:
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        node("Cast", ["w"], ["half"], to=TensorProto.FLOAT16),
        node("MatMul", ["x", "half"], ["y"]),
    ]
    weights = {"q": _INT8.astype(np.int8), "s": _scales(N)}
    proto = make_model(nodes, {"x": (3, K)}, ["y"], weights, element_type=TensorProto.FLOAT16, opset=21)
    plan = workbench.convert(proto, weights=None).node("y")
    assert plan.reason is Reason.QUANTIZED_WEIGHT
    assert "rounded after" in plan.detail
    assert workbench.convert(proto, weights="fp32").node("y").action is not Action.LEFT_ALONE


def test_codes_between_whole_numbers_are_not_kept(workbench, make_model) -> None:
    weights = {"p": np.zeros((32, 2, 16), np.uint8), "s": _scales(64), "z": np.full(64, 7.5, np.float32)}
    attributes = {"K": 64, "N": 32, "bits": 4, "block_size": 32}
    nodes = [node("MatMulNBits", ["x", "p", "s", "z"], ["y"], domain=MICROSOFT, **attributes)]
    plan = workbench.convert(make_model(nodes, {"x": (3, 64)}, ["y"], weights), weights=None).node("y")
    assert plan.reason is Reason.QUANTIZED_WEIGHT


def test_malformed_scales(workbench, make_model) -> None:
    for scale, zero, attributes in (
        (_scales(3), None, {"axis": 1}),
        (_scales(N), None, {"axis": 4}),
        (_scales(N), np.zeros(3, int), {"axis": 1}),
        (_scales(4, N), None, {"axis": 0, "block_size": 16}),
    ):
        proto = _dequantizing(make_model, _INT8, np.int8, scale, zero, **attributes)
        (plan,) = workbench.convert(proto, weights=None).plan
        assert plan.reason is Reason.MALFORMED_NODE, attributes


@pytest.mark.parametrize("weights", [None, "fp32"])
def test_another_type_than_that_of_the_scales(workbench, make_model, weights) -> None:
    """From opset 23 on a DequantizeLinear may say what it makes: that is then the type of the weight."""
    for output_dtype, reason in (
        (TensorProto.FLOAT16, Reason.QUANTIZED_WEIGHT),
        (TensorProto.FLOAT, Reason.PACKED_DENSE),
    ):
        proto = _dequantizing(make_model, _INT8, np.int8, _scales(N), None, axis=1, output_dtype=output_dtype)
        proto.opset_import[0].version = 23
        converted = workbench.convert(proto, weights=weights)
        packed = {Reason.CONVERTED: Reason.PACKED_DENSE}  # which of the two depends on the codes
        assert packed.get(converted.node("y").reason, converted.node("y").reason) is reason


def test_scales_in_fp16_are_kept_in_fp16(workbench, make_model) -> None:
    halves = _scales(5, N).astype(np.float16).astype(np.float32)
    sizes = []
    for index, scale in enumerate((halves, halves * np.float32(1.0001))):
        proto = _dequantizing(make_model, _UINT4 - 8, "int4", scale, None, axis=0, block_size=16)
        converted = workbench.convert(proto, weights=None, name=f"{index}.onnx")
        blob = _blob(converted, "q.sparamx")
        sizes.append(blob.size)
        assert packing.describe(blob).scale_type.value == ("fp16", "fp32")[index]
        _kept(converted, "y", _meaning(_UINT4, np.repeat(scale, 16, 0)[:K], 8), "int4", 16)
    assert sizes[0] < sizes[1]


def test_a_quantized_weight_behind_cast_transpose_and_alpha(workbench, make_model) -> None:
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["half"], axis=0),
        node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT),
        node("Transpose", ["wide"], ["t"], perm=[1, 0]),
        node("Gemm", ["x", "t"], ["y"], alpha=0.3),
        node("Gemm", ["x", "wide"], ["z"], transB=1),
    ]
    codes, scale = _codes(-127, 127, (N, K)), _scales(N).astype(np.float16)
    proto = make_model(nodes, {"x": (3, K)}, ["y", "z"], {"q": codes.astype(np.int8), "s": scale}, opset=21)
    converted = workbench.convert(proto, weights=None)
    assert converted.op_types == ["SparseAMXMatMul"] * 2
    _kept(converted, "z", _meaning(codes.T, scale.astype(np.float32)), "int8")
    factors = scale.astype(np.float32) * np.float32(0.3)
    np.testing.assert_allclose(packing.unpack(_blob(converted, "q.sparamx")), codes.T * factors, rtol=1e-6)
    assert converted.error({"x": _x(3, K)}) <= DYNAMIC


# --- integer operators ------------------------------------------------------------------------------------------------


def _two_layers(make_model, sparse, tmp_path: Path) -> Path:
    nodes = [
        node("MatMul", ["x", "w0"], ["m0"]),
        node("Add", ["m0", "b0"], ["a0"]),
        node("Relu", ["a0"], ["r0"]),
        node("MatMul", ["r0", "w1"], ["m1"]),
        node("Add", ["m1", "b1"], ["y"]),
    ]
    weights = {"w0": sparse((K, N)), "b0": _x(N), "w1": sparse((N, 40)), "b1": _x(40)}
    path = tmp_path / "float.onnx"
    onnx.save(make_model(nodes, {"x": ("rows", K)}, ["y"], weights), path)
    return path


def _float_result(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """What MatMulInteger models compute with activations that are not quantized."""
    x = feeds["x"]
    arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for index in (0, 1):
        scale = next(arrays[name] for name in arrays if name.startswith(f"w{index}") and "scale" in name)
        zero = next(arrays[name] for name in arrays if name.startswith(f"w{index}") and "zero" in name)
        w = (arrays[f"w{index}_quantized"].astype(np.float32) - zero.astype(np.float32)) * scale
        x = x @ w + arrays[f"b{index}"]
        x = np.maximum(x, 0) if index == 0 else x
    return x


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("weight_type", ["QInt8", "QUInt8"])
def test_dynamically_quantized(workbench, make_model, sparse, tmp_path, open_session, per_channel, weight_type) -> None:
    path = tmp_path / "quantized.onnx"
    quantization.quantize_dynamic(
        _two_layers(make_model, sparse, tmp_path), path, per_channel=per_channel,
        weight_type=quantization.QuantType[weight_type], extra_options={"WeightSymmetric": True},
    )  # fmt: skip
    proto = onnx.load(path)
    assert [n.op_type for n in proto.graph.node].count("MatMulInteger") == 2
    feeds = {"x": _x(5, K)}
    for weights, name in ((None, "kept.onnx"), ("fp32", "fp32.onnx")):
        converted = workbench.convert(proto, weights=weights, name=name)
        assert converted.op_types == ["SparseAMXMatMul"] * 2
        assert {plan.action for plan in converted.plan} <= {Action.CONVERTED, Action.PACKED_DENSE}
        assert [plan.bias for plan in converted.plan] == [True, True]
        assert [plan.epilogue for plan in converted.plan] == ["relu", "none"]
        assert all(plan.keeps_codes == (weights is None) for plan in converted.plan)
        y = open_session(converted.path).run(None, feeds)[0]
        expected = _float_result(proto, feeds)
        error = np.abs(y - expected).max() / np.abs(expected).max()
        # With float32 weights the activations are not quantized at all.
        assert error <= (EXACT if weights else DYNAMIC)
        assert converted.error(feeds) <= DYNAMIC
        assert "DynamicQuantizeLinear" not in converted.op_types


def test_dynamic_quantization_that_something_else_uses_stays(workbench, make_model) -> None:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "w", "xz"], ["i"]),
        node("Cast", ["i"], ["c"], to=TensorProto.FLOAT),
        node("Mul", ["xs", "ws"], ["s"]),
        node("Mul", ["c", "s"], ["y"]),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["z"]),
    ]
    weights = {"w": _INT8.astype(np.int8), "ws": _scales(N)}
    converted = workbench.convert(make_model(nodes, {"x": (3, K)}, ["y", "z"], weights), weights=None)
    assert converted.op_types == ["DynamicQuantizeLinear", "SparseAMXMatMul", "DequantizeLinear"]
    _kept(converted, "i", _meaning(_INT8, weights["ws"]), "int8")
    assert converted.error({"x": _x(3, K)}) <= DYNAMIC


def test_fused_dynamic_operators(workbench, make_model) -> None:
    """What ONNX Runtime's extended optimizations make of the above."""
    scale, zero = _scales(N), np.full(N, 128)
    nodes = [
        node("DynamicQuantizeMatMul", ["x", "w", "s", "z", "b"], ["m"], domain=MICROSOFT),
        node("Gelu", ["m"], ["g"], domain=MICROSOFT),
        node("DynamicQuantizeLinear", ["g"], ["gq", "gs", "gz"]),
        node("MatMulIntegerToFloat", ["gq", "v", "gs", "vs", "gz", "vz", "c"], ["y"], domain=MICROSOFT),
    ]
    v = _codes(-127, 127, (N, 40))
    weights = {
        "w": _UINT8.astype(np.uint8), "s": scale, "z": zero.astype(np.uint8), "b": _x(N),
        "v": v.astype(np.int8), "vs": _scales(), "vz": np.array(0, np.int8), "c": _x(40),
    }  # fmt: skip
    proto = make_model(nodes, {"x": (2, 3, K)}, ["y"], weights)
    converted = workbench.convert(proto, weights=None)
    assert converted.op_types == ["SparseAMXMatMul"] * 2
    assert converted.node("m").epilogue == "gelu"
    _kept(converted, "m", _meaning(_UINT8, scale, 128), "int8")
    _kept(converted, "y", _meaning(v, weights["vs"]), "int8")
    assert converted.error({"x": _x(2, 3, K)}) <= DYNAMIC


def _static(sparse_ml: bool, make_model) -> onnx.ModelProto:
    """A product of codes whose activations have a scale of their own."""
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        node("MatMulInteger", ["xq", "w", "xz", "wz"], ["i"]),
        *([node("Add", ["i", "ib"], ["ib_out"])] if sparse_ml else []),
        node("Cast", ["ib_out" if sparse_ml else "i"], ["c"], to=TensorProto.FLOAT),
        node("Mul", ["c", "s"], ["m"]),
        node("Relu", ["m"], ["y"]),
    ]
    weights = {
        "w": _UINT8.astype(np.uint8), "wz": np.array(128, np.uint8), "s": _scales(),
        "xs": np.array(0.03, np.float32), "xz": np.array(117, np.uint8),
        "ib": np.random.default_rng(0).integers(-9000, 9000, N).astype(np.int32),
    }  # fmt: skip
    if not sparse_ml:
        del weights["ib"]
    return make_model(nodes, {"x": (3, K)}, ["y"], weights)


@pytest.mark.parametrize("sparse_ml", [False, True])
def test_static_activations_keep_their_scale_or_everything(workbench, make_model, sparse_ml) -> None:
    proto = _static(sparse_ml, make_model)
    for weights in (None, "int8", "int4"):
        converted = workbench.convert(proto, weights=weights, name=f"{weights}.onnx")
        assert [plan.reason for plan in converted.plan] == [Reason.STATIC_ACTIVATIONS]
        assert [n.op_type for n in proto.graph.node] == converted.op_types
    exact = workbench.convert(proto, weights="fp32", name="fp32.onnx")
    assert [t for t in exact.op_types if t != "Constant"] == ["QuantizeLinear", "DequantizeLinear", "SparseAMXMatMul"]
    plan = exact.node("i")
    assert (plan.bias, plan.epilogue, plan.nnz) == (sparse_ml, "relu", np.count_nonzero(_UINT8 - 128))
    assert exact.error({"x": _x(3, K)}) <= EXACT
    # Codes up to 255 are exact in bf16 too; only the weights are rounded.
    assert workbench.convert(proto, weights="bf16", name="bf16.onnx").error({"x": _x(3, K)}) <= 1e-2


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[dict[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("gemm", [False, True])
def test_statically_quantized(workbench, make_model, sparse, tmp_path, form, per_channel, gemm) -> None:
    if gemm:
        nodes = [
            node("Gemm", ["x", "w0", "b0"], ["g"], transB=1),
            node("Relu", ["g"], ["r"]),
            node("Gemm", ["r", "w1", "b1"], ["y"], transB=1),
        ]
        weights = {"w0": sparse((N, K)), "b0": _x(N), "w1": sparse((40, N)), "b1": _x(40)}
        path = tmp_path / "float.onnx"
        onnx.save(make_model(nodes, {"x": ("rows", K)}, ["y"], weights), path)
    else:
        path = _two_layers(make_model, sparse, tmp_path)
    quantized = tmp_path / "quantized.onnx"
    quantization.quantize_static(
        path, quantized, _Reader([{"x": _x(16, K, seed=s)} for s in range(4)]), per_channel=per_channel,
        quant_format=quantization.QuantFormat[form],
    )  # fmt: skip
    proto = onnx.load(quantized)
    products = [n for n in proto.graph.node if n.op_type in ("MatMul", "Gemm", "QLinearMatMul", "QGemm")]
    assert len(products) == 2
    left = workbench.convert(proto, weights=None)
    assert [plan.reason for plan in left.plan] == [Reason.STATIC_ACTIVATIONS] * 2
    assert left.error({"x": _x(5, K)}) == 0
    exact = workbench.convert(proto, weights="fp32", name="fp32.onnx")
    assert [plan.action for plan in exact.plan] == [Action.CONVERTED] * 2
    # A sum that lies between two codes of a result may be rounded to the other one; there are 255 of them.
    assert exact.error({"x": _x(5, K)}) <= 2 / 255
    assert exact.error({"x": _x(1, K)}) <= 2 / 255


# --- MatMulNBits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("k", [70, 256, 300])
def test_matmul_nbits(workbench, make_model, sparse, open_session, symmetric, block, k) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])]
    w = sparse((k, N))
    quantizer = MatMulNBitsQuantizer(
        make_model(nodes, {"x": ("rows", k)}, ["y"], {"w": w, "b": _x(N)}), block_size=block, is_symmetric=symmetric
    )
    quantizer.process()
    proto = quantizer.model.model
    (product,) = [n for n in proto.graph.node if n.op_type == "MatMulNBits"]
    exact = workbench.convert(proto, weights="fp32")
    assert exact.op_types == ["SparseAMXMatMul"]
    # ONNX Runtime computes the float32 product with dequantized weights.
    assert exact.error({"x": _x(3, k)}) <= EXACT
    kept = workbench.convert(proto, weights=None, name="kept.onnx")
    plan = kept.node(product.name)
    if symmetric:
        group = 256 if block >= k else block
        _kept(kept, product.name, packing.unpack(_blob(exact, plan.packed)), "int4", group)
        assert plan.bias
        assert kept.error({"x": _x(3, k)}) <= DYNAMIC
    elif plan.action is Action.LEFT_ALONE:
        # Zero points that are not in the middle of the codes: their range does not fit.
        assert plan.reason is Reason.QUANTIZED_WEIGHT
        assert kept.op_types == ["MatMulNBits", "Add"]


def test_matmul_nbits_of_8_bits(workbench, make_model) -> None:
    k, n = 64, 32
    for block, blocks in ((64, 1), (128, 1), (32, 2)):
        codes = _codes(0, 255, (n, blocks * block), 128)
        scales = _scales(n, blocks)
        attributes = {"K": k, "N": n, "bits": 8, "block_size": block}
        nodes = [node("MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, **attributes)]
        weights = {"w": codes.reshape(n, blocks, block).astype(np.uint8), "s": scales}
        proto = make_model(nodes, {"x": (3, k)}, ["y"], weights)
        meaning = _meaning(codes, np.repeat(scales, block, axis=1), 128)[:, :k].T
        kept = workbench.convert(proto, weights=None)
        if blocks == 1:
            _kept(kept, "y", meaning, "int8")
        else:
            assert kept.node("y").reason is Reason.QUANTIZED_WEIGHT
        exact = workbench.convert(proto, weights="fp32", name="fp32.onnx")
        np.testing.assert_array_equal(packing.unpack(_blob(exact, "w.sparamx")), meaning)
        assert exact.error({"x": _x(3, k)}) <= EXACT


@pytest.mark.parametrize("weights", ["fp32", None])
@pytest.mark.parametrize("spelling", ["MatMulNBits", "DequantizeLinear"])
def test_quantized_weights_of_halves(workbench, make_model, spelling, weights) -> None:
    k, n, block = 64, 32, 32
    codes, scales = _codes(0, 15, (n, k), 8), _scales(n, k // block).astype(np.float16)
    constants = {"s": scales, "b": _x(n).astype(np.float16)}
    if spelling == "MatMulNBits":
        attributes = {"K": k, "N": n, "bits": 4, "block_size": block}
        nodes = [node("MatMulNBits", ["x", "w", "s", "", "", "b"], ["y"], "product", domain=MICROSOFT, **attributes)]
        pairs = codes.astype(np.uint8).reshape(n, k // block, block // 2, 2)
        constants["w"] = pairs[..., 0] | pairs[..., 1] << 4
    else:
        nodes = [
            node("DequantizeLinear", ["w", "s"], ["d"], axis=1, block_size=block),
            node("Gemm", ["x", "d", "b"], ["y"], "product", transB=1),
        ]
        constants["w"] = (codes - 8).astype(np.int8).astype(ml_dtypes.int4)
    types = {"element_type": TensorProto.FLOAT16, "opset": 21}
    converted = workbench.convert(make_model(nodes, {"x": (3, k)}, ["y"], constants, **types), weights=weights)
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.node("product").weight_type == ("fp32" if weights else "int4")
    meaning = _meaning(codes, np.repeat(scales.astype(np.float32), block, axis=1), 8).T
    x = _x(3, k).astype(np.float16)
    wanted = x.astype(np.float32) @ meaning + constants["b"].astype(np.float32)
    (got,) = InferenceSession(converted.path).run(None, {"x": x})
    assert got.dtype == np.float16
    assert np.abs(got - wanted).max() <= (2e-3 if weights else DYNAMIC) * np.abs(wanted).max()


def test_malformed_matmul_nbits(workbench, make_model) -> None:
    good = {"K": 64, "N": 32, "bits": 4, "block_size": 32}
    weights = {"w": np.zeros((32, 2, 16), np.uint8), "s": _scales(64), "g": np.zeros(64, np.int32)}
    for change, inputs, reason in (
        ({"K": 0}, [], Reason.MALFORMED_NODE),
        ({"K": 65}, [], Reason.MALFORMED_NODE),
        ({"N": 31}, [], Reason.MALFORMED_NODE),
        ({"block_size": 0}, [], Reason.MALFORMED_NODE),
        ({"bits": 3}, [], Reason.QUANTIZED_WEIGHT),
        ({}, ["", "g"], Reason.QUANTIZED_WEIGHT),
        ({}, ["s"], Reason.PACKED_DENSE),  # zero points between the codes: no weight is zero
        ({}, ["g"], Reason.CONVERTED),
        ({}, ["w"], Reason.MALFORMED_NODE),
    ):
        nodes = [node("MatMulNBits", ["x", "w", "s", *inputs], ["y"], domain=MICROSOFT, **{**good, **change})]
        proto = make_model(nodes, {"x": (3, 64)}, ["y"], weights)
        assert workbench.convert(proto).node("y").reason is reason, (change, inputs)


# --- what is refused --------------------------------------------------------------------------------------------------

_DYNAMIC = (node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),)
_OPERATORS: dict[str, tuple[tuple[onnx.NodeProto, ...], list[str], dict[str, object]]] = {
    "MatMulNBits": ((), ["x", "p", "ps", "", "", "b"], {"K": 64, "N": 32, "bits": 4, "block_size": 32}),
    "DynamicQuantizeMatMul": ((), ["x", "w", "s", "z", "b"], {}),
    "MatMulIntegerToFloat": (_DYNAMIC, ["xq", "w", "xs", "s", "xz", "z", "b"], {}),
    "QLinearMatMul": (_DYNAMIC, ["xq", "xs", "xz", "w", "s", "z", "one", "zero"], {}),
    "QGemm": ((), ["c", "one", "zero", "w", "s", "z", "i"], {}),
}


def _operator(make_model, op_type: str, changes: dict[int, str], **attributes: object) -> onnx.ModelProto:
    """One operator whose inputs are good ones but for some, and what computes those that are computed."""
    before, inputs, usual = _OPERATORS[op_type]
    inputs = [changes.get(index, name) for index, name in enumerate(inputs)]
    weights = {
        "p": np.zeros((32, 2, 16), np.uint8), "ps": _scales(64), "w": _codes(-9, 9, (64, 32)).astype(np.int8),
        "s": _scales(32), "z": np.zeros(32, np.int8), "b": _x(32), "i": np.arange(32, dtype=np.int32),
        "one": np.array(1, np.float32), "zero": np.array(0, np.uint8), "double": np.ones(32), "three": _x(3),
        "doubles": np.ones(64), "rows": np.ones(3, np.float32), "stack": np.zeros((2, 64, 32), np.int8),
    }  # fmt: skip
    nodes = [
        *before,
        node("Add", ["ps", "ps"], ["computed"]),
        node("ReduceMax", ["x"], ["some"]),
        node("Neg", ["w"], ["negated"]),
        node(op_type, inputs, ["y"], domain="" if op_type == "QLinearMatMul" else MICROSOFT, **{**usual, **attributes}),
    ]
    codes = [helper.make_tensor_value_info("c", TensorProto.UINT8, (3, 64))]
    return make_model(nodes, {"x": (3, 64)}, ["y"], weights, extra_inputs=codes)


@pytest.mark.parametrize(
    ("op_type", "changes", "attributes", "reason", "words"),
    [
        ("MatMulNBits", {2: "computed"}, {}, Reason.QUANTIZED_WEIGHT, "scales are computed"),
        ("MatMulNBits", {2: "three"}, {}, Reason.MALFORMED_NODE, "scales have the shape [3]"),
        ("MatMulNBits", {2: "doubles"}, {}, Reason.QUANTIZED_WEIGHT, "scales are DOUBLE"),
        ("MatMulNBits", {3: "computed"}, {}, Reason.QUANTIZED_WEIGHT, "zero points are computed"),
        ("MatMulNBits", {5: "three"}, {}, Reason.UNSUPPORTED_BIAS, ""),
        ("MatMulNBits", {1: "negated"}, {}, Reason.WEIGHT_NOT_CONSTANT, "Neg"),
        ("DynamicQuantizeMatMul", {0: ""}, {}, Reason.MALFORMED_NODE, "input is missing"),
        ("DynamicQuantizeMatMul", {2: "computed"}, {}, Reason.QUANTIZED_WEIGHT, "scales are computed"),
        ("DynamicQuantizeMatMul", {3: "negated"}, {}, Reason.QUANTIZED_WEIGHT, "scales are computed"),
        ("DynamicQuantizeMatMul", {1: "b"}, {}, None, ""),
        ("DynamicQuantizeMatMul", {1: "ps"}, {}, None, ""),
        ("MatMulIntegerToFloat", {0: ""}, {}, Reason.MALFORMED_NODE, "input is missing"),
        ("MatMulIntegerToFloat", {3: "double"}, {}, Reason.QUANTIZED_WEIGHT, "scales are DOUBLE"),
        ("MatMulIntegerToFloat", {6: "three"}, {}, Reason.UNSUPPORTED_BIAS, ""),
        ("MatMulIntegerToFloat", {2: "rows"}, {}, Reason.UNSUPPORTED_ATTRIBUTES, "scale per row"),
        ("MatMulIntegerToFloat", {2: "some"}, {}, Reason.UNSUPPORTED_ATTRIBUTES, "scale per row"),
        ("MatMulIntegerToFloat", {1: "stack"}, {}, Reason.WEIGHT_NOT_2D, "[2, 64, 32]"),
        ("QLinearMatMul", {6: ""}, {}, Reason.MALFORMED_NODE, "input is missing"),
        ("QLinearMatMul", {1: "rows"}, {}, Reason.UNSUPPORTED_ATTRIBUTES, "scale per row"),
        ("QLinearMatMul", {6: "rows"}, {}, Reason.UNSUPPORTED_ATTRIBUTES, "scale per row"),
        ("QGemm", {4: "computed"}, {}, Reason.MALFORMED_NODE, "input is missing"),
        ("QGemm", {}, {"transA": 1}, Reason.UNSUPPORTED_ATTRIBUTES, "transA = 1"),
        ("QGemm", {5: "negated"}, {}, Reason.QUANTIZED_WEIGHT, "scales are computed"),
        ("QGemm", {1: "rows"}, {}, Reason.UNSUPPORTED_ATTRIBUTES, "scale per row"),
        ("QGemm", {6: "b"}, {}, Reason.UNSUPPORTED_BIAS, ""),
        ("QGemm", {6: "three"}, {}, Reason.UNSUPPORTED_BIAS, ""),
    ],
)
def test_refused_operators(workbench, make_model, op_type: str, changes, attributes, reason, words: str) -> None:
    converted = workbench.convert(_operator(make_model, op_type, changes, **attributes))
    plans = list(converted.plan)
    if reason is None:  # no matrix of codes, so no weight
        assert not plans
        return
    (plan,) = plans
    assert (plan.action, plan.reason) == (Action.LEFT_ALONE, reason)
    assert words in plan.detail
    assert op_type in converted.op_types


@pytest.mark.parametrize("op_type", _OPERATORS)
def test_the_same_operators_are_understood(workbench, make_model, op_type: str) -> None:
    (plan,) = workbench.convert(_operator(make_model, op_type, {})).plan
    assert plan.action is not Action.LEFT_ALONE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"factor": "rows_of_scales"}, None),
        ({"a": ""}, "not valid ONNX"),
        ({"w": "stack"}, "shape is"),
        ({"wz": "negated"}, "scales are computed"),
        ({"factor": "computed"}, "scales are computed"),
        ({"factor": "other_product"}, "scales are computed"),
        ({"xz": "row_zeros"}, "scale per row"),
        ({"added": "x_codes"}, "own bias"),
        ({"added": "i"}, None),
        ({"added": "i1"}, "own bias"),
        ({"added": "i", "a": "dynamic"}, "own bias"),
        ({"added": "i", "factor": "other_scale"}, "own bias"),
    ],
)
def test_refused_integer_products(workbench, make_model, change: dict[str, str], words: str | None) -> None:
    """MatMulInteger, perhaps an Add, Cast, Mul: exact where the activations' scale is that of the model."""
    has = {"a": "x_codes", "w": "w", "xz": "", "wz": "", "factor": "s", "added": "", **change}
    weights = {
        "w": _codes(-9, 9, (64, 32)).astype(np.int8), "stack": np.zeros((2, 64, 32), np.int8), "s": _scales(32),
        "rows_of_scales": _scales(1, 32), "row_zeros": np.zeros(3, np.uint8), "i": np.arange(32, dtype=np.int32),
        "i1": np.ones(1, np.int32),
    }  # fmt: skip
    dynamic = has["a"] == "dynamic"
    codes = ["xq", has["w"], "xz"] if dynamic else [has["a"], has["w"], has["xz"], has["wz"]]
    factor = "dynamic_scale" if dynamic else has["factor"]
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("Mul", ["xs", "s"], ["dynamic_scale"]),
        node("Mul", ["one_scale", "s"], ["other_scale"]),
        node("Mul", ["xs", "one_scale"], ["other_product"]),
        node("Add", ["s", "s"], ["computed"]),
        node("Neg", ["w"], ["negated"]),
        node("MatMulInteger", codes, ["product"]),
        *([node("Add", ["product", has["added"]], ["sum"])] if has["added"] else []),
        node("Cast", ["sum" if has["added"] else "product"], ["floats"], to=TensorProto.FLOAT),
        node("Mul", ["floats", factor], ["y"]),
    ]
    extra = [
        helper.make_tensor_value_info("x_codes", TensorProto.UINT8, (3, 64)),
        helper.make_tensor_value_info("one_scale", TensorProto.FLOAT, ()),
    ]
    proto = make_model(nodes, {"x": (3, 64)}, ["y"], weights, extra_inputs=extra)
    converted = workbench.convert(proto)
    (plan,) = converted.plan
    assert (plan.action is Action.LEFT_ALONE) == (words is not None), plan.text
    if words is not None:
        assert words in plan.text
        return
    feeds = {"x": _x(3, 64), "x_codes": np.arange(192, dtype=np.uint8).reshape(3, 64), "one_scale": np.float32(0.1)}
    assert converted.error({name: np.asarray(array) for name, array in feeds.items()}) <= EXACT


# --- what is written down ---------------------------------------------------------------------------------------------


def test_the_types_that_were_kept_are_recorded(workbench, make_model, sparse) -> None:
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        node("MatMul", ["x", "w"], ["m"]),
        node("MatMul", ["m", "v"], ["y"]),
    ]
    weights = {"q": _INT8.astype(np.int8), "s": _scales(N), "v": sparse((N, 40))}
    proto = make_model(nodes, {"x": (3, K)}, ["y"], weights)
    converted = workbench.convert(proto, weights=None)
    assert [plan.weight_type for plan in converted.plan] == ["int8", "bf16"]
    record = {p.key: p.value for p in converted.proto.metadata_props}
    options = json.loads(record[pipeline.OPTIONS_KEY])
    assert (options["weights"], options["kept"]) == ("bf16", ["int8"])
    # The plan in advance is what happens.
    planned = pipeline.run(ir.from_proto(proto), ConvertOptions())
    assert planned.to_json()["nodes"] == converted.plan.to_json()["nodes"]


def test_pruning_keeps_the_codes_of_the_weights_that_stay(workbench, make_model) -> None:
    k, n = 128, 96
    codes, scale = _codes(-127, 127, (k, n)), _scales(n)
    proto = _dequantizing(make_model, codes, np.int8, scale, None, axis=1)
    converted = workbench.convert(proto, weights=None, method="magnitude", sparsity=0.8)
    kept = packing.unpack(_blob(converted, "q.sparamx"))
    assert np.count_nonzero(kept) == k * n - round(0.8 * k * n)
    np.testing.assert_array_equal(kept[kept != 0], _meaning(codes, scale)[kept != 0])
