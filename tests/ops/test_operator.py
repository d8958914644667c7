"""SparseAMXMatMul in an ONNX Runtime session, against the reference: attributes, ranks, types and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.ops import library, packing, reference
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_MATMUL, Epilogue
from sparamx_onnx.ops.packing import PackOptions, WeightType

TOLERANCE = 2e-5


def _session(
    blob: np.ndarray,
    k: int,
    n: int,
    bias: np.ndarray | None = None,
    rank: int = 2,
    outputs: Sequence[str] = ("y",),
    element_type: int = TensorProto.FLOAT,
    **attributes: str | Sequence[int],
) -> onnxruntime.InferenceSession:
    inputs = ["x", "w"] + ["b"] * (bias is not None)
    node = helper.make_node(SPARSE_AMX_MATMUL.name, inputs, outputs, domain=DOMAIN, K=k, N=n, **attributes)
    initializers = {"w": blob} if bias is None else {"w": blob, "b": bias}
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", element_type, [f"d{i}" for i in range(rank - 1)] + [k])],
        [helper.make_tensor_value_info(name, element_type, None) for name in outputs if name],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    library.register(options)
    return onnxruntime.InferenceSession(
        helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max(initial=0.0) / max(1.0, np.abs(expected).max(initial=0.0)))


def _expected(case, blob: np.ndarray, epilogue: str, activations: str) -> np.ndarray:
    info = packing.describe(blob)
    w = reference.unpack_blob(blob.tobytes())
    _, path = packing.matmul(blob, case.x)
    if info.weight_type is WeightType.INT4 and path == "amx" and len(case.x) > 23:  # docs/numerics.md
        activations, w = "bf16", reference.round_to_bf16(w)
    return reference.sparse_amx_matmul(case.x, w, case.bias, epilogue, activations, info.group_size)


@pytest.mark.parametrize("weight_type", list(WeightType))
def test_random_shapes(cases, weight_type: WeightType) -> None:
    epilogues = [epilogue.value for epilogue in Epilogue]
    activations = {WeightType.FP32: "fp32", WeightType.BF16: "bf16"}.get(weight_type, "int8")
    for index, case in enumerate(cases(400, 15)):
        blob = packing.pack(case.w, PackOptions(weight_type))
        epilogue = epilogues[index % len(epilogues)]
        named = {"activations": activations} if index % 2 else {}  # auto is the same
        y = _session(blob, *case.w.shape, case.bias, epilogue=epilogue, **named).run(None, {"x": case.x})[0]
        assert _error(y, _expected(case, blob, epilogue, activations)) <= TOLERANCE, str(case)


@pytest.mark.parametrize("activations", ["auto", "fp32", "bf16"])
def test_precision_of_activations(weight, activations: str) -> None:
    rng = np.random.default_rng(0)
    w = weight(rng, 300, 40, 0.5, holes=False)
    x = rng.standard_normal((5, 300), np.float32)
    blob = packing.pack(w, PackOptions())
    y = _session(blob, 300, 40, activations=activations).run(None, {"x": x})[0]
    stored = reference.unpack_blob(blob.tobytes())
    errors = {p: _error(y, reference.sparse_amx_matmul(x, stored, activations=p)) for p in ("fp32", "bf16")}
    right, wrong = ("fp32", "bf16") if activations == "fp32" else ("bf16", "fp32")
    assert errors[right] <= TOLERANCE
    assert errors[wrong] > 1e-4


@pytest.mark.parametrize(
    ("weight_type", "activations"),
    [
        (WeightType.FP32, "bf16"),
        (WeightType.FP32, "int8"),
        (WeightType.BF16, "int8"),
        (WeightType.INT8, "fp32"),
        (WeightType.INT8, "bf16"),
        (WeightType.INT4, "fp32"),
        (WeightType.INT4, "bf16"),
    ],
)
def test_precisions_that_do_not_go_with_the_weights(weight, weight_type: WeightType, activations: str) -> None:
    blob = packing.pack(weight(np.random.default_rng(4), 64, 48, 0.5, holes=False), PackOptions(weight_type))
    with pytest.raises(Exception, match="its weight type does not go with these activations"):
        _session(blob, 64, 48, activations=activations)


@pytest.mark.parametrize("shape", [(70,), (3, 70), (2, 3, 70), (2, 1, 3, 70), (0, 70), (2, 0, 70)])
def test_ranks(weight, shape: tuple[int, ...]) -> None:
    w = weight(np.random.default_rng(1), 70, 33, 0.4, holes=True)
    x = np.random.default_rng(2).standard_normal(shape, np.float32)
    blob = packing.pack(w, PackOptions(WeightType.FP32))
    y = _session(blob, 70, 33, rank=len(shape)).run(None, {"x": x})[0]
    assert _error(y, reference.sparse_amx_matmul(x, w)) <= TOLERANCE


def test_attributes_that_contradict_the_weight(weight) -> None:
    blob = packing.pack(weight(np.random.default_rng(3), 64, 48, 0.5, holes=False), PackOptions())
    for k, n in ((63, 48), (64, 47)):
        with pytest.raises(Exception, match=f"64 x 48.*K = {k}, N = {n}"):
            _session(blob, k, n)
    for name in ("epilogue", "activations"):
        with pytest.raises(Exception, match="'sine'"):
            _session(blob, 64, 48, **{name: "sine"})


@pytest.mark.parametrize("weight_type", list(WeightType))
@pytest.mark.parametrize("shape", [(70,), (3, 70), (2, 20, 70), (0, 70)])
def test_several_outputs(weight, weight_type: WeightType, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    splits, epilogues = [48, 16, 33], ["silu", "none", "gelu"]
    w = weight(rng, 70, sum(splits), 0.5, holes=True)
    bias, x = rng.standard_normal(sum(splits), np.float32), rng.standard_normal(shape, np.float32)
    blob = packing.pack(w, PackOptions(weight_type))
    names = ["y0", "y1", "y2"]
    session = _session(blob, *w.shape, bias, len(shape), names, splits=splits, epilogue=",".join(epilogues))
    leading = [f"d{i}" for i in range(len(shape) - 1)]
    assert [output.shape for output in session.get_outputs()] == [[*leading, columns] for columns in splits]
    outputs = session.run(None, {"x": x})
    column = 0
    for y, columns, epilogue in zip(outputs, splits, epilogues, strict=True):
        (whole,) = _session(blob, *w.shape, bias, len(shape), epilogue=epilogue).run(None, {"x": x})
        assert y.tobytes() == whole[..., column : column + columns].tobytes()
        column += columns
    # One epilogue serves all outputs.
    outputs = _session(blob, *w.shape, bias, len(shape), names, splits=splits, epilogue="relu").run(None, {"x": x})
    (whole,) = _session(blob, *w.shape, bias, len(shape), epilogue="relu").run(None, {"x": x})
    assert np.concatenate(outputs, axis=-1).tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("outputs", "attributes", "complaint"),
    [
        (["a", "b"], {"splits": [24, 24]}, "split 24 is not a multiple of 16"),
        (["a", "b"], {"splits": [16, 16]}, "fewer than N columns"),
        (["a", "b"], {"splits": [16, 48]}, "more than N columns"),
        (["a", "b"], {"splits": [48, 0]}, "split 0 is not positive"),
        (["a", "b"], {"splits": [64, -16]}, "split -16 is not positive"),
        (["a", "b"], {}, "2 outputs, but its attribute splits is for 1"),
        pytest.param(
            ["a"],
            {"splits": [32, 16]},
            "1 outputs, but its attribute splits is for 2",
            marks=pytest.mark.skipif(
                onnxruntime.__version__.startswith("1.21."), reason="onnxruntime 1.21 itself ends the process at that"
            ),
        ),
        (["a", "", "c"], {"splits": [16, 16, 16]}, "its output 1 has no name"),
        (["a", "b"], {"splits": [32, 16], "epilogue": "relu,none,none"}, "3 epilogues for 2 outputs"),
        (["a", "b"], {"splits": [32, 16], "epilogue": "relu,"}, "unknown epilogue ''"),
    ],
)
def test_outputs_that_do_not_fit(weight, outputs: list[str], attributes: dict, complaint: str) -> None:
    blob = packing.pack(weight(np.random.default_rng(6), 64, 48, 0.5, holes=False), PackOptions())
    with pytest.raises(Exception, match=f"SparseAMXMatMul node.*{complaint}"):
        _session(blob, 64, 48, outputs=outputs, **attributes)


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        ({"epilogue": ["relu"]}, "epilogue"),
        ({"epilogue": 1}, "epilogue"),
        ({"activations": 8}, "activations"),
    ],
)
def test_attributes_of_another_type_are_refused(weight, attributes: dict, complaint: str) -> None:
    w = weight(np.random.default_rng(0), 32, 16, 0.5, holes=False)
    with pytest.raises(Exception, match=f"node '': its attribute {complaint} is not of the type that it must be"):
        _session(packing.pack(w, PackOptions()), 32, 16, **attributes)


def test_lengths_without_a_name_stay_unknown(weight) -> None:
    """A length of -1 would be taken for the -1 of the Reshape, which may stand there only once."""
    w = weight(np.random.default_rng(3), 64, 48, 0.5, holes=False)
    nodes = [
        helper.make_node(SPARSE_AMX_MATMUL.name, ["x", "w"], ["y"], domain=DOMAIN, K=64, N=48),
        helper.make_node("Shape", ["y"], ["rows"], start=0, end=2),
        helper.make_node("Concat", ["rows", "heads"], ["shape"], axis=0),
        helper.make_node("Reshape", ["y", "shape"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, 64])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(packing.pack(w, PackOptions(WeightType.FP32)), "w"),
            numpy_helper.from_array(np.array([-1, 16]), "heads"),
        ],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    options = onnxruntime.SessionOptions()
    library.register(options)
    model = helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.ones((2, 5, 64), np.float32)
    z = session.run(None, {"x": x})[0]
    assert z.shape == (2, 5, 3, 16)
    assert _error(z.reshape(2, 5, 48), (x @ w)) <= TOLERANCE


def _half_session(
    blob: np.ndarray, w: np.ndarray, bias: np.ndarray | None, **attributes
) -> onnxruntime.InferenceSession:
    return _session(blob, *w.shape, bias, element_type=TensorProto.FLOAT16, **attributes)


@pytest.mark.parametrize("weight_type", list(WeightType))
def test_halves(cases, weight_type: WeightType) -> None:
    """float16 in and out: the same products, with one rounding at the end."""
    activations = {WeightType.FP32: "fp32", WeightType.BF16: "bf16"}.get(weight_type, "int8")
    for index, case in enumerate(cases(500, 8)):
        x = case.x.astype(np.float16)
        bias = None if case.bias is None else case.bias.astype(np.float16)
        case = dataclasses.replace(case, x=x.astype(np.float32), bias=None if bias is None else bias.astype(np.float32))
        blob = packing.pack(case.w, PackOptions(weight_type))
        epilogue = list(Epilogue)[index % len(Epilogue)].value
        y = _half_session(blob, case.w, bias, epilogue=epilogue).run(None, {"x": x})[0]
        assert y.dtype == np.float16
        expected = _expected(case, blob, epilogue, activations)
        # Half a unit of the last place, and where sums are not exact, what comes before the rounding.
        tolerance = 2**-11 * np.abs(expected) + 2**-25 + TOLERANCE * max(1.0, np.abs(expected).max())
        assert (np.abs(y.astype(np.float32) - expected) <= tolerance).all(), str(case)
        # It is the float32 operator's result, rounded.
        floats = _session(blob, *case.w.shape, case.bias, epilogue=epilogue).run(None, {"x": case.x})[0]
        assert y.tobytes() == floats.astype(np.float16).tobytes()


def test_halves_overflow_and_denormals() -> None:
    w = np.array([[1.0, 60000.0, 2.0**-10, -60000.0]], np.float32)
    blob = packing.pack(w, PackOptions(WeightType.FP32))
    session = _half_session(blob, w, None)
    x = np.array([[1.0], [2.0], [2.0**-14], [np.inf], [np.nan], [2.0**-24], [-0.0]], np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (x.astype(np.float32) @ w).astype(np.float16)
    y = session.run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, expected)
    assert np.isposinf(y[1, 1])
    assert np.isneginf(y[1, 3])
    assert y[2, 2] == 2.0**-24
    assert np.isnan(y[4]).all()


def test_types_that_are_mixed(weight) -> None:
    blob = packing.pack(weight(np.random.default_rng(8), 64, 48, 0.5, holes=False), PackOptions())
    with pytest.raises(Exception, match=r"(?i)type"):
        _session(blob, 64, 48, np.zeros(48, np.float16))


def _open_session(k: int, n: int) -> onnxruntime.InferenceSession:
    """Weights and bias come with every call, and no shape is known."""
    node = helper.make_node(SPARSE_AMX_MATMUL.name, ["x", "w", "b"], ["y"], "node", domain=DOMAIN, K=k, N=n)
    types = {"x": TensorProto.FLOAT, "w": TensorProto.UINT8, "b": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(name, element_type, None) for name, element_type in types.items()]
    graph = helper.make_graph([node], "graph", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    library.register(options)
    model = helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_weights_that_change_from_call_to_call(weight) -> None:
    rng = np.random.default_rng(6)
    session = _open_session(70, 33)
    for weight_type in WeightType:
        w = weight(rng, 70, 33, 0.5, holes=True)
        x, b = rng.standard_normal((3, 70), np.float32), rng.standard_normal(33, np.float32)
        blob = packing.pack(w, PackOptions(weight_type))
        constant = _session(blob, 70, 33, b).run(None, {"x": x})[0]
        assert np.array_equal(session.run(None, {"x": x, "w": blob, "b": b})[0], constant)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((3, 71), np.float32)}, r"X has the shape \[3, 71\], but its last dimension must be K = 70"),
        ({"x": np.array(1, np.float32)}, r"X has the shape \[\], but its last dimension must be K = 70"),
        ({"b": np.zeros(34, np.float32)}, r"B has the shape \[34\], but it must be \[N\] = \[33\]"),
        ({"b": np.zeros((1, 33), np.float32)}, r"B has the shape \[1, 33\], but it must be \[N\] = \[33\]"),
        ({"w": np.zeros(5, np.uint8)}, "its packed weight is damaged: it is shorter than a header"),
    ],
)
def test_inputs_that_do_not_fit(weight, change: dict[str, np.ndarray], message: str) -> None:
    blob = packing.pack(weight(np.random.default_rng(7), 70, 33, 0.5, holes=False), PackOptions())
    inputs = {"x": np.zeros((3, 70), np.float32), "w": blob, "b": np.zeros(33, np.float32)}
    with pytest.raises(Exception, match=f"SparseAMXMatMul node 'node': {message}"):
        _open_session(70, 33).run(None, inputs | change)
