"""Measures how much the outputs of a model change when the result of one layer does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.calibration import (
    Activations,
    Layer,
    LayerGroup,
    Pieces,
    as_model,
    layers_of,
    open_session,
    run_session,
)
from sparamx_onnx.graph_passes.packed_weight import PackedWeight
from sparamx_onnx.ops import packing
from sparamx_onnx.ops.errors import SparamxError

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

_CHANGE = ".sparamx.change"


class OutputProbe:
    """A model of which the result of any layer can be changed while it runs.

    Rules:

    1. The outputs that are compared are those that most layers lead to: the last hidden state or the logits, but not
       the cache of a layer in the middle.
    2. To the result of every layer an input is added, which is 0 except for the layer in question. So one session
       serves all layers, and no weight is packed again.
    """

    def __init__(
        self, model: ir.Model, groups: Sequence[LayerGroup], sample: Mapping[int, Feeds], folder: Path
    ) -> None:
        """Opens the model and computes its outputs.

        Args:
            model: A model after ``RewriteMatMulPass``; it is not changed.
            groups: From ``layer_groups``.
            sample: Inputs of the model, by the number of the run that they belong to.
            folder: Where the model is written.

        Raises:
            SparamxError: ONNX Runtime cannot run the model, or no output holds floating-point numbers.
        """
        pieces = Pieces(model, groups)
        outputs = [value for value in model.graph.outputs if value.dtype is None or value.dtype.is_floating_point()]
        layers = [pieces.layers_before(value) for value in outputs]
        if not any(layers):
            raise SparamxError("The model has no output of numbers to judge the layers' sensitivity by.")
        piece = pieces.whole([value for value, count in zip(outputs, layers, strict=True) if count == max(layers)])
        copy = as_model(
            piece, model, {value.name or "": value.dtype or ir.DataType.FLOAT for value in model.graph.inputs}
        )
        results = {_result(layer): _result_type(layer) for group in groups for layer in layers_of(group)}
        self._changes = _add_changes(copy, results)
        self._outputs = piece.outputs
        self._sample = {run: {name: feeds[name] for name in piece.inputs} for run, feeds in sample.items()}
        self._session = open_session(copy, folder / "probe.onnx")
        self._expected = {run: self._run(run, {}) for run in self._sample}

    def damage(
        self, group: LayerGroup, packed: PackedWeight, pruned: npt.NDArray[np.float32], activations: Activations
    ) -> float:
        """How much the outputs change with a pruned weight: squared, relative, mean over outputs and runs."""
        layers = [layer for layer in layers_of(group) if layer.weight is packed]
        blobs = [packing.pack(weight, packed.options) for weight in (packed.source(), pruned)]
        damages = []
        for run, expected in self._expected.items():
            x = activations.of_run(run)
            changes = {}
            for layer in layers:
                before, after = (_multiply(layer, blob, x) for blob in blobs)
                changes[_result(layer)] = after - before
            actual = self._run(run, changes)
            damages += [_relative_square(*pair) for pair in zip(expected, actual, strict=True)]
        return float(np.mean(damages))

    def _run(self, run: int, changes: Mapping[str, Array]) -> list[Array]:
        nothing = np.zeros(1, np.float32)
        feeds = {name + _CHANGE: changes.get(name, nothing) for name in self._changes}
        return run_session(self._session, self._outputs, {**self._sample[run], **feeds})


def _result(layer: Layer) -> str:
    return layer.node.outputs[layer.index].name or ""


def _result_type(layer: Layer) -> ir.DataType:
    return layer.node.outputs[layer.index].dtype or ir.DataType.FLOAT


def _add_changes(model: ir.Model, results: Mapping[str, ir.DataType]) -> list[str]:
    """Adds an input to each of some values of these types; returns those that the model has."""
    found = [(node, value) for node in model.graph for value in node.outputs if value.name in results]
    for node, result in found:
        name = result.name or ""
        change = ir.Value(name=name + _CHANGE, type=ir.TensorType(ir.DataType.FLOAT))
        model.graph.inputs.append(change)
        # The sum takes over the name, by which an output of the model is known.
        changed = ir.Value(name=name, type=result.type, shape=result.shape)
        result.name = name + ".sparamx.unchanged"
        for index, output in enumerate(model.graph.outputs):
            if output is result:
                model.graph.outputs[index] = changed
        ir.convenience.replace_all_uses_with(result, changed)
        # Changes are float32, whatever the result is.
        to = ir.AttrInt64("to", results[name].value)
        cast = ir.Node("", "Cast", [change], [to])
        model.graph.insert_after(node, [cast, ir.Node("", "Add", [result, cast.outputs[0]], outputs=[changed])])
    return [(result.name or "").removesuffix(".sparamx.unchanged") for _, result in found]


def _multiply(layer: Layer, blob: npt.NDArray[np.uint8], x: Array) -> npt.NDArray[np.float32]:
    """What a layer computes with a packed weight."""
    node = layer.node
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = None if bias is None else ir.convenience.get_const_tensor(bias)
    vector = None
    if tensor is not None:
        values = np.asarray(tensor.numpy(), np.float32)
        widths = node.attributes["splits"].as_ints() if "splits" in node.attributes else [values.size]
        start = sum(widths[: layer.index])
        vector = values[start : start + widths[layer.index]]
    epilogues = node.attributes["epilogue"].as_string() if "epilogue" in node.attributes else "none"
    names = epilogues.split(",")
    # One name stands for all outputs.
    epilogue = names[layer.index] if len(names) > 1 else names[0]
    result, _ = packing.matmul(blob, np.asarray(x, np.float32), vector, epilogue)
    return result


def _relative_square(expected: Array, actual: Array) -> float:
    """The square of the change, relative to that of the values; what is not finite (a mask) is left out."""
    expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
    finite = np.isfinite(expected) & np.isfinite(actual)
    square = float(np.square(expected, where=finite, out=np.zeros_like(expected)).sum())
    change = float(np.square(actual - expected, where=finite, out=np.zeros_like(expected)).sum())
    return change / square if square > 0 else 0.0
