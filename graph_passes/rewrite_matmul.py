"""Replaces linear layers by SparseAMXMatMul nodes whose weights are packed when they are written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sparamx_onnx.graph_passes.kept_codes import KeptCodes
from sparamx_onnx.graph_passes.linear_layers import LinearLayer
from sparamx_onnx.graph_passes.packed_weight import PackedWeight, Pruner
from sparamx_onnx.graph_passes.plan import NodePlan
from sparamx_onnx.graph_passes.products import Bias, NewNodes
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_MATMUL, Epilogue
from sparamx_onnx.ops.packing import PackedInfo, PackOptions

SUFFIX: Final = ".sparamx"
"""Ends the names of initializers that the conversion adds."""

# The operators between a constant, or the scale of activations, and its use that nobody needs once the use is gone.
_REMOVABLE = frozenset(
    {"Constant", "Identity", "Transpose", "Cast", "DequantizeLinear", "DynamicQuantizeLinear", "Mul"}
)

_EXTERNAL_INITIALIZERS_SINCE_IR = 4


@dataclass(frozen=True)
class Chosen:
    """A layer to convert.

    Attributes:
        layer: The layer.
        plan: Its plan; completed when the weight is packed.
        options: How to pack the weight.
        prune: Prunes the weight, or None.
        prune_key: What distinguishes the pruning from others; layers that share a weight share the packed one only if
            this is equal.
        codes: The codes and scales to keep of a weight that is quantized already; None to pack its values.
    """

    layer: LinearLayer
    plan: NodePlan
    options: PackOptions
    prune: Pruner | None = None
    prune_key: Hashable = None
    codes: KeptCodes | None = None

    @property
    def weight_key(self) -> Hashable:
        """Equal for layers that can share a packed weight."""
        weight = self.layer.weight
        return (id(weight.root), weight.steps, self.layer.scale, self.options, self.prune_key, self.codes is None)

    def packed_weight(self, name: str) -> PackedWeight:
        """The packed weight of the layer."""
        layer = self.layer
        return PackedWeight(name, layer.weight, self.options, scale=layer.scale, prune=self.prune, codes=self.codes)


class RewriteMatMulPass(ir.passes.InPlacePass):
    """Replaces the chosen linear layers.

    Rules:

    1. One SparseAMXMatMul takes the place of all nodes of a layer, where the last of them stood. It has the name, the
       documentation and the metadata of the MatMul or Gemm, and its output keeps the name, type and shape of the
       layer's result.
    2. The packed weight becomes an initializer of the graph that the node is in, named after the weight. Layers that
       multiply by the same weight in the same way share it. In the body of an If, Loop or Scan it is an initializer of
       that body, even if the dense weight was outside: ONNX Runtime up to 1.28 does not treat an outer one as constant.
       Bodies that use the same weight have one initializer each, with the same bytes in the file.
    3. A bias that is a vector with one element per output is used as it is; any other becomes a new initializer.
    4. What has to be computed before or after the product (the dequantization of activations, the attention behind a
       packed projection) becomes nodes around it.
    5. The dense weight, and the nodes between it and its use, are removed when nobody else uses them.
    6. The operators' domain is imported when a layer has been replaced; nothing else of the model is touched.
    """

    def __init__(self, chosen: Sequence[Chosen]) -> None:
        super().__init__()
        self._chosen = chosen

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model in place."""
        names = Names(model)
        packed: dict[Hashable, PackedWeight] = {}
        holders: dict[tuple[Hashable, int], ir.Value] = {}
        replaced: dict[ir.Value, ir.Value] = {}
        candidates: list[ir.Value] = []
        for chosen in self._chosen:
            weight = packed.get(chosen.weight_key)
            place = (chosen.weight_key, id(chosen.layer.node.graph))
            if place not in holders:
                name = names.unused(f"{chosen.layer.weight.name}{SUFFIX}")
                weight = weight or chosen.packed_weight(name)
                packed[chosen.weight_key] = weight
                holders[place] = _add_packed_weight(model, chosen.layer.node.graph, name, weight)
            assert weight is not None
            weight.when_packed(_record_in(chosen.plan, weight))
            chosen.plan.packed = holders[place].name
            chosen.plan.shared = weight.name
            candidates.extend(_replace(model, chosen.layer, holders[place], names, replaced))
        remove_unused(model, candidates)
        for chosen in self._chosen:
            chosen.plan.keeps_dense = chosen.layer.weight.root.graph is not None
        if self._chosen:
            model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=bool(self._chosen))


def _add_packed_weight(model: ir.Model, graph: object, name: str, weight: PackedWeight) -> ir.Value:
    assert isinstance(graph, ir.Graph)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), const_value=weight)
    register_initializer(model, graph, value)
    return value


def _record_in(plan: NodePlan, weight: PackedWeight) -> Callable[[PackedInfo], None]:
    def record(info: PackedInfo) -> None:
        plan.nnz_before = weight.source_nnz
        plan.nnz = info.nnz
        plan.bytes_after = info.blob_bytes
        plan.packed_as(info.form)

    return record


