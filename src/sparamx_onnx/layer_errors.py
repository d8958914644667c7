"""Finds out which sparse operator of a converted model its errors come from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir
import onnxruntime

from sparamx_onnx.comparison import compare
from sparamx_onnx.feeds import Array
from sparamx_onnx.graph_passes.linear_layers import scope_of
from sparamx_onnx.loading import LoadedModel, tensors_of
from sparamx_onnx.ops.definitions import DOMAIN
from sparamx_onnx.ops.errors import in_one_sentence
from sparamx_onnx.ops.sessions import open_quietly

# Layers whose inputs and results are held at a time.
_TOGETHER = 16
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclasses.dataclass(frozen=True)
class LayerError:
    """How far the result of a sparse operator is from the one of the same name in the first model.

    Attributes:
        layer: The module that it came from, or the operator's name; with several results, the result's name too.
        node: The operator's name.
        alone: Relative error if it gets the inputs that it has in the first model: its own error. None where infinite
            or undefined values differ or are all there is, or the reference is all zero and the result is not.
        so_far: Relative error in the second model, where it gets what the operators before it have made; None as above.
    """

    layer: str
    node: str
    alone: float | None
    so_far: float | None


@dataclasses.dataclass(frozen=True)
class _Probe:
    """A sparse operator whose inputs and results exist in both models.

    Attributes:
        node: The operator.
        inputs: Names of its inputs that are computed.
        outputs: Names of its results.
    """

    node: ir.Node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def layer_errors(
    reference: LoadedModel, converted: LoadedModel, runs: Sequence[Mapping[str, Array]]
) -> tuple[LayerError, ...]:
    """The errors of every sparse operator of a converted model, in graph order.

    Both models run with the results in question as further outputs, and each operator once more on its own. Operators
    in the bodies of If, Loop and Scan are left out, and those whose inputs do not exist in the first model.

    Args:
        reference: The model as it was.
        converted: The converted model.
        runs: The inputs.

    Raises:
        SparamxError: ONNX Runtime cannot run one of the models or operators.
    """
    probes = list(_probes(reference.model, converted.model))
    if not probes:
        return ()
    names = sorted({name for probe in probes for name in (*probe.inputs, *probe.outputs)})
    sessions = [_with_outputs(model, names) for model in (reference, converted)]
    errors = []
    for start in range(0, len(probes), _TOGETHER):
        some = probes[start : start + _TOGETHER]
        names = sorted({name for probe in some for name in (*probe.inputs, *probe.outputs)})
        expected, actual = ([{**run, **_run(session, names, run)} for run in runs] for session in sessions)
        for probe in some:
            errors += _errors(probe, converted, expected, actual)
    return tuple(errors)


def _probes(reference: ir.Model, converted: ir.Model) -> Iterator[_Probe]:
    known = {value.name for value in reference.graph.inputs}
    known.update(value.name for node in reference.graph for value in node.outputs)
    for node in converted.graph:
        if node.domain != DOMAIN:
            continue
        inputs = [value.name or "" for value in node.inputs if value is not None and not value.is_initializer()]
        outputs = [value.name or "" for value in node.outputs if value.name]
        if known.issuperset(inputs) and known.issuperset(outputs):
            yield _Probe(node, tuple(inputs), tuple(outputs))


def _errors(
    probe: _Probe,
    converted: LoadedModel,
    expected: Sequence[Mapping[str, Array]],
    actual: Sequence[Mapping[str, Array]],
) -> list[LayerError]:
    session = _open(_alone(probe, converted.model), converted)
    alone = [_run(session, probe.outputs, run) for run in expected]
    label = scope_of(probe.node) or probe.node.name or probe.outputs[0]
    return [
        LayerError(
            f"{label}: {name}" if len(probe.outputs) > 1 else label,
            probe.node.name or "",
            _relative_error(name, expected, alone),
            _relative_error(name, expected, actual),
        )
        for name in probe.outputs
    ]


def _relative_error(
    name: str, expected: Sequence[Mapping[str, Array]], actual: Sequence[Mapping[str, Array]]
) -> float | None:
    return compare(name, [run[name] for run in expected], [run[name] for run in actual], 0.0).relative_error


def _with_outputs(model: LoadedModel, names: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session of a model with some of its values among its outputs."""
    proto = ir.to_proto(model.model)
    present = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return _open(proto, model)


def _alone(probe: _Probe, model: ir.Model) -> onnx.ModelProto:
    """A model of one operator."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = "layer"
    graph.node.append(ir.serde.serialize_node(probe.node))
    for value in (value for value in probe.node.inputs if value is not None):
        if value.is_initializer() and value.const_value is not None:
            graph.initializer.append(ir.serde.serialize_tensor(value.const_value))
        else:
            dtype = value.dtype or ir.DataType.FLOAT
            graph.input.append(onnx.helper.make_tensor_value_info(value.name or "", dtype.value, None))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in probe.outputs)
    return proto


def _open(proto: onnx.ModelProto, model: LoadedModel) -> onnxruntime.InferenceSession:
    """A session that reads external data where a model does."""
    folder = os.path.commonpath([file.parent for file in model.data_files] or [model.path.parent.resolve()])
    for tensor in tensors_of(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = os.path.relpath(entry.value, folder)
    complaint = f"{model.path}: ONNX Runtime cannot run its layers"
    return open_quietly(proto.SerializeToString(), complaint=complaint, config={_DATA_FOLDER: folder})


def _run(session: onnxruntime.InferenceSession, names: Sequence[str], values: Mapping[str, Array]) -> dict[str, Array]:
    """Those values of these names that a model computes."""
    wanted = {value.name for value in session.get_inputs()}
    made = {value.name for value in session.get_outputs()}
    outputs = [name for name in names if name in made]
    with in_one_sentence("ONNX Runtime fails on these inputs"):
        arrays = session.run(outputs, {name: values[name] for name in wanted})
    return dict(zip(outputs, arrays, strict=True))
