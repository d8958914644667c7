"""Recognizes the activation function that follows a linear layer, however the exporter has spelled it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.attributes import float_attribute, string_attribute
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder, NotConstant
from sparamx_onnx.ops.definitions import Epilogue
from sparamx_onnx.ops.reference import apply_epilogue

_Samples = npt.NDArray[np.float64]

# The longest spelling seen is the tanh form of Gelu with the cube written as two products: nine nodes.
_LONGEST_SPELLING = 12

# Wide enough for every function here to reach its asymptote, fine enough to tell the two forms of Gelu apart: they
# differ by up to 5e-4, while a constant that an exporter has cut short (1.41421) moves a result by less than 1e-5.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Activation:
    """An activation function found in a graph.

    Attributes:
        epilogue: Which one.
        nodes: The nodes that spell it, in graph order.
        output: Its result.
    """

    epilogue: Epilogue
    nodes: tuple[ir.Node, ...]
    output: ir.Value


def find_activation(value: ir.Value, folder: ConstantFolder) -> Activation | None:
    """The activation function that alone consumes a value, or None.

    Rules:

    1. Nodes are taken as long as all their inputs are the value, results of nodes taken, or constants of one element,
       and their operator is one of a closed list of element-wise functions without kinks, or Relu.
    2. What was taken is an activation function when one result alone is used elsewhere, and when that result, computed
       over a range of sample values, is that of relu, gelu, gelu_tanh or silu. So operand order, and whether a factor
       is written before or after, do not matter.
    3. A value that is a graph output, or that any other node or a subgraph uses, is refused: it is still needed.
    """
    samples = _sample_points()
    values: dict[ir.Value, _Samples] = {value: samples}
    nodes: list[ir.Node] = []
    while len(nodes) < _LONGEST_SPELLING:
        taken = _take_next(value, values, nodes, folder)
        if taken is None:
            return None
        node, result = taken
        nodes.append(node)
        values[node.outputs[0]] = result
        exits = [v for v in values if v.is_graph_output() or any(user not in nodes for user in v.consumers())]
        if exits == [node.outputs[0]]:
            for epilogue, expected in _known_results().items():
                if np.allclose(result, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                    return Activation(epilogue, tuple(nodes), node.outputs[0])
    return None


def _take_next(
    value: ir.Value, values: Mapping[ir.Value, _Samples], nodes: list[ir.Node], folder: ConstantFolder
) -> tuple[ir.Node, _Samples] | None:
    """The next node that can be computed, and its result over the samples."""
    for source in values:
        for node in source.consumers():
            if node in nodes or node.graph is not value.graph or len(node.outputs) != 1:
                continue
            function = _FUNCTIONS.get((node.domain, node.op_type))
            if function is None:
                continue
            operands = [_operand(operand, values, folder, value) for operand in node.inputs]
            known = [operand for operand in operands if operand is not None]
            if len(known) != len(operands):
                continue
            with np.errstate(all="ignore"):
                result = function(node, known)
            if result is not None:
                return node, result
    return None


def _operand(
    operand: ir.Value | None, values: Mapping[ir.Value, _Samples], folder: ConstantFolder, value: ir.Value
) -> _Samples | None:
    if operand is None:
        return None
    if operand in values:
        return values[operand]
    constant = folder.fold(operand)
    if isinstance(constant, NotConstant) or math.prod(constant.shape) != 1:
        return None
    # A constant with more dimensions than the value would add dimensions to the result.
    if len(constant.shape) > (1 if value.shape is None else max(1, len(value.shape))):
        return None
    array = constant.numpy()
    if array.dtype.kind not in "fiuV":
        return None
    return array.astype(np.float64).reshape(())


@functools.cache
def _sample_points() -> _Samples:
    return np.concatenate([np.linspace(-12.0, 12.0, 241), [-0.01, 0.01, -30.0, 30.0]])


@functools.cache
def _known_results() -> Mapping[Epilogue, _Samples]:
    samples = _sample_points()
    return {e: apply_epilogue(samples, e.value) for e in Epilogue if e is not Epilogue.NONE}


_Function = Callable[[ir.Node, list[_Samples]], _Samples | None]


def _unary(function: Callable[[_Samples], _Samples]) -> _Function:
    return lambda node, operands: function(operands[0]) if len(operands) == 1 else None


def _binary(function: Callable[[_Samples, _Samples], _Samples]) -> _Function:
    return lambda node, operands: function(operands[0], operands[1]) if len(operands) == 2 else None


def _as(epilogue: Epilogue) -> _Function:
    return _unary(lambda x: apply_epilogue(x, epilogue.value))


_erf: Callable[[_Samples], _Samples] = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: _Samples) -> _Samples:
    return 1.0 / (1.0 + np.exp(-x))


def _gelu(node: ir.Node, operands: list[_Samples]) -> _Samples | None:
    forms = {"none": Epilogue.GELU, "tanh": Epilogue.GELU_TANH}
    form = forms.get(string_attribute(node, "approximate", "none"))
    return None if form is None else _as(form)(node, operands)


def _swish(default_alpha: float) -> _Function:
    def function(node: ir.Node, operands: list[_Samples]) -> _Samples | None:
        alpha = float_attribute(node, "alpha", default_alpha)
        return _unary(lambda x: x * _sigmoid(alpha * x))(node, operands)

    return function


_FUNCTIONS: Mapping[tuple[str, str], _Function] = {
    ("", "Relu"): _as(Epilogue.RELU),
    ("", "Sigmoid"): _unary(_sigmoid),
    ("", "Tanh"): _unary(np.tanh),
    ("", "Erf"): _unary(_erf),
    ("", "Neg"): _unary(np.negative),
    ("", "Exp"): _unary(np.exp),
    ("", "Reciprocal"): _unary(np.reciprocal),
    ("", "Add"): _binary(np.add),
    ("", "Sub"): _binary(np.subtract),
    ("", "Mul"): _binary(np.multiply),
    ("", "Div"): _binary(np.divide),
    ("", "Pow"): _binary(np.power),
    ("", "Gelu"): _gelu,
    ("", "Swish"): _swish(1.0),
    ("com.microsoft", "Gelu"): _as(Epilogue.GELU),
    ("com.microsoft", "FastGelu"): _as(Epilogue.GELU_TANH),
    ("com.microsoft", "QuickGelu"): _swish(1.702),
}
