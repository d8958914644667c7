"""The ONNX standard's own tests of its matrix products, with their weights made constant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase as NodeTest

import sparamx_onnx
from sparamx_onnx.graph_passes.plan import Reason

# The inputs that become constants: the weight, and what belongs to it.
CONSTANTS = {
    "MatMul": (1,),
    "Gemm": (1, 2),
    "Einsum": (1,),
    "MatMulInteger": (1, 3),
    "QLinearMatMul": (1, 2, 3, 4, 5, 6, 7),
}
TOLERANCE = 1e-5


# Where no constant is a float32 matrix on the right of float32 activations, or the rest is not a linear layer's.
LEFT_ALONE = {
    "test_einsum_batch_matmul": Reason.UNSUPPORTED_DTYPE,
    "test_einsum_batch_matmul_bfloat16": Reason.UNSUPPORTED_DTYPE,
    "test_gemm_all_attributes": Reason.UNSUPPORTED_ATTRIBUTES,
    "test_gemm_transposeA": Reason.UNSUPPORTED_ATTRIBUTES,
    "test_matmul_1d_1d": Reason.WEIGHT_NOT_2D,
    "test_matmul_1d_3d": Reason.WEIGHT_NOT_2D,
    "test_matmul_3d": Reason.WEIGHT_NOT_2D,
    "test_matmul_4d": Reason.WEIGHT_NOT_2D,
    "test_matmul_4d_1d": Reason.WEIGHT_NOT_2D,
    "test_matmul_bcast": Reason.WEIGHT_NOT_2D,
    "test_matmulinteger": Reason.QUANTIZED_WEIGHT,
    "test_qlinearmatmul_2D_int8_float16": Reason.UNSUPPORTED_DTYPE,
    "test_qlinearmatmul_2D_uint8_float16": Reason.UNSUPPORTED_DTYPE,
    "test_qlinearmatmul_3D_int8_float16": Reason.WEIGHT_NOT_2D,
    "test_qlinearmatmul_3D_int8_float32": Reason.WEIGHT_NOT_2D,
    "test_qlinearmatmul_3D_uint8_float16": Reason.WEIGHT_NOT_2D,
    "test_qlinearmatmul_3D_uint8_float32": Reason.WEIGHT_NOT_2D,
}


def _is_about_a_weight(test: NodeTest) -> bool:
    """Whether the model is one matrix product; an Einsum of one operand, or of two vectors, is none."""
    nodes = test.model.graph.node
    return (
        len(nodes) == 1
        and nodes[0].op_type in CONSTANTS
        and len(nodes[0].input) > CONSTANTS[nodes[0].op_type][0]
        and test.name != "test_einsum_inner_prod"
    )


TESTS = [test for test in collect_testcases(None) if _is_about_a_weight(test)]


def _with_constant_weight(test: NodeTest) -> tuple[onnx.ModelProto, dict[str, np.ndarray], Sequence[np.ndarray]]:
    """The model with constants, the inputs that are left, and the outputs that the standard expects."""
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    inputs, outputs = test.data_sets[0]
    arrays = dict(zip([value.name for value in model.graph.input], inputs, strict=True))
    (node,) = model.graph.node
    for index in CONSTANTS[node.op_type]:
        name = node.input[index] if index < len(node.input) else ""
        if name:
            model.graph.initializer.append(numpy_helper.from_array(arrays.pop(name), name))
    kept = [value for value in model.graph.input if value.name in arrays]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model, arrays, outputs


def test_there_are_tests_of_every_operator() -> None:
    assert {test.model.graph.node[0].op_type for test in TESTS} == set(CONSTANTS)


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_it_passes_after_conversion(test: NodeTest, tmp_path: Path) -> None:
    model, inputs, expected = _with_constant_weight(test)
    onnx.save(model, tmp_path / "m.onnx")
    result = sparamx_onnx.convert(tmp_path / "m.onnx", tmp_path / "c.onnx", weights="fp32", method="keep")
    (plan,) = result.plan
    if test.name in LEFT_ALONE:
        assert plan.reason is LEFT_ALONE[test.name]
        return
    assert result.written, plan.text
    outputs = sparamx_onnx.InferenceSession(tmp_path / "c.onnx").run(None, inputs)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert actual.shape == wanted.shape
        np.testing.assert_allclose(actual, wanted, rtol=TOLERANCE, atol=TOLERANCE * np.abs(wanted).max(initial=0))