class Names:
    """The names of all values of a model, of all graphs: a body must not shadow a name of the graph around it."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str] = set()
        for graph in model.graphs():
            self._used.update(value.name for value in graph.inputs if value.name)
            self._used.update(graph.initializers)
            for node in graph:
                self._used.update(value.name for value in node.outputs if value.name)

    def unused(self, wanted: str) -> str:
        """The name, or the name with a number, that nothing has yet; taken from now on."""
        name = wanted
        number = 1
        while name in self._used:
            number += 1
            name = f"{wanted}.{number}"
        self._used.add(name)
        return name


def register_initializer(model: ir.Model, graph: ir.Graph, value: ir.Value) -> None:
    """Adds an initializer to a graph of a model."""
    graph.register_initializer(value)
    if _lists_initializers(model):
        graph.inputs.append(value)


def _lists_initializers(model: ir.Model) -> bool:
    """Whether a model is so old that it lists every initializer among the inputs of its graph."""
    return (model.ir_version or _EXTERNAL_INITIALIZERS_SINCE_IR) < _EXTERNAL_INITIALIZERS_SINCE_IR


def _bias_value(model: ir.Model, layer: LinearLayer, bias: Bias, names: Names) -> ir.Value:
    constant = bias.constant
    if not constant.steps and constant.shape == (layer.n,) and bias.scale == 1.0:
        return constant.root
    name = names.unused(f"{constant.name}{SUFFIX}")
    tensor = ir.Tensor(bias.numpy(layer.n).astype(layer.dtype.numpy()), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph = layer.node.graph
    assert isinstance(graph, ir.Graph)
    register_initializer(model, graph, value)
    return value


def _replace(
    model: ir.Model, layer: LinearLayer, packed: ir.Value, names: Names, replaced: dict[ir.Value, ir.Value]
) -> list[ir.Value]:
    """Puts new nodes in the place of a layer's nodes; returns the inputs that may have become unused.

    ``replaced`` tells what stands now for values that were there when the layers were found; it is added to.
    """
    graph = layer.node.graph
    assert isinstance(graph, ir.Graph)
    before = _around(layer.before, replaced.get(layer.x, layer.x), layer, names, replaced)
    inputs = [before[-1].outputs[0] if before else replaced.get(layer.x, layer.x), packed]
    if layer.bias is not None:
        inputs.append(_bias_value(model, layer, layer.bias, names))
    attributes = [ir.AttrInt64("K", layer.k), ir.AttrInt64("N", layer.n)]
    if layer.epilogue is not Epilogue.NONE:
        attributes.append(ir.AttrString("epilogue", layer.epilogue.value))
    node = ir.Node(
        DOMAIN,
        SPARSE_AMX_MATMUL.name,
        inputs,
        attributes,
        name=layer.node.name,
        doc_string=layer.node.doc_string,
        metadata_props=dict(layer.node.metadata_props),
    )
    product = node.outputs[0]
    product.type = ir.TensorType(layer.dtype)
    after = _around(layer.after, product, layer, names, replaced)
    if after:
        product.name = names.unused(f"{layer.node.name}{SUFFIX}")
    old = layer.output
    output = after[-1].outputs[0] if after else product
    output.doc_string = old.doc_string
    output.metadata_props.update(old.metadata_props)
    replaced[old] = output
    freed = [value for old_node in layer.nodes for value in old_node.inputs if value is not None]
    ir.convenience.replace_nodes_and_values(graph, layer.last, layer.nodes, [*before, node, *after], [old], [output])
    return freed


def _around(
    make: NewNodes | None, value: ir.Value, layer: LinearLayer, names: Names, replaced: Mapping[ir.Value, ir.Value]
) -> Sequence[ir.Node]:
    """The nodes before or after a product, with names of their own."""
    nodes = [] if make is None else make(value)
    for node in nodes:
        for index, source in enumerate(node.inputs):
            if source is not None and source in replaced:
                node.replace_input_with(index, replaced[source])
        node.name = f"{layer.node.name}/{node.op_type}"
        for output in node.outputs:
            output.name = names.unused(f"{node.name}{SUFFIX}")
    return nodes


def remove_unused(model: ir.Model, values: Iterable[ir.Value]) -> None:
    """Removes constants that nobody uses, and the nodes that only they led to."""
    stack = list(values)
    while stack:
        value = stack.pop()
        if value.uses() or value.is_graph_output():
            continue
        node = value.producer()
        graph = value.graph
        if value.is_initializer() and isinstance(graph, ir.Graph):
            if value.is_graph_input():
                if not _lists_initializers(model):
                    continue  # the default of an input, which a caller may give whether it is used or not
                graph.inputs.remove(value)
            assert value.name is not None
            graph.initializers.pop(value.name)
        elif node is not None and node.graph is not None and _can_be_removed(node):
            stack.extend(source for source in node.inputs if source is not None)
            node.graph.remove(node, safe=True)


def _can_be_removed(node: ir.Node) -> bool:
    known = node.op_type in _REMOVABLE and node.domain in ("", "com.microsoft")
    return known and not any(output.uses() or output.is_graph_output() for output in node.outputs)
