"""Packed layers beside ONNX Runtime's own int8 products, which use AMX too and share the threads.

Nobody may disturb the other's tile configuration.
"""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparamx_onnx.ops import library, packing, reference
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_MATMUL
from sparamx_onnx.ops.packing import PackOptions, WeightType

K, N = 256, 160
RUNS = 10000 if os.environ.get("SPARAMX_TEST_FULL") else 1000
TYPES = (WeightType.INT8, WeightType.BF16, WeightType.INT4)


def _model(blobs: list[np.ndarray], dense: np.ndarray) -> ModelProto:
    """x [M, K] into a packed layer, an integer product of ONNX Runtime (u8 x s8), a packed layer, and so on."""
    nodes, initializers = [], [numpy_helper.from_array(dense, "dense")]
    for index, blob in enumerate(blobs):
        initializers.append(numpy_helper.from_array(blob, f"w{index}"))
        attributes = {"domain": DOMAIN, "K": K, "N": N}
        nodes += [
            helper.make_node(SPARSE_AMX_MATMUL.name, ["x", f"w{index}"], [f"packed{index}"], **attributes),
            helper.make_node("MatMulInteger", ["codes", "dense"], [f"integer{index}"]),
        ]
    outputs = [
        helper.make_tensor_value_info(f"{kind}{index}", element, None)
        for index in range(len(blobs))
        for kind, element in (("packed", TensorProto.FLOAT), ("integer", TensorProto.INT32))
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", K]),
        helper.make_tensor_value_info("codes", TensorProto.UINT8, ["m", K]),
    ]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, ir_version=10, opset_imports=imports)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_thousand_runs_beside_integer_products_of_onnxruntime(threads: int) -> None:
    rng = np.random.default_rng(11)
    blobs = [
        packing.pack(rng.standard_normal((K, N), np.float32) * (rng.random((K, N)) < 0.5), PackOptions(weight_type))
        for weight_type in TYPES
    ]
    dense = rng.integers(-128, 128, (K, N)).astype(np.int8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    library.register(options)
    session = onnxruntime.InferenceSession(
        _model(blobs, dense).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds, expected = [], []
    for rows in (1, 5, 16, 33, 40):  # each changes the shape of the tiles
        x = rng.standard_normal((rows, K), np.float32)
        codes = rng.integers(0, 256, (rows, K)).astype(np.uint8)
        feeds.append({"x": x, "codes": codes})
        integer = codes.astype(np.int32) @ dense.astype(np.int32)
        expected.append([y for blob in blobs for y in (packing.matmul(blob, x)[0], integer)])
        for weight_type, y in zip(TYPES, expected[-1][::2], strict=True):
            assert np.abs(y - x @ reference.unpack_blob(blobs[TYPES.index(weight_type)].tobytes())).max() < 0.5
    for run in range(RUNS):
        outputs = session.run(None, feeds[run % len(feeds)])
        for output, right in zip(outputs, expected[run % len(feeds)], strict=True):
            assert output.tobytes() == right.tobytes(), f"run {run}"
