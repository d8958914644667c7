"""Finds the linear layers of a model: a product with a constant weight, its bias and its activation function."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.activations import find_activation
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder, FoldedConstant, NotConstant
from sparamx_onnx.graph_passes.plan import Action, NodePlan, Reason
from sparamx_onnx.ops import packing
from sparamx_onnx.ops.definitions import DOMAIN, SPARSE_AMX_MATMUL, Epilogue
from sparamx_onnx.ops.errors import SparamxError


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
class LinearLayer:
    """``output = epilogue(x W + bias)``, as it stands in a graph.

    Attributes:
        node: The MatMul or Gemm.
        nodes: All nodes that the layer is spelled with, in graph order, ``node`` first.
        x: The activations [..., K].
        weight: The weight as it is multiplied, [K, N].
        scale: A factor of the weight (Gemm's alpha).
        bias: The bias, or None.
        epilogue: The activation function.
        output: The result [..., N].
    """

    node: ir.Node
    nodes: tuple[ir.Node, ...]
    x: ir.Value
    weight: FoldedConstant
    scale: float
    bias: Bias | None
    epilogue: Epilogue
    output: ir.Value

    @property
    def k(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def n(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def last(self) -> ir.Node:
        """The node that computes the result."""
        return self.nodes[-1]


@dataclass
class Found:
    """A node that multiplies matrices.

    Attributes:
        plan: What is known of it; its action is ``left_alone`` exactly where there is no layer.
        layer: The linear layer, if it is one.
    """

    plan: NodePlan
    layer: LinearLayer | None = None


# Operators beside MatMul and Gemm that may hold a weight, and the inputs where it is. They are only reported.
_RELATIVES: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("", "MatMulInteger"): (1,),
    ("", "QLinearMatMul"): (3,),
    ("", "Einsum"): (0, 1),
    ("com.microsoft", "Attention"): (1,),
    ("com.microsoft", "DynamicQuantizeMatMul"): (1,),
    ("com.microsoft", "FusedGemm"): (1,),
    ("com.microsoft", "FusedMatMul"): (1,),
    ("com.microsoft", "GemmFastGelu"): (1,),
    ("com.microsoft", "GemmFloat8"): (1,),
    ("com.microsoft", "MatMulBnb4"): (1,),
    ("com.microsoft", "MatMulFpQ4"): (1,),
    ("com.microsoft", "MatMulInteger16"): (1,),
    ("com.microsoft", "MatMulIntegerToFloat"): (1,),
    ("com.microsoft", "MatMulNBits"): (1,),
    ("com.microsoft", "MoE"): (2,),
    ("com.microsoft", "QAttention"): (1,),
    ("com.microsoft", "QGemm"): (3,),
    ("com.microsoft", "QMoE"): (2,),
}

_QUANTIZED_RELATIVES = frozenset(
    {
        "MatMulInteger",
        "QLinearMatMul",
        "DynamicQuantizeMatMul",
        "GemmFloat8",
        "MatMulBnb4",
        "MatMulFpQ4",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QMoE",
    }
)


class LinearLayerFinder:
    """Finds every MatMul, Gemm and relative of a model, and says of each whether it is a linear layer or why not.

    Rules for MatMul(X, W) and Gemm(X, W, C) in the main graph:

    1. W is a constant of two dimensions and not empty; Identity, Transpose and Cast of it are folded. A W that is also
       a graph input, is quantized, or is computed from constants in another way is refused.
    2. X is not a constant, and X and W are float32 where they are multiplied. float16 and bfloat16 weights behind a
       Cast to float32 are taken; float16 activations are refused.
    3. Gemm: transB is folded, alpha becomes a factor of the weight and beta one of C; transA is refused, and so is a C
       that is not a constant scalar or a constant vector of N elements.
    4. A MatMul, or a Gemm without C, takes an Add of a constant vector of N elements, or of one element, as its bias:
       where the Add is the only user of the product, adds no dimensions, and the product is no graph output.
    5. The activation function that alone uses the result is taken too (see ``activations.find_activation``).
    6. In the body of an If, Loop or Scan the same rules hold, but only for a weight that belongs to that body:
       ONNX Runtime does not treat an outer weight as constant there. In a model-local function every node is refused.

    Other operators that hold a weight are reported as left alone; those that hold none are not reported.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._folder = ConstantFolder(model)

    def find(self) -> Iterator[Found]:
        """Every node that multiplies matrices, in graph order; bodies after the node that holds them."""
        yield from self._find_in(self._model.graph, None)
        for function in self._model.functions.values():
            for node in ir.traversal.RecursiveGraphIterator(function):
                if _is_product(node):
                    plan = _left_alone(node, Reason.IN_FUNCTION)
                    plan.graph = function.name
                    yield Found(plan)

    def _find_in(self, graph: ir.Graph, holder: str | None) -> Iterator[Found]:
        for node in graph:
            found = self._examine(node)
            if found is not None:
                found.plan.graph = holder
                yield found
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    yield from self._find_in(attribute.as_graph(), node.name)
                elif attribute.type == ir.AttributeType.GRAPHS:
                    for body in attribute.as_graphs():
                        yield from self._find_in(body, node.name)

    def _examine(self, node: ir.Node) -> Found | None:
        if node.domain == DOMAIN and node.op_type == SPARSE_AMX_MATMUL.name:
            return Found(self._describe_converted(node))
        if _is_product(node):
            try:
                found = self._examine_product(node)
            except TypeError as error:  # an attribute of another type than the operator's
                found = NotConstant(Reason.MALFORMED_NODE, f"{error}.")
            return Found(_left_alone(node, found.reason, found.detail)) if isinstance(found, NotConstant) else found
        inputs = _RELATIVES.get((node.domain, node.op_type))
        if inputs is None:
            return None
        for index in inputs:
            weight = node.inputs[index] if index < len(node.inputs) else None
            folded = None if weight is None else self._folder.fold(weight)
            if isinstance(folded, FoldedConstant) and len(folded.shape) >= 2:
                quantized = node.op_type in _QUANTIZED_RELATIVES
                plan = _left_alone(node, Reason.QUANTIZED_WEIGHT if quantized else Reason.UNSUPPORTED_OPERATOR)
                plan.weight = folded.name
                plan.bytes_before = folded.tensor.nbytes
                return Found(plan)
        return None

    def _describe_converted(self, node: ir.Node) -> NodePlan:
        plan = _left_alone(node, Reason.ALREADY_CONVERTED)
        plan.bias = len(node.inputs) > 2
        epilogue = node.attributes.get("epilogue")
        if epilogue is not None:
            plan.epilogue = epilogue.as_string()
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        folded = NotConstant(Reason.WEIGHT_NOT_CONSTANT) if weight is None else self._folder.fold(weight)
        if isinstance(folded, NotConstant):
            plan.detail = "Its packed weight is not a constant."
            return plan
        plan.weight = plan.packed = folded.name
        plan.bytes_after = folded.tensor.nbytes
        try:
            info = packing.describe(np.asarray(folded.numpy(), np.uint8))
        except SparamxError as error:
            plan.detail = f"Its packed weight cannot be read: {error}"
        else:
            plan.k, plan.n, plan.nnz, plan.weight_type = info.k, info.n, info.nnz, info.weight_type.value
            plan.group_size = info.group_size or None
        return plan

    def _examine_product(self, node: ir.Node) -> Found | NotConstant:
        is_gemm = node.op_type == "Gemm"
        x, w = (node.inputs[index] if index < len(node.inputs) else None for index in (0, 1))
        if x is None or w is None or len(node.outputs) != 1:
            return NotConstant(Reason.MALFORMED_NODE, "An input or the output is missing.")
        weight = self._folder.fold(w)
        left = self._folder.fold(x)
        if isinstance(weight, NotConstant):
            if isinstance(left, FoldedConstant) and weight.reason is Reason.TWO_ACTIVATIONS:
                return NotConstant(Reason.WEIGHT_ON_LEFT, f"It is '{left.name}'.")
            return weight
        plan = _left_alone(node, Reason.CONVERTED)
        plan.weight = weight.name
        plan.bytes_before = weight.tensor.nbytes
        refusal = self._weight_refusal(node, x, weight, left)
        if refusal is not None:
            plan.reason, plan.detail = refusal.reason, refusal.detail
            return Found(plan)
        scale = 1.0
        bias: Bias | None = None
        if is_gemm:
            if _int_attribute(node, "transB", 0):
                weight = weight.transposed()
            scale = _float_attribute(node, "alpha", 1.0)
            plan.k, plan.n = weight.shape
            c = node.inputs[2] if len(node.inputs) > 2 else None
            beta = _float_attribute(node, "beta", 1.0)
            if c is not None and beta != 0.0:
                constant = self._vector(c, plan.n, rank=2)
                if constant is None:
                    plan.reason = Reason.UNSUPPORTED_BIAS
                    return Found(plan)
                bias = Bias(constant, beta)
            if _int_attribute(node, "transA", 0):
                plan.reason, plan.detail = Reason.UNSUPPORTED_ATTRIBUTES, "It has transA = 1."
                return Found(plan)
        plan.k, plan.n = weight.shape
        if x.shape is not None and len(x.shape) > 0 and isinstance(x.shape[-1], int) and x.shape[-1] != plan.k:
            plan.reason = Reason.MALFORMED_NODE
            plan.detail = f"The activations end in {x.shape[-1]}, the weight has {plan.k} rows."
            return Found(plan)
        layer = self._absorb(node, x, weight, scale, bias)
        plan.action = Action.CONVERTED
        plan.bias = layer.bias is not None
        plan.epilogue = layer.epilogue.value
        plan.absorbed = tuple(other.name or "" for other in layer.nodes[1:])
        return Found(plan, layer)

    def _weight_refusal(
        self, node: ir.Node, x: ir.Value, weight: FoldedConstant, left: FoldedConstant | NotConstant
    ) -> NotConstant | None:
        """Why a constant weight cannot be packed, or None."""
        if isinstance(left, FoldedConstant):
            return NotConstant(Reason.CONSTANT_EXPRESSION)
        if weight.root.graph is not node.graph:
            return NotConstant(Reason.IN_SUBGRAPH)
        if len(weight.shape) != 2:
            return NotConstant(Reason.WEIGHT_NOT_2D, f"Its shape is {list(weight.shape)}.")
        if math.prod(weight.shape) == 0:
            return NotConstant(Reason.EMPTY_WEIGHT, f"Its shape is {list(weight.shape)}.")
        dtype = weight.dtype if weight.dtype != ir.DataType.FLOAT else x.dtype
        if dtype not in (None, ir.DataType.FLOAT):
            return NotConstant(Reason.UNSUPPORTED_DTYPE, f"They are {dtype.name}.")
        return None

    def _vector(self, value: ir.Value, n: int, rank: int | None) -> FoldedConstant | None:
        """The constant, if it adds one number per output and no dimensions to a result of so many dimensions."""
        constant = self._folder.fold(value)
        if isinstance(constant, NotConstant) or constant.dtype != ir.DataType.FLOAT:
            return None
        if len(constant.shape) > (1 if rank is None else rank):
            return None
        if constant.shape and (constant.shape[-1] not in (1, n) or math.prod(constant.shape[:-1]) != 1):
            return None
        return constant

    def _absorb(
        self, node: ir.Node, x: ir.Value, weight: FoldedConstant, scale: float, bias: Bias | None
    ) -> LinearLayer:
        nodes = [node]
        output = node.outputs[0]
        if bias is None:
            add = _only_user(output)
            if add is not None and add.op_type == "Add" and add.domain == "" and len(add.inputs) == 2:
                other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
                rank = 2 if node.op_type == "Gemm" else None if x.shape is None else len(x.shape)
                constant = None if other is None else self._vector(other, weight.shape[1], rank)
                if constant is not None:
                    bias = Bias(constant)
                    nodes.append(add)
                    output = add.outputs[0]
        epilogue = Epilogue.NONE
        activation = find_activation(output, self._folder)
        if activation is not None:
            epilogue = activation.epilogue
            nodes.extend(activation.nodes)
            output = activation.output
        return LinearLayer(node, tuple(nodes), x, weight, scale, bias, epilogue, output)


def _is_product(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in ("MatMul", "Gemm")


def _left_alone(node: ir.Node, reason: Reason, detail: str = "") -> NodePlan:
    op_type = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return NodePlan(node.name or "", op_type, Action.LEFT_ALONE, reason, detail, scope=scope_of(node))


def _only_user(value: ir.Value) -> ir.Node | None:
    """The one node of the same graph that uses a value, if nothing else does."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    (use,) = uses
    return use.node if use.node.graph is value.graph else None


def _int_attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _float_attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def scope_of(node: ir.Node) -> str | None:
    """The module that a node was exported from, e.g. ``encoder.layer.0.attention.self.query``, if that is recorded.

    torch's exporter records the scopes in the metadata; the older TorchScript exporter, and the builder of
    onnxruntime-genai, write them into the node's name as ``/encoder/layer.0/.../MatMul``.
    """
    recorded = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if recorded:
        try:
            scopes = ast.literal_eval(recorded)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            scopes = None
        # From the outermost module, which has no name, to the node itself.
        if isinstance(scopes, list) and len(scopes) >= 2 and isinstance(scopes[-2], str) and scopes[-2]:
            return scopes[-2]
    name = node.name or ""
    if name.startswith("/") and name.count("/") >= 2:
        return name[1:].rpartition("/")[0].replace("/", ".")
    return None
