"""The ONNX standard's own tests of Attention, converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase as NodeTest

import sparamx_onnx
from sparamx_onnx.graph_passes.attention_plan import AttentionReason
from sparamx_onnx.graph_passes.plan import Action

TOLERANCE = 1e-5

# The expanded ones are the same without the operator.
TESTS = [
    test
    for test in collect_testcases(None)
    if [node.op_type for node in test.model.graph.node] == ["Attention"] and not test.name.endswith("_expanded")
]

# Whether a test is claimed is told by its model alone, so that newer versions of the standard need no list.
FLOAT32 = onnx.TensorProto.FLOAT


def _reason(test: NodeTest) -> AttentionReason | None:
    """Why it must stay; None where it must be converted."""
    (node,) = test.model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if len(node.output) > 3 and node.output[3]:
        return AttentionReason.UNSUPPORTED_OUTPUT
    if test.model.graph.input[0].type.tensor_type.elem_type != FLOAT32:
        return AttentionReason.UNSUPPORTED_DTYPE
    windows = [attributes.get(name, -1) for name in ("left_window_size", "right_window_size")]
    if max(windows) >= 0 and not attributes.get("is_causal", 0):
        return AttentionReason.UNSUPPORTED_ATTRIBUTES
    return None


def test_most_of_them_are_claimed() -> None:
    claimed = [test for test in TESTS if _reason(test) is None]
    assert len(claimed) >= 50
    assert {len(test.model.graph.input[0].type.tensor_type.shape.dim) for test in claimed} == {3, 4}


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_it_passes_after_conversion(test: NodeTest, tmp_path: Path) -> None:
    onnx.save(test.model, tmp_path / "m.onnx")
    result = sparamx_onnx.convert(tmp_path / "m.onnx", tmp_path / "c.onnx", attention="fast")
    (plan,) = result.plan.attention
    reason = _reason(test)
    if reason is not None:
        assert (plan.action, plan.reason) == (Action.LEFT_ALONE, reason)
        return
    assert plan.action is Action.CONVERTED, plan.text
    inputs, expected = test.data_sets[0]
    names = [value.name for value in test.model.graph.input]
    outputs = sparamx_onnx.InferenceSession(tmp_path / "c.onnx").run(None, dict(zip(names, inputs, strict=True)))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert actual.shape == wanted.shape
        np.testing.assert_allclose(actual, wanted, rtol=TOLERANCE, atol=TOLERANCE * np.abs(wanted).max(initial=0))
