"""Tiny models built by hand, converted, saved and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.graph_passes import pipeline, write
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.plan import NodePlan, Plan
from sparamx_onnx.ops import library

Arrays = Mapping[str, np.ndarray]


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str | None]],
    outputs: Sequence[str],
    initializers: Arrays,
    *,
    opset: int = 20,
    ir_version: int = 10,
    functions: Sequence[onnx.FunctionProto] = (),
    extra_inputs: Sequence[onnx.ValueInfoProto] = (),
    element_type: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model whose inputs and outputs are of one element type; node names default to their first output's."""
    for node in nodes:
        node.name = node.name or node.output[0]
    graph = helper.make_graph(
        nodes,
        "graph",
        [*(helper.make_tensor_value_info(n, element_type, s) for n, s in inputs.items()), *extra_inputs],
        [helper.make_tensor_value_info(name, element_type, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    imports = [
        helper.make_opsetid(domain, version)
        for domain, version in {"": opset, "com.microsoft": 1, **{f.domain: 1 for f in functions}}.items()
    ]
    return helper.make_model(graph, ir_version=ir_version, opset_imports=imports, functions=list(functions))


def session(model: str | Path | bytes, *, optimized: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    library.register(options)
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )


@dataclass
class Converted:
    """A model after conversion, in memory and on disk."""

    original: onnx.ModelProto
    model: ir.Model
    plan: Plan
    path: Path

    @property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.path, load_external_data=False)

    @property
    def op_types(self) -> list[str]:
        return [node.op_type for node in self.proto.graph.node]

    @property
    def initializers(self) -> set[str]:
        return {initializer.name for initializer in self.proto.graph.initializer}

    def node(self, name: str) -> NodePlan:
        (found,) = [node for node in self.plan if node.node == name]
        return found

    def attributes(self, name: str) -> dict[str, object]:
        (found,) = [node for node in self.proto.graph.node if node.name == name]
        return {attribute.name: helper.get_attribute_value(attribute) for attribute in found.attribute}

    def error(self, feeds: Arrays, *, optimized: bool = True) -> float:
        """The largest difference of any output, relative to the largest value of that output.

        Args:
            feeds: The inputs.
            optimized: Whether ONNX Runtime may fuse the nodes of the original. From quantized weights it makes
                operators that quantize activations too, so that its results are no reference.
        """
        before = session(self.original.SerializeToString(), optimized=optimized).run(None, dict(feeds))
        after = session(self.path).run(None, dict(feeds))
        worst = 0.0
        for expected, actual in zip(before, after, strict=True):
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            worst = max(worst, float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)))
        return worst


class Workbench:
    """Converts models in a folder of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def convert(self, proto: onnx.ModelProto, *, name: str = "out.onnx", **options: object) -> Converted:
        """Loads, rewrites and saves a model; fp32 weights unless told otherwise, so that results are nearly exact."""
        source = self.folder / f"in-{name}"
        onnx.save(proto, source)
        model = ir.load(source)
        plan = pipeline.run(model, ConvertOptions(**{"weights": "fp32", **options}))  # type: ignore[arg-type]
        path = self.folder / name
        write.save(model, path)
        return Converted(proto, model, plan, path)

    def save_external(self, proto: onnx.ModelProto, name: str = "external.onnx") -> Path:
        """Saves a model with all of its initializers in an external data file."""
        path = self.folder / name
        copy = onnx.ModelProto.FromString(proto.SerializeToString())
        onnx.save(copy, path, save_as_external_data=True, location=f"{name}.weights", size_threshold=0)
        return path


@pytest.fixture
def workbench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


@pytest.fixture(scope="session")
def make_model():
    return build


@pytest.fixture(scope="session")
def open_session():
    return session


def random_sparse(shape: tuple[int, ...], sparsity: float = 0.6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    w = rng.standard_normal(shape, np.float32)
    w[rng.random(shape) < sparsity] = 0
    return w


@pytest.fixture(scope="session")
def sparse():
    return random_sparse
