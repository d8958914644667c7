"""Writes a dense ONNX model that is nothing but linear layers of one shape, as large as one likes, in little memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

_ALIGNMENT = 4096
_OPSET, _IR_VERSION = 17, 8  # what the oldest of the engines reads


def write(path: Path, k: int, n: int, layers: int, sparsity: float, seed: int = 0) -> None:
    """Writes `path` and `path`.data: X [M, k] through `layers` MatMuls, each with a weight [k, n] of its own.

    Between two layers the first k of n outputs go on (padded with the model's input where n < k): a copy of a row,
    the same in every engine, and a dependency that keeps the layers in sequence. The weights are one random matrix,
    `sparsity` of it zero, with its rows rotated differently in each layer: different bytes without drawing them all.
    They are scaled so that activations keep their size from layer to layer.
    """
    base = draw(k, n, sparsity, seed)
    data = path.with_name(path.name + ".data")
    nodes, initializers = [], []
    current = "X"
    if n < k and layers > 1:
        nodes.append(helper.make_node("Slice", ["X", "n", "k", "axis"], ["X_tail"]))
    with data.open("wb") as file:
        for layer in range(layers):
            name = f"layer.{layer}.weight"
            offset = file.tell()
            turn = k * layer // layers
            file.write(base[turn:].data)
            file.write(base[:turn].data)
            initializers.append(external(name, [k, n], data.name, offset, base.nbytes))
            file.write(bytes(-file.tell() % _ALIGNMENT))
            output = "Y" if layer == layers - 1 else f"Y_{layer}"
            nodes.append(helper.make_node("MatMul", [current, name], [output], name=f"layer.{layer}"))
            if layer == layers - 1:
                break
            if n > k:
                nodes.append(helper.make_node("Slice", [output, "zero", "k", "axis"], [f"X_{layer}"]))
                current = f"X_{layer}"
            elif n < k:
                nodes.append(helper.make_node("Concat", [output, "X_tail"], [f"X_{layer}"], axis=1))
                current = f"X_{layer}"
            else:
                current = output
    used = {name for node in nodes for name in node.input}
    for name, value in {"zero": 0, "k": k, "n": n, "axis": 1}.items():
        if name in used:
            initializers.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    graph = helper.make_graph(
        nodes,
        "linear_stack",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", n])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    onnx.save(model, path)


def draw(k: int, n: int, sparsity: float, seed: int) -> NDArray[np.float32]:
    """A random matrix [k, n] with so many zeros, scaled so that a product has the size of its input."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((k, n), np.float32)
    weights *= np.float32(1 / np.sqrt(max(k * (1 - sparsity), 1)))
    weights[rng.random((k, n), np.float32) < sparsity] = 0
    return weights


def external(name: str, shape: list[int], location: str, offset: int, length: int) -> TensorProto:
    """An initializer whose values lie in a file beside the model."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
