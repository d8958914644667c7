"""Finds the linear layers of a model: a product with a constant weight, its bias and its activation function."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparamx_onnx.graph_passes.activations import find_activation
from sparamx_onnx.graph_passes.attributes import MalformedAttributeError, string_attribute
from sparamx_onnx.graph_passes.dequantize import CODE_BITS
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder, FoldedConstant, NotConstant
from sparamx_onnx.graph_passes.packed_attention import read_attention
from sparamx_onnx.graph_passes.plan import Action, NodePlan, Reason
from sparamx_onnx.graph_passes.products import (
    FLOAT_READERS,
    MICROSOFT,
    Bias,
    NewNodes,
    Product,
    Reader,
    RefusedError,
    constant_vector,
    only_user,
)
from sparamx_onnx.graph_passes.quantized_products import QUANTIZED_READERS, has_static_scale
from sparamx_onnx.ops import packing
from sparamx_onnx.ops.definitions import DOMAIN, SPARSE_AMX_MATMUL, Epilogue
from sparamx_onnx.ops.errors import SparamxError


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
        before: What has to be computed from x before it is multiplied, or None.
        after: What remains to be computed from the product to get the result, or None.
        static: Whether the activations were quantized with a scale of their own, which int8 and int4 weights, whose
            activations are quantized anew, would not keep.
    """

    node: ir.Node
    nodes: tuple[ir.Node, ...]
    x: ir.Value
    weight: FoldedConstant
    scale: float
    bias: Bias | None
    epilogue: Epilogue
    output: ir.Value
    before: NewNodes | None = None
    after: NewNodes | None = None
    static: bool = False

    @property
    def k(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def n(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    @property
    def dtype(self) -> ir.DataType:
        """The type of activations, bias and result: float32 or float16."""
        is_half = self.weight.dtype == ir.DataType.FLOAT16 and self.before is None
        return ir.DataType.FLOAT16 if is_half else ir.DataType.FLOAT

    @property
    def last(self) -> ir.Node:
        """The node that computes the result."""
        return self.nodes[-1]


@dataclass
class Found:
    """A node that multiplies matrices.

    Attributes:
        node: The node.
        plan: What is known of it; its action is ``left_alone`` exactly where there is no layer.
        layer: The linear layer, if it is one.
    """

    node: ir.Node
    plan: NodePlan
    layer: LinearLayer | None = None


# How every operator that may hold a weight is read.
_READERS: Mapping[tuple[str, str], Reader] = {
    **FLOAT_READERS,
    **QUANTIZED_READERS,
    (MICROSOFT, "Attention"): read_attention,
}

# Others that may hold a weight, and the input where it is. They are only reported.
_RELATIVES: Mapping[tuple[str, str], int] = {
    (MICROSOFT, "GemmFastGelu"): 1,
    (MICROSOFT, "GemmFloat8"): 1,
    (MICROSOFT, "MatMulBnb4"): 1,
    (MICROSOFT, "MatMulFpQ4"): 1,
    (MICROSOFT, "MatMulInteger16"): 1,
    (MICROSOFT, "MoE"): 2,
    (MICROSOFT, "QAttention"): 1,
    (MICROSOFT, "QMoE"): 2,
}

_QUANTIZED_RELATIVES = frozenset({"GemmFloat8", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger16", "QAttention", "QMoE"})

_BODY_INITIALIZERS_SINCE_IR = 4


class LinearLayerFinder:
    """Finds every MatMul, Gemm and relative of a model, and says of each whether it is a linear layer or why not.

    Rules for the operators that ``products``, ``quantized_products`` and ``packed_attention`` read:

    1. W is a constant of two dimensions and not empty; Identity, Transpose, Cast and DequantizeLinear of it are folded.
       A W that is also a graph input, or is computed from constants in another way, is refused.
    2. X is not a constant, and X and W are both float32, or both float16, where they are multiplied. float16 and
       bfloat16 weights behind a Cast to float32 are taken; other operators than MatMul, Gemm, Einsum, FusedMatMul,
       FusedGemm and MatMulNBits are taken in float32 alone.
    3. Factors of the product become factors of the weight. A transposed X is refused. A third input of Gemm that is
       not a constant of one element or of N elements is added to the product; such biases of others are refused.
    4. A product without a bias takes an Add of a constant vector of N elements, or of one element, as its bias: where
       the Add is the only user of the product, adds no dimensions, and the product is no graph output.
    5. The activation function that alone uses the result is taken too (see ``activations.find_activation``).
    6. In the body of an If, Loop or Scan the same rules hold, for weights of the body and for those of the graphs
       around it. In a model-local function every node is refused; ``inline_functions`` comes before.

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
                    yield Found(node, plan)

    def _find_in(self, graph: ir.Graph, holder: str | None) -> Iterator[Found]:
        for node in graph:
            found = self._examine(node)
            if found is not None:
                found.plan.graph = holder
                yield found
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    yield from self._find_in(attribute.as_graph(), node.name)

    def _examine(self, node: ir.Node) -> Found | None:
        operator = (node.domain, node.op_type)
        try:
            if operator == (DOMAIN, SPARSE_AMX_MATMUL.name):
                return Found(node, self._describe_converted(node))
            if operator in _READERS:
                product = _READERS[operator](node, self._folder)
                return None if product is None else self._judge(node, product)
            return self._describe_relative(node) if operator in _RELATIVES else None
        except RefusedError as refused:
            return self._judge(node, refused)
        except MalformedAttributeError as error:  # of this node, or of one around it
            return self._judge(node, RefusedError(Reason.MALFORMED_NODE, str(error)))

    def _describe_relative(self, node: ir.Node) -> Found | None:
        index = _RELATIVES[node.domain, node.op_type]
        weight = node.inputs[index] if index < len(node.inputs) else None
        folded = None if weight is None else self._folder.fold(weight)
        if not isinstance(folded, FoldedConstant):
            return None
        quantized = node.op_type in _QUANTIZED_RELATIVES
        plan = _left_alone(node, Reason.QUANTIZED_WEIGHT if quantized else Reason.UNSUPPORTED_OPERATOR)
        plan.weight = folded.name
        plan.bytes_before = folded.nbytes
        return Found(node, plan)

    def _describe_converted(self, node: ir.Node) -> NodePlan:
        plan = _left_alone(node, Reason.ALREADY_CONVERTED)
        plan.bias = len(node.inputs) > 2
        plan.epilogue = string_attribute(node, "epilogue", plan.epilogue)
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
            plan.group_size, plan.form = info.group_size or None, info.form.value
        return plan

    def _judge(self, node: ir.Node, product: Product | RefusedError) -> Found:
        """What becomes of a product that was read, or of what was read of it."""
        weight = product.weight
        plan = _left_alone(node, Reason.CONVERTED)
        if weight is not None:
            plan.weight = weight.name
            plan.bytes_before = weight.nbytes
            if len(weight.shape) == 2:
                plan.k, plan.n = weight.shape
        refusal = self._refusal(node, product)
        if refusal is not None:
            plan.reason, plan.detail = refusal.reason, refusal.detail
            return Found(node, plan)
        assert not isinstance(product, RefusedError)
        x = product.x
        if x.shape is not None and len(x.shape) > 0 and isinstance(x.shape[-1], int) and x.shape[-1] != plan.k:
            plan.reason = Reason.MALFORMED_NODE
            plan.detail = f"The activations end in {x.shape[-1]}, the weight has {plan.k} rows."
            return Found(node, plan)
        layer = self._absorb(product)
        plan.action = Action.CONVERTED
        plan.bias = layer.bias is not None
        plan.epilogue = layer.epilogue.value
        plan.absorbed = tuple(other.name or "" for other in layer.nodes[1:])
        return Found(node, plan, layer)

    def _refusal(self, node: ir.Node, product: Product | RefusedError) -> NotConstant | None:
        """Why a product cannot be packed, or None."""
        is_old = (self._model.ir_version or _BODY_INITIALIZERS_SINCE_IR) < _BODY_INITIALIZERS_SINCE_IR
        weight = product.weight
        if isinstance(product, RefusedError):
            x = next((value for value in node.inputs if value is not None), None)
            # That its type is none of ours is the first thing to know of an operator that takes floats.
            wrong_type = None if weight is None or weight.dtype in CODE_BITS else _type_refusal(x, weight)
            is_constant = product.reason is Reason.CONSTANT_EXPRESSION
            return NotConstant(product.reason, product.detail) if wrong_type is None or is_constant else wrong_type
        assert weight is not None
        if is_old and node.graph is not self._model.graph:
            return NotConstant(Reason.IN_SUBGRAPH)
        if len(weight.shape) != 2:
            return NotConstant(Reason.WEIGHT_NOT_2D, f"Its shape is {list(weight.shape)}.")
        if math.prod(weight.shape) == 0:
            return NotConstant(Reason.EMPTY_WEIGHT, f"Its shape is {list(weight.shape)}.")
        if _takes_halves(product) and product.x.dtype in (None, ir.DataType.FLOAT16):
            return None
        return _type_refusal(product.x if product.before is None else None, weight)

    def _absorb(self, product: Product) -> LinearLayer:
        nodes, output, bias = list(product.nodes), product.output, product.bias
        if product.takes_add and product.after is None:
            add = only_user(output)
            if add is not None and add.op_type == "Add" and add.domain == "" and len(add.inputs) == 2:
                other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
                x_rank = None if product.x.shape is None else len(product.x.shape)
                rank = x_rank if product.rank is None else product.rank
                dtype = product.weight.dtype if _takes_halves(product) else ir.DataType.FLOAT
                constant = constant_vector(other, product.weight.shape[1], self._folder, rank, dtype)
                if constant is not None:
                    bias = Bias(constant)
                    nodes.append(add)
                    output = add.outputs[0]
        epilogue = Epilogue.NONE
        activation = find_activation(output, self._folder) if product.after is None else None
        if activation is not None:
            epilogue = activation.epilogue
            nodes.extend(activation.nodes)
            output = activation.output
        return LinearLayer(
            node=product.nodes[0],
            nodes=tuple(nodes),
            x=product.x,
            weight=product.weight,
            scale=product.scale,
            bias=bias,
            epilogue=epilogue,
            output=output,
            before=product.before,
            after=product.after,
            static=product.before is not None or has_static_scale(product.x),
        )


def _is_product(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in _READERS


def holds_products(function: ir.Function) -> bool:
    """Whether a function multiplies matrices."""
    return any(_is_product(node) for node in ir.traversal.RecursiveGraphIterator(function))


def _takes_halves(product: Product) -> bool:
    """Whether a product is one of float16 numbers, with nothing before it."""
    operator = (product.nodes[0].domain, product.nodes[0].op_type)
    takes_any = operator in FLOAT_READERS or operator == (MICROSOFT, "MatMulNBits")
    return takes_any and product.weight.dtype == ir.DataType.FLOAT16 and product.before is None


def _type_refusal(x: ir.Value | None, weight: FoldedConstant) -> NotConstant | None:
    """The reason where floats are not float32. x is None where it has no floats to look at."""
    dtype = weight.dtype if weight.dtype != ir.DataType.FLOAT or x is None else x.dtype
    if dtype in (None, ir.DataType.FLOAT):
        return None
    return NotConstant(Reason.UNSUPPORTED_DTYPE, f"They are {dtype.name}.")


def _left_alone(node: ir.Node, reason: Reason, detail: str = "") -> NodePlan:
    op_type = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return NodePlan(node.name or "", op_type, Action.LEFT_ALONE, reason, detail, scope=scope_of(node))


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
