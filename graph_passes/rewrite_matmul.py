"""Replaces linear layers by SparseAMXMatMul nodes whose weights are packed when they are written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from sparamx_onnx.graph_passes.linear_layers import Bias, LinearLayer
from sparamx_onnx.graph_passes.packed_weight import PackedWeight, Pruner
from sparamx_onnx.graph_passes.plan import Action, NodePlan, Reason
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_MATMUL, Epilogue
from sparamx_onnx.ops.packing import Form, PackedInfo, PackOptions

_SUFFIX = ".sparamx"

# The operators between a constant and its use that nobody needs once the use is gone.
_CONSTANT_OPERATORS = frozenset({"Constant", "Identity", "Transpose", "Cast"})

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
    """

    layer: LinearLayer
    plan: NodePlan
    options: PackOptions
    prune: Pruner | None = None
    prune_key: Hashable = None

    @property
    def weight_key(self) -> Hashable:
        """Equal for layers that can share a packed weight."""
        weight = self.layer.weight
        return (id(weight.root.graph), id(weight.root), weight.steps, self.layer.scale, self.options, self.prune_key)

    def packed_weight(self, name: str) -> PackedWeight:
        """The packed weight of the layer."""
        return PackedWeight(name, self.layer.weight, self.options, scale=self.layer.scale, prune=self.prune)


class RewriteMatMulPass(ir.passes.InPlacePass):
    """Replaces the chosen linear layers.

    Rules:

    1. One SparseAMXMatMul takes the place of all nodes of a layer, where the last of them stood. It has the name, the
       documentation and the metadata of the MatMul or Gemm, and its output keeps the name, type and shape of the
       layer's result.
    2. The packed weight becomes an initializer of the same graph, named after the weight. Layers that multiply by the
       same weight in the same way share it.
    3. A bias that is a float32 vector with one element per output is used as it is; any other becomes a new
       initializer.
    4. The dense weight, and the nodes between it and its use, are removed when nobody else uses them.
    5. The operators' domain is imported when a layer has been replaced; nothing else of the model is touched.
    """

    def __init__(self, chosen: Sequence[Chosen]) -> None:
        super().__init__()
        self._chosen = chosen

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model in place."""
        names = _Names(model)
        packed: dict[Hashable, ir.Value] = {}
        candidates: list[ir.Value] = []
        for chosen in self._chosen:
            value = packed.get(chosen.weight_key)
            if value is None:
                value = self._add_packed_weight(model, chosen, names)
                packed[chosen.weight_key] = value
            assert isinstance(value.const_value, PackedWeight)
            value.const_value.when_packed(_record_in(chosen.plan))
            chosen.plan.packed = value.name
            candidates.extend(_replace(model, chosen.layer, value, names))
        _remove_unused(candidates, model)
        for chosen in self._chosen:
            chosen.plan.keeps_dense = chosen.layer.weight.root.graph is not None
        if self._chosen:
            model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=bool(self._chosen))

    def _add_packed_weight(self, model: ir.Model, chosen: Chosen, names: _Names) -> ir.Value:
        graph = chosen.layer.node.graph
        assert isinstance(graph, ir.Graph)
        name = names.unused(f"{chosen.layer.weight.name}{_SUFFIX}")
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), const_value=chosen.packed_weight(name))
        _register(model, graph, value)
        return value


def _record_in(plan: NodePlan) -> Callable[[PackedInfo], None]:
    def record(info: PackedInfo) -> None:
        plan.nnz = info.nnz
        plan.bytes_after = info.blob_bytes
        plan.action = Action.PACKED_DENSE if info.form is Form.DENSE else Action.CONVERTED
        plan.reason = Reason.PACKED_DENSE if info.form is Form.DENSE else Reason.CONVERTED

    return record


class _Names:
    """The names of all values of a model, of all graphs: a body must not shadow a name of the graph around it."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str] = set()
        for graph in model.graphs():
            self._used.update(value.name for value in graph.inputs if value.name)
            self._used.update(graph.initializers)
            for node in graph:
                self._used.update(value.name for value in node.outputs if value.name)

    def unused(self, wanted: str) -> str:
        name = wanted
        number = 1
        while name in self._used:
            number += 1
            name = f"{wanted}.{number}"
        self._used.add(name)
        return name


def _register(model: ir.Model, graph: ir.Graph, value: ir.Value) -> None:
    graph.register_initializer(value)
    if (model.ir_version or _EXTERNAL_INITIALIZERS_SINCE_IR) < _EXTERNAL_INITIALIZERS_SINCE_IR:
        # Such old models list every initializer among the inputs of its graph.
        graph.inputs.append(value)


def _bias_value(model: ir.Model, layer: LinearLayer, bias: Bias, names: _Names) -> ir.Value:
    constant = bias.constant
    if not constant.steps and constant.shape == (layer.n,) and bias.scale == 1.0:
        return constant.root
    name = names.unused(f"{constant.name}{_SUFFIX}")
    tensor = ir.Tensor(bias.numpy(layer.n), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph = layer.node.graph
    assert isinstance(graph, ir.Graph)
    _register(model, graph, value)
    return value


def _replace(model: ir.Model, layer: LinearLayer, packed: ir.Value, names: _Names) -> list[ir.Value]:
    """Puts one node in the place of a layer's nodes; returns the inputs that may have become unused."""
    graph = layer.node.graph
    assert isinstance(graph, ir.Graph)
    inputs = [layer.x, packed]
    if layer.bias is not None:
        inputs.append(_bias_value(model, layer, layer.bias, names))
    attributes = [ir.AttrInt64("K", layer.k), ir.AttrInt64("N", layer.n)]
    if layer.epilogue is not Epilogue.NONE:
        attributes.append(ir.AttrString("epilogue", layer.epilogue.value))
    old = layer.output
    output = ir.Value(
        name=old.name,
        type=old.type if old.type is not None else ir.TensorType(ir.DataType.FLOAT),
        shape=old.shape,
        doc_string=old.doc_string,
        metadata_props=dict(old.metadata_props),
    )
    node = ir.Node(
        DOMAIN,
        SPARSE_AMX_MATMUL.name,
        inputs,
        attributes,
        outputs=[output],
        name=layer.node.name,
        doc_string=layer.node.doc_string,
        metadata_props=dict(layer.node.metadata_props),
    )
    freed = [value for old_node in layer.nodes for value in old_node.inputs if value is not None]
    ir.convenience.replace_nodes_and_values(graph, layer.last, layer.nodes, [node], [old], [output])
    return freed


def _remove_unused(values: Iterable[ir.Value], model: ir.Model) -> None:
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
                # Only where initializers have to be listed as inputs; others are not constants and were not folded.
                graph.inputs.remove(value)
            assert value.name is not None
            graph.initializers.pop(value.name)
        elif node is not None and node.graph is not None and node.domain == "" and node.op_type in _CONSTANT_OPERATORS:
            stack.extend(source for source in node.inputs if source is not None)
            node.graph.remove(node, safe=True)
