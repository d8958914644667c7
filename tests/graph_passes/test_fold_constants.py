"""Constants are recognized through Identity, Transpose and Cast, without reading or copying them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sparamx_onnx.graph_passes import mapped
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder, Converted, FoldedConstant, NotConstant, Transposed
from sparamx_onnx.graph_passes.mapped import external_range, read_tensor
from sparamx_onnx.graph_passes.plan import Reason
from sparamx_onnx.ops.errors import SparamxError

node = helper.make_node


def _fold(model: ir.Model, name: str) -> FoldedConstant | NotConstant:
    values = {v.name: v for n in model.graph for v in n.outputs} | dict(model.graph.initializers)
    return ConstantFolder(model).fold(values[name])


@pytest.fixture
def chained(make_model) -> ir.Model:
    nodes = [
        node("Transpose", ["c"], ["t"], perm=[2, 0, 1]),
        node("Identity", ["t"], ["i"]),
        node("Transpose", ["i"], ["back"], perm=[1, 2, 0]),
        node("Cast", ["i"], ["half"], to=TensorProto.FLOAT16),
        node("Transpose", ["half"], ["reversed"]),
        node("Cast", ["reversed"], ["wide"], to=TensorProto.FLOAT),
        node("Cast", ["c"], ["integer"], to=TensorProto.INT32),
        node("Add", ["c", "c"], ["sum"]),
    ]
    c = np.arange(24, dtype=np.float32).reshape(2, 3, 4) + np.float32(1 / 3)
    return ir.from_proto(make_model(nodes, {"x": (1,)}, ["wide"], {"c": c}))


def test_views(chained) -> None:
    c = chained.graph.initializers["c"].const_value.numpy()
    folded = _fold(chained, "i")
    assert (folded.name, folded.shape, folded.dtype) == ("c", (4, 2, 3), ir.DataType.FLOAT)
    assert folded.steps == (Transposed((2, 0, 1)),)
    np.testing.assert_array_equal(folded.numpy(), c.transpose(2, 0, 1))
    back = _fold(chained, "back")
    assert back.steps == ()
    assert back == _fold(chained, "c")


def test_conversions(chained) -> None:
    c = chained.graph.initializers["c"].const_value.numpy()
    wide = _fold(chained, "wide")
    assert wide.steps == (Converted(ir.DataType.FLOAT16), Converted(ir.DataType.FLOAT), Transposed((1, 0, 2)))
    assert wide.shape == (3, 2, 4)
    assert wide.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(wide.numpy().astype(np.float32), c.astype(np.float16).transpose(1, 0, 2))
    assert isinstance(_fold(chained, "integer"), NotConstant)
    refused = _fold(chained, "sum")
    assert isinstance(refused, NotConstant)
    assert (refused.reason, "Add node 'sum'" in refused.detail) == (Reason.WEIGHT_NOT_CONSTANT, True)


def test_transposed_twice_is_the_same(chained) -> None:
    folded = _fold(chained, "c")
    assert folded.transposed().shape == (4, 3, 2)
    assert folded.transposed().transposed() == folded


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value": onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32))}, np.eye(2)),
        ({"value_float": 0.5}, 0.5),
        ({"value_floats": [1.0, 2.0]}, [1, 2]),
        ({"value_int": 3}, 3),
        ({"value_ints": [3, 4]}, [3, 4]),
    ],
    ids=["value", "value_float", "value_floats", "value_int", "value_ints"],
)
def test_constant_nodes(make_model, attributes, expected) -> None:
    model = ir.from_proto(make_model([node("Constant", [], ["c"], **attributes)], {"x": (1,)}, ["c"], {}))
    np.testing.assert_array_equal(_fold(model, "c").numpy(), expected)


def test_constant_nodes_that_hold_no_numbers(make_model) -> None:
    model = ir.from_proto(make_model([node("Constant", [], ["c"], value_string="text")], {"x": (1,)}, ["c"], {}))
    assert _fold(model, "c").reason is Reason.WEIGHT_NOT_CONSTANT


def test_random_numbers_are_no_constants(make_model) -> None:
    nodes = [node("RandomNormal", [], ["r"], shape=[2, 2]), node("Neg", ["r"], ["n"])]
    model = ir.from_proto(make_model(nodes, {"x": (1,)}, ["n"], {}))
    assert _fold(model, "n").reason is Reason.TWO_ACTIVATIONS


def test_external_tensors_are_mapped_in_place(workbench, make_model) -> None:
    rng = np.random.default_rng(0)
    dtypes = (np.float32, np.float16, np.int64)
    values = {f"t{i}": rng.standard_normal((i + 3, 5), np.float32).astype(dtype) for i, dtype in enumerate(dtypes)}
    path = workbench.save_external(make_model([], {"x": (1,)}, [], values))
    model = ir.load(path)
    for name, array in values.items():
        tensor = model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        mapped = read_tensor(tensor)
        np.testing.assert_array_equal(mapped, array)
        assert mapped.dtype == array.dtype
        assert not mapped.flags.writeable
        assert not mapped.flags.owndata
        turned = _fold(model, name).transposed().numpy()
        np.testing.assert_array_equal(turned, array.T)
        assert not turned.flags.owndata
        # Nothing is cached in the tensor, so the file is unmapped with the last array.
        assert tensor.raw is None


def test_external_tensors_of_half_bytes(workbench, make_model) -> None:
    values = np.arange(-7, 8).reshape(3, 5).astype(ml_dtypes.int4)
    path = workbench.save_external(make_model([], {"x": (1,)}, [], {"t": values}, opset=21))
    np.testing.assert_array_equal(read_tensor(ir.load(path).graph.initializers["t"].const_value), values)


def test_empty_external_tensor(workbench) -> None:
    (workbench.folder / "data").write_bytes(b"")
    tensor = ir.ExternalTensor(
        "data", 0, 0, ir.DataType.FLOAT, shape=ir.Shape([0, 3]), name="t", base_dir=workbench.folder
    )
    assert read_tensor(tensor).shape == (0, 3)


@pytest.mark.parametrize(
    ("offset", "length", "sentence"),
    [
        (0, 64, r"needs 64 bytes at offset 0 of .*data, which has 60 bytes"),
        (4, None, "needs 64 bytes at offset 4"),
        (0, 8, "needs 64 bytes"),
    ],
)
def test_external_data_that_is_too_short(workbench, offset, length, sentence) -> None:
    (workbench.folder / "data").write_bytes(bytes(60))
    shape = ir.Shape([4, 4])
    tensor = ir.ExternalTensor(
        "data", offset, length, ir.DataType.FLOAT, shape=shape, name="t", base_dir=workbench.folder
    )
    for function in (read_tensor, external_range):
        with pytest.raises(SparamxError, match=sentence):
            function(tensor)


@pytest.mark.parametrize(("dtype", "left"), [("FLOAT", 60), ("FLOAT", 0), ("INT4", 4), ("INT4", 0)])
def test_external_data_that_is_cut_after_the_check(workbench, monkeypatch, dtype: str, left: int) -> None:
    data = workbench.folder / "data"
    data.write_bytes(bytes(64))
    tensor = ir.ExternalTensor(
        "data", 0, None, ir.DataType[dtype], shape=ir.Shape([4, 4]), name="t", base_dir=workbench.folder
    )

    def checked_then_cut(tensor: ir.ExternalTensor) -> tuple[Path, int, int]:
        found = external_range(tensor)
        data.write_bytes(bytes(left))
        return found

    monkeypatch.setattr(mapped, "external_range", checked_then_cut)
    with pytest.raises(SparamxError, match=r"The external data of 't' cannot be read from .*data: .*\.$"):
        read_tensor(tensor)


def test_external_data_that_is_missing(workbench) -> None:
    tensor = ir.ExternalTensor(
        "none", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="t", base_dir=workbench.folder
    )
    with pytest.raises(SparamxError, match=r"external data of 't' cannot be read from .*none: No such file"):
        read_tensor(tensor)


def test_a_tensor_that_contradicts_itself(make_model) -> None:
    model = make_model([node("MatMul", ["x", "w"], ["y"])], {"x": (2, 4)}, ["y"], {"w": np.ones((4, 4), np.float32)})
    model.graph.initializer[0].raw_data = bytes(60)
    with pytest.raises(SparamxError, match="The tensor 'w' does not hold what its type and shape say"):
        read_tensor(ir.from_proto(model).graph.initializers["w"].const_value)
