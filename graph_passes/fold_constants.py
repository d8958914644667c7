"""Folds what lies between constants and their use, lazily: nothing is computed until a folded constant is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.attributes import int_attribute, ints_attribute
from sparamx_onnx.graph_passes.dequantize import CODE_BITS, Dequantized, Reshaped, Unpacked
from sparamx_onnx.graph_passes.mapped import read_tensor
from sparamx_onnx.graph_passes.plan import Reason

_FLOATS: Mapping[ir.DataType, np.dtype[np.generic]] = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    ir.DataType.DOUBLE: np.dtype(np.float64),
}

# From this IR version on, an initializer that is also a graph input is only a default that a caller may replace.
_OVERRIDABLE_SINCE_IR = 4

# What may lie between matrices that are picked from a stack and their product.
_PASSING = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_LONGEST_WAY_TO_GATHER = 6

_NEWEST_OPSET = 1 << 30


@dataclass(frozen=True)
class Transposed:
    """The folding of a Transpose."""

    permutation: tuple[int, ...]


@dataclass(frozen=True)
class Converted:
    """The folding of a Cast between floating-point types."""

    dtype: ir.DataType


Step = Transposed | Converted | Dequantized | Reshaped | Unpacked


@dataclass(frozen=True)
class FoldedConstant:
    """A constant as a node sees it.

    Attributes:
        root: The initializer, or the output of the Constant node, that holds the values.
        tensor: Its tensor.
        steps: What lies between the tensor and the use of it, first step first.
        shape: The shape at the use.
        dtype: The type at the use.
    """

    root: ir.Value
    tensor: ir.TensorProtocol
    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def name(self) -> str:
        """Name of the value that holds the constant."""
        return self.root.name or ""

    def transposed(self) -> FoldedConstant:
        """The same constant with its dimensions in reverse order."""
        permutation = tuple(reversed(range(len(self.shape))))
        return self.with_step(Transposed(permutation), self.shape[::-1], self.dtype)

    def with_step(self, step: Step, shape: tuple[int, ...], dtype: ir.DataType) -> FoldedConstant:
        """What a step makes of the constant.

        Args:
            step: The step.
            shape: The shape after it.
            dtype: The type after it.
        """
        return FoldedConstant(self.root, self.tensor, _append(self.steps, step), shape, dtype)

    @property
    def is_quantized(self) -> bool:
        """Whether it is dequantized on the way."""
        return any(isinstance(step, Dequantized) for step in self.steps)

    @property
    def nbytes(self) -> int:
        """Its size in the model, with the scales and zero points that dequantize it."""
        parts = [part for step in self.steps if isinstance(step, Dequantized) for part in (step.scale, step.zero)]
        return self.tensor.nbytes + sum(part.nbytes for part in parts if isinstance(part, FoldedConstant))

    def numpy(self) -> npt.NDArray[np.generic]:
        """The values at the use.

        Transposing gives a view, and so does widening float16 or bfloat16 to float32, in that the narrow array is
        returned as it is: every consumer here takes it, and its values are the same.
        """
        array = read_tensor(self.tensor)
        steps = list(self.steps)
        while steps:
            step = steps.pop(0)
            if isinstance(step, Transposed):
                array = array.transpose(step.permutation)
            elif not isinstance(step, Converted):
                array = step.apply(array)
            elif not _is_widening(array.dtype, step.dtype) or any(isinstance(later, Converted) for later in steps):
                array = array.astype(_FLOATS[step.dtype])
        return array


@dataclass(frozen=True)
class NotConstant:
    """Why a value cannot be folded."""

    reason: Reason
    detail: str = ""


def _is_widening(source: np.dtype[np.generic], target: ir.DataType) -> bool:
    return target == ir.DataType.FLOAT and source.newbyteorder("=") in (
        _FLOATS[ir.DataType.FLOAT],
        _FLOATS[ir.DataType.FLOAT16],
        _FLOATS[ir.DataType.BFLOAT16],
    )


def _append(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    """The steps with one more, adjacent transpositions merged and void ones dropped.

    Equal views of one tensor thus have equal steps, by which weights are recognized as shared.
    """
    if isinstance(step, Converted) and steps and isinstance(steps[-1], Transposed):
        # A conversion commutes with a transposition: conversions stand first.
        return (*steps[:-1], step, steps[-1])
    if not isinstance(step, Transposed):
        return (*steps, step)
    permutation = step.permutation
    if steps and isinstance(steps[-1], Transposed):
        inner = steps[-1].permutation
        permutation = tuple(inner[axis] for axis in permutation)
        steps = steps[:-1]
    if permutation == tuple(range(len(permutation))):
        return steps
    return (*steps, Transposed(permutation))


class ConstantFolder:
    """Recognizes constants of one model through the nodes that lie between them and their use.

    Rules:

    1. An initializer is a constant, unless it is also a graph input (from IR version 4 on a caller may replace it).
    2. The output of a Constant node that holds a tensor or numbers is a constant.
    3. Identity of a constant is that constant.
    4. Transpose of a constant is a constant: its permutation is recorded, no data is moved.
    5. Cast of a floating-point constant to a floating-point type is a constant: the conversion is recorded.
    6. DequantizeLinear of an integer constant with constant scales and zero points, one, one per index of an axis, or
       one per block of an axis, is a constant: it is recorded how to compute it.
    7. Anything else is refused, with the reason.

    The graph is not changed: nodes that nobody uses any more after a rewrite are removed by it, the others keep the
    constant they have, so that a weight that stays dense is never stored twice.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._overridable = (model.ir_version or _OVERRIDABLE_SINCE_IR) >= _OVERRIDABLE_SINCE_IR
        self._computable: set[ir.Value] | None = None
        self._dequantizing: set[ir.Node] = set()

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators that the model imports."""
        imports = self._model.opset_imports
        # The domain has two names; of a model that imports neither, ONNX Runtime takes the newest version.
        return imports.get("", imports.get("ai.onnx", _NEWEST_OPSET))

    def fold(self, value: ir.Value) -> FoldedConstant | NotConstant:
        """The constant that a value is, or why it is none."""
        chain: list[ir.Node] = []
        while not _is_initialized(value):
            node = value.producer()
            # A node that is met again is in a cycle, which is no valid model, but must not hang.
            if node is None or node in chain or not _is_foldable(node):
                break
            source = node.inputs[0]
            if source is None:
                break
            chain.append(node)
            value = source
        folded = self._fold_root(value)
        for node in reversed(chain):
            if isinstance(folded, NotConstant):
                return folded
            unary = _FOLDED.get(node.op_type)
            folded = self._fold_dequantize(node, folded) if unary is None else unary(node, folded)
        return folded

    def _fold_dequantize(self, node: ir.Node, codes: FoldedConstant) -> FoldedConstant | NotConstant:
        if node in self._dequantizing:  # scales that depend on themselves: no valid model, but it must not hang
            return NotConstant(Reason.MALFORMED_NODE, f"The node '{node.name}' is in a cycle.")
        self._dequantizing.add(node)
        try:
            values = [node.inputs[index] if index < len(node.inputs) else None for index in (1, 2)]
            scale, zero = (None if value is None else self.fold(value) for value in values)
        finally:
            self._dequantizing.discard(node)
        if isinstance(scale, NotConstant) or isinstance(zero, NotConstant):
            return NotConstant(Reason.QUANTIZED_WEIGHT, f"The scales of '{node.name}' are computed at run time.")
        if scale is None:
            return NotConstant(Reason.MALFORMED_NODE, f"The node '{node.name}' has no scales.")
        if int_attribute(node, "output_dtype", 0) not in (ir.DataType.UNDEFINED, scale.dtype):
            return NotConstant(Reason.QUANTIZED_WEIGHT, f"The node '{node.name}' makes another type than its scales'.")
        return dequantized(
            codes,
            scale,
            zero,
            axis=int_attribute(node, "axis", 1),
            block=int_attribute(node, "block_size", 0),
            what=f"the {node.op_type} node '{node.name}'",
        )

    def _fold_root(self, value: ir.Value) -> FoldedConstant | NotConstant:
        if _is_initialized(value):
            assert value.const_value is not None
            if value.is_graph_input() and self._overridable:
                return NotConstant(Reason.WEIGHT_IS_GRAPH_INPUT, f"It is '{value.name}'.")
            return _root(value, value.const_value)
        node = value.producer()
        if node is None:
            return NotConstant(Reason.TWO_ACTIVATIONS)
        if node.op_type == "Constant" and node.domain == "":
            tensor = _constant_tensor(node)
            if tensor is not None:
                return _root(value, tensor)
            return NotConstant(Reason.WEIGHT_NOT_CONSTANT, f"The Constant node '{node.name}' holds no plain tensor.")
        if value not in self._values_of_constants():
            stack = _stack_of_matrices(value)
            if stack is not None:
                return NotConstant(Reason.WEIGHT_CHOSEN_AT_RUN_TIME, f"They are '{stack.name}'.")
            return NotConstant(Reason.TWO_ACTIVATIONS)
        if node.op_type.startswith("Dequantize"):
            return NotConstant(Reason.QUANTIZED_WEIGHT, f"The {node.op_type} node '{node.name}' expands it.")
        return NotConstant(Reason.WEIGHT_NOT_CONSTANT, f"The {node.op_type} node '{node.name}' computes it.")

    def _values_of_constants(self) -> set[ir.Value]:
        """Every value that is computed from initializers and Constant nodes alone."""
        if self._computable is None:
            self._computable = set()
            for node in ir.traversal.RecursiveGraphIterator(self._model.graph):
                # A node without inputs is a constant or a source of random numbers; a body may capture anything.
                is_source = not any(source is not None for source in node.inputs) and node.op_type != "Constant"
                has_body = any(
                    attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                    for attribute in node.attributes.values()
                )
                if is_source or has_body:
                    continue
                if all(
                    source is None or source.is_initializer() or source in self._computable for source in node.inputs
                ):
                    self._computable.update(node.outputs)
        return self._computable


def dequantized(
    codes: FoldedConstant, scale: FoldedConstant, zero: FoldedConstant | int | None, *, axis: int, block: int, what: str
) -> FoldedConstant | NotConstant:
    """The constant that quantized codes mean, or why that cannot be told.

    Args:
        codes: The codes, of an integer type.
        scale: The scales, of a floating-point type: one, one per index of ``axis``, or one per block.
        zero: The codes that mean zero, of the scales' shape; or one for all of them; None is 0.
        axis: The dimension along which the scales differ; negative from the end.
        block: How many indices of the axis share a scale; 0 where every index has its own.
        what: The node, in words, for the reason.
    """
    if codes.dtype not in CODE_BITS:
        return NotConstant(Reason.QUANTIZED_WEIGHT, f"Its codes, which {what} expands, are {codes.dtype.name}.")
    if scale.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return NotConstant(Reason.QUANTIZED_WEIGHT, f"Its scales are {scale.dtype.name}.")
    rank = len(codes.shape)
    single = math.prod(scale.shape) == 1
    if not single and not -rank <= axis < rank:
        return NotConstant(Reason.MALFORMED_NODE, f"There is no dimension {axis} that {what} could scale.")
    axis = axis % rank if rank else 0
    blocks = -(-codes.shape[axis] // block) if block > 0 and rank else 0
    expected = [(*codes.shape[:axis], blocks, *codes.shape[axis + 1 :])] if block else [codes.shape[axis : axis + 1]]
    if block < 0 or not ((single and not block) or scale.shape in expected):
        return NotConstant(
            Reason.MALFORMED_NODE, f"The scales of {what} are of the shape {list(scale.shape)}, which does not fit."
        )
    if isinstance(zero, FoldedConstant) and math.prod(zero.shape) != 1 and zero.shape != scale.shape:
        return NotConstant(Reason.MALFORMED_NODE, f"The zero points of {what} do not have the shape of its scales.")
    bits, signed = CODE_BITS[codes.dtype]
    if codes.steps and isinstance(codes.steps[-1], Unpacked):
        bits = codes.steps[-1].bits
    low = -(1 << (bits - 1)) if signed else 0
    step = Dequantized(scale, 0 if zero is None else zero, axis, block, codes.shape, low, low + (1 << bits) - 1)
    return codes.with_step(step, codes.shape, scale.dtype)


def _is_foldable(node: ir.Node) -> bool:
    if node.op_type == "DequantizeLinear":
        return node.domain in ("", "com.microsoft") and 2 <= len(node.inputs) <= 3
    return node.domain == "" and node.op_type in _FOLDED and len(node.inputs) == 1


def _stack_of_matrices(value: ir.Value) -> ir.Value | None:
    """The initializer of three or more dimensions from which a Gather picks the value, as the experts of a token."""
    node = value.producer()
    for _ in range(_LONGEST_WAY_TO_GATHER):
        if node is None or not node.inputs or node.inputs[0] is None or node.domain != "":
            return None
        source = node.inputs[0]
        if node.op_type in ("Gather", "GatherND"):
            is_stack = _is_initialized(source) and source.shape is not None and len(source.shape) >= 3
            return source if is_stack else None
        if node.op_type not in _PASSING:
            return None
        node = source.producer()
    return None


def _is_initialized(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None


def _fold_transpose(node: ir.Node, inner: FoldedConstant) -> FoldedConstant | NotConstant:
    rank = len(inner.shape)
    permutation = ints_attribute(node, "perm", tuple(reversed(range(rank))))
    if sorted(permutation) != list(range(rank)):
        return NotConstant(
            Reason.MALFORMED_NODE,
            f"The Transpose node '{node.name}' permutes {len(permutation)} dimensions of {rank}.",
        )
    shape = tuple(inner.shape[axis] for axis in permutation)
    return inner.with_step(Transposed(permutation), shape, inner.dtype)


def _fold_identity(node: ir.Node, inner: FoldedConstant) -> FoldedConstant | NotConstant:
    return inner


def _fold_cast(node: ir.Node, inner: FoldedConstant) -> FoldedConstant | NotConstant:
    to = int_attribute(node, "to", ir.DataType.UNDEFINED)
    target = ir.DataType(to) if to in ir.DataType.__members__.values() else None
    if target == inner.dtype:
        return inner
    if target is None or target not in _FLOATS or inner.dtype not in _FLOATS:
        name = "an unknown type" if target is None else target.name
        return NotConstant(
            Reason.WEIGHT_NOT_CONSTANT, f"The node '{node.name}' casts it from {inner.dtype.name} to {name}."
        )
    return inner.with_step(Converted(target), inner.shape, target)


_FOLDED: Mapping[str, Callable[[ir.Node, FoldedConstant], FoldedConstant | NotConstant]] = {
    "Identity": _fold_identity,
    "Transpose": _fold_transpose,
    "Cast": _fold_cast,
}


def _root(value: ir.Value, tensor: ir.TensorProtocol) -> FoldedConstant:
    shape = tensor.shape
    return FoldedConstant(value, tensor, (), tuple(shape.numpy()), tensor.dtype)


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node; None where it holds strings or a sparse tensor."""
    if len(node.attributes) != 1 or len(node.outputs) != 1:
        return None
    [attribute] = node.attributes.values()
    match attribute.type:
        case ir.AttributeType.TENSOR:
            return attribute.as_tensor()
        case ir.AttributeType.FLOAT | ir.AttributeType.FLOATS:
            return ir.Tensor(np.array(attribute.value, np.float32))
        case ir.AttributeType.INT | ir.AttributeType.INTS:
            return ir.Tensor(np.array(attribute.value, np.int64))
    return None
