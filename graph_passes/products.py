"""Reads the operators that multiply by a constant matrix, however they spell it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.attributes import float_attribute, int_attribute, string_attribute
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder, FoldedConstant, NotConstant
from sparamx_onnx.graph_passes.plan import Reason

MICROSOFT = "com.microsoft"

NewNodes = Callable[[ir.Value], Sequence[ir.Node]]
"""Makes the nodes that compute something from a value; the first output of the last one is the result."""


@dataclass(frozen=True)
class Bias:
    """A constant that is added to the product.

    Attributes:
        constant: Its values, of any shape that broadcasts to [N].
        scale: A factor of them (Gemm's beta).
    """

    constant: FoldedConstant
    scale: float = 1.0

    def numpy(self, n: int) -> npt.NDArray[np.float32]:
        """The vector [n], float32."""
        vector = np.asarray(self.constant.numpy(), np.float32).reshape(-1) * np.float32(self.scale)
        return np.ascontiguousarray(np.broadcast_to(vector, (n,)), np.float32)


@dataclass(frozen=True)
class Product:
    """``output = after(before(x) W * scale + bias)``, as one operator, or a few that belong together, spell it.

    Attributes:
        nodes: The nodes that compute it, in graph order, the operator that holds the weight first.
        x: The activations [..., K].
        weight: The weight [K, N].
        scale: A factor of the weight.
        bias: The bias, or None.
        takes_add: Whether an Add that follows can be the bias.
        rank: The rank of the result where the operator says it; None where it is that of x.
        output: The result.
        before: What has to be computed from x first, or None.
        after: What remains to be computed from the product, or None.
    """

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    weight: FoldedConstant
    scale: float = 1.0
    bias: Bias | None = None
    takes_add: bool = True
    rank: int | None = None
    output: ir.Value = field(kw_only=True)
    before: NewNodes | None = None
    after: NewNodes | None = None


class RefusedError(Exception):
    """An operator is no product that can be packed; an exception, as it comes from deep in what is read of it.

    Attributes:
        reason: Why.
        detail: What is particular to it.
        weight: Its weight, as far as it has been read, or None.
    """

    def __init__(self, reason: Reason, detail: str = "", weight: FoldedConstant | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.weight = weight


def read_operands(node: ir.Node, folder: ConstantFolder) -> tuple[ir.Value, FoldedConstant]:
    """The activations and the weight of a node whose first two inputs these are.

    Raises:
        RefusedError: It has none, or the weight is no constant, or the activations are one.
    """
    x, w = (node.inputs[index] if index < len(node.inputs) else None for index in (0, 1))
    if x is None or w is None or len(node.outputs) != 1:
        raise RefusedError(Reason.MALFORMED_NODE, "An input or the output is missing.")
    weight = folder.fold(w)
    left = folder.fold(x)
    if isinstance(weight, NotConstant):
        if isinstance(left, FoldedConstant) and weight.reason is Reason.TWO_ACTIVATIONS:
            raise RefusedError(Reason.WEIGHT_ON_LEFT, f"It is '{left.name}'.")
        if isinstance(left, NotConstant) and left.reason is Reason.WEIGHT_CHOSEN_AT_RUN_TIME:
            raise RefusedError(left.reason, left.detail)
        raise RefusedError(weight.reason, weight.detail)
    if isinstance(left, FoldedConstant):
        raise RefusedError(Reason.CONSTANT_EXPRESSION, weight=weight)
    return x, weight


def constant_vector(
    value: ir.Value | None,
    n: int,
    folder: ConstantFolder,
    rank: int | None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> FoldedConstant | None:
    """The constant, if it adds one number per output and no dimensions to a result of so many dimensions.

    Args:
        value: The value, or None.
        n: The number of outputs.
        folder: Folds constants.
        rank: Rank of the result; None if it is not known, but at least 1.
        dtype: Type of the result.
    """
    constant = NotConstant(Reason.TWO_ACTIVATIONS) if value is None else folder.fold(value)
    if isinstance(constant, NotConstant) or constant.dtype != dtype:
        return None
    if len(constant.shape) > (1 if rank is None else rank):
        return None
    if constant.shape and (constant.shape[-1] not in (1, n) or math.prod(constant.shape[:-1]) != 1):
        return None
    return constant


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node of the same graph that uses a value, if nothing else does."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    (use,) = uses
    return use.node if use.node.graph is value.graph else None


def _read_matmul(node: ir.Node, folder: ConstantFolder) -> Product:
    x, weight = read_operands(node, folder)
    return Product((node,), x, weight, output=node.outputs[0])


def _read_gemm(node: ir.Node, folder: ConstantFolder) -> Product:
    x, weight = read_operands(node, folder)
    if len(weight.shape) != 2:
        return Product((node,), x, weight, output=node.outputs[0])
    if int_attribute(node, "transB", 0):
        weight = weight.transposed()
    bias = after = None
    c = node.inputs[2] if len(node.inputs) > 2 else None
    beta = float_attribute(node, "beta", 1.0)
    if c is not None and beta != 0.0:
        constant = constant_vector(c, weight.shape[1], folder, 2, weight.dtype)
        if constant is not None:
            bias = Bias(constant, beta)
        elif _can_be_added(c, weight):
            after = _add(c, beta, weight.dtype)
        else:
            raise RefusedError(Reason.UNSUPPORTED_BIAS, weight=weight)
    if int_attribute(node, "transA", 0):
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "It has transA = 1.", weight)
    return Product(
        (node,), x, weight, float_attribute(node, "alpha", 1.0), bias,
        takes_add=c is None or beta == 0.0, rank=2, output=node.outputs[0], after=after,
    )  # fmt: skip


def _can_be_added(c: ir.Value, weight: FoldedConstant) -> bool:
    """Whether a value may be added to the product of a Gemm: a matrix, or a vector that is computed, of its type."""
    if c.dtype not in (None, weight.dtype):
        return False
    if c.shape is None:
        return True
    columns = c.shape[-1] if len(c.shape) > 0 else 1
    return len(c.shape) <= 2 and not (isinstance(columns, int) and columns not in (1, weight.shape[1]))


def _add(c: ir.Value, factor: float, dtype: ir.DataType) -> NewNodes:
    """Adds a value times a factor."""

    def after(product: ir.Value) -> Sequence[ir.Node]:
        if factor == 1.0:
            return [ir.Node("", "Add", [product, c])]
        tensor = ir.Tensor(np.array(factor, dtype.numpy()))
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
        scaled = ir.Node("", "Mul", [c, constant.outputs[0]])
        return [constant, scaled, ir.Node("", "Add", [product, scaled.outputs[0]])]

    return after


def _read_fused_matmul(node: ir.Node, folder: ConstantFolder) -> Product:
    """FusedMatMul: alpha * x W, with W transposed or not."""
    x, weight = read_operands(node, folder)
    for name in ("transA", "transBatchA", "transBatchB"):
        if int_attribute(node, name, 0):
            raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, f"It has {name} = 1.", weight)
    if len(weight.shape) == 2 and int_attribute(node, "transB", 0):
        weight = weight.transposed()
    return Product((node,), x, weight, float_attribute(node, "alpha", 1.0), output=node.outputs[0])


# The activation functions of FusedGemm, and which of its attributes they take, under which names.
_GEMM_ACTIVATIONS: Mapping[str, Mapping[str, str]] = {
    "Elu": {"activation_alpha": "alpha"},
    "HardSigmoid": {"activation_alpha": "alpha", "activation_beta": "beta"},
    "LeakyRelu": {"activation_alpha": "alpha"},
    "Relu": {},
    "Selu": {"activation_alpha": "alpha", "activation_gamma": "gamma"},
    "Sigmoid": {},
    "Softplus": {},
    "Softsign": {},
    "Tanh": {},
    "ThresholdedRelu": {"activation_alpha": "alpha"},
}


def _read_fused_gemm(node: ir.Node, folder: ConstantFolder) -> Product:
    """FusedGemm: a Gemm, and the activation function behind it becomes a node of its own."""
    product = _read_gemm(node, folder)
    name = string_attribute(node, "activation", "")
    if not name:
        return product
    parameters = _GEMM_ACTIVATIONS.get(name)
    if parameters is None:
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, f"Its activation is {name}.", product.weight)
    attributes = [
        ir.AttrFloat32(new, value)
        for old, new in parameters.items()
        if (value := float_attribute(node, old, None)) is not None
    ]

    add = product.after

    def after(value: ir.Value) -> Sequence[ir.Node]:
        before = [] if add is None else add(value)
        return [*before, ir.Node("", name, [before[-1].outputs[0] if before else value], attributes)]

    return Product(
        product.nodes, product.x, product.weight, product.scale, product.bias,
        takes_add=False, rank=2, output=product.output, after=after,
    )  # fmt: skip


_MATRIX_EQUATION = re.compile(r"(?P<left>[A-Za-z]+|\.\.\.[A-Za-z]+),(?P<right>[A-Za-z]{2})->(?P<result>.+)")


def _read_einsum(node: ir.Node, folder: ConstantFolder) -> Product | None:
    """Einsum, where its equation is that of a matrix product with a constant on the right, e.g. ``bsk,kn->bsn``."""
    constants = [None if value is None else folder.fold(value) for value in node.inputs]
    matrices = [c for c in constants if isinstance(c, FoldedConstant) and len(c.shape) > 1]
    if not matrices:
        return None
    equation = string_attribute(node, "equation", "").replace(" ", "")
    if len(constants) != 2:
        raise RefusedError(Reason.UNSUPPORTED_OPERATOR, f"Its equation is {equation}.", matrices[0])
    x, weight = read_operands(node, folder)
    match = _MATRIX_EQUATION.fullmatch(equation)
    if match is not None:
        left, right, result = match["left"], match["right"], match["result"]
        k = left[-1]
        n = right.replace(k, "")
        others = left[:-1].replace("...", "")
        distinct = len(set(others)) == len(others) and k not in others and len(n) == 1 and n not in others
        if distinct and result == left[:-1] + n and len(weight.shape) == 2:
            weight = weight if right == k + n else weight.transposed()
            return Product((node,), x, weight, output=node.outputs[0])
    raise RefusedError(Reason.UNSUPPORTED_OPERATOR, f"Its equation is {equation}.", weight)


Reader = Callable[[ir.Node, ConstantFolder], Product | None]
"""Reads a node: the product that it computes; None where it holds no weight.

The shapes of x and W need not fit, and W may have any number of dimensions: that is looked at later. Raises
RefusedError where the product cannot be packed, MalformedAttributeError where an attribute has another type than the
operator's.
"""

FLOAT_READERS: Mapping[tuple[str, str], Reader] = {
    ("", "MatMul"): _read_matmul,
    ("", "Gemm"): _read_gemm,
    ("", "Einsum"): _read_einsum,
    (MICROSOFT, "FusedMatMul"): _read_fused_matmul,
    (MICROSOFT, "FusedGemm"): _read_fused_gemm,
}
