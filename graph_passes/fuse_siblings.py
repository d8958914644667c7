"""Makes one operator of sparse operators that share their input: query, key and value; gate and up projection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from sparamx_onnx.graph_passes.packed_weight import PackedSiblings, PackedWeight
from sparamx_onnx.graph_passes.rewrite_matmul import SUFFIX, Chosen, Names, register_initializer, remove_unused
from sparamx_onnx.ops.definitions import DOMAIN, SPARSE_AMX_MATMUL, SPLIT_MULTIPLE, Epilogue
from sparamx_onnx.ops.packing import WeightType

# Between the siblings for which fusing was measured to be faster, and those for which it made no difference.
_MOST_OUTPUTS_PER_INPUT = 4
# The same for int4 weights, which take so little time that the work around a product can be seen of larger ones.
_MOST_INT4_WEIGHTS = 1 << 26


class FuseSiblings(StrEnum):
    """When siblings become one operator: where that was measured to be faster, always, or never."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True)
class _Sibling:
    """An operator that may be fused, its place in the graph, the layer it was made of, and its weight."""

    node: ir.Node
    place: int
    chosen: Chosen
    weight: PackedWeight

    @property
    def n(self) -> int:
        return self.chosen.layer.n

    @property
    def bias(self) -> ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None


class FuseSiblingsPass(ir.passes.InPlacePass):
    """Fuses operators that ``RewriteMatMulPass`` has made of the chosen layers.

    Rules:

    1. Siblings multiply the same value of the same graph, by weights that are packed and pruned with the same options.
       A weight that several layers share is packed once: these stay as they are.
    2. All but one of the siblings have a multiple of 16 outputs; that one comes last. Further ones stay as they are.
    3. The fused operator stands where the first of them stood, for it needs nothing but their common input and
       constants. It is named after all of them and keeps the metadata that they agree on. Its outputs are theirs.
    4. Its packed weight holds theirs side by side, in the order of the outputs. Their biases become one vector, with
       zeros for a sibling that has none; if none has one, there is none.
    5. ``auto`` leaves alone what ``_is_faster`` does not name.
    """

    def __init__(self, chosen: Sequence[Chosen], when: FuseSiblings) -> None:
        super().__init__()
        self._chosen = chosen
        self._when = when

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model in place; the plans of the layers name the fused operator."""
        if self._when is FuseSiblings.NEVER:
            return ir.passes.PassResult(model, modified=False)
        names = Names(model)
        families = list(self._families(model))
        for family in families:
            _fuse(model, family, names)
        return ir.passes.PassResult(model, modified=bool(families))

    def _families(self, model: ir.Model) -> Iterator[list[_Sibling]]:
        """Siblings that are to be fused, in the order of their outputs."""
        families: dict[object, list[_Sibling]] = {}
        for sibling in self._siblings(model):
            options, pruning = sibling.chosen.options, sibling.chosen.prune_key
            key = (id(sibling.node.graph), id(sibling.node.inputs[0]), options, pruning)
            families.setdefault(key, []).append(sibling)
        for family in families.values():
            whole = [sibling for sibling in family if sibling.n % SPLIT_MULTIPLE == 0]
            others = [sibling for sibling in family if sibling.n % SPLIT_MULTIPLE != 0]
            family = whole + others[:1]
            wanted = self._when is FuseSiblings.ALWAYS or _is_faster(family)
            if wanted and len(family) > 1:
                yield family

    def _siblings(self, model: ir.Model) -> Iterator[_Sibling]:
        layers = {chosen.plan.packed: chosen for chosen in self._chosen}
        shared = Counter(chosen.plan.shared for chosen in self._chosen)
        for place, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph)):
            if (node.domain, node.op_type) != (DOMAIN, SPARSE_AMX_MATMUL.name) or len(node.outputs) != 1:
                continue
            packed = node.inputs[1] if len(node.inputs) > 1 else None
            if packed is None or not isinstance(packed.const_value, PackedWeight):
                continue
            chosen = layers[packed.name]
            if shared[chosen.plan.shared] == 1:
                yield _Sibling(node, place, chosen, packed.const_value)


def _is_faster(family: Sequence[_Sibling]) -> bool:
    """Whether fusing these layers is faster, by the measurements in docs/performance.md.

    What is saved, sharing out work and packing the input, grows with K; the products grow with K times N. Where all
    siblings together have many outputs for an input, as gate and up projections do, nothing can be seen of it, but with
    int4 weights in smaller models.
    """
    k, n = family[0].chosen.layer.k, sum(sibling.n for sibling in family)
    is_small = family[0].chosen.options.weight_type is WeightType.INT4 and k * n <= _MOST_INT4_WEIGHTS
    return is_small or n <= _MOST_OUTPUTS_PER_INPUT * k


def _fuse(model: ir.Model, family: Sequence[_Sibling], names: Names) -> None:
    graph = family[0].node.graph
    assert isinstance(graph, ir.Graph)
    weight = _joined_weight(model, graph, family, names)
    node = _fused_node(model, graph, family, weight, names)
    for sibling in family:
        sibling.chosen.plan.packed, sibling.chosen.plan.fused = weight.name, node.name
    freed = [value for sibling in family for value in sibling.node.inputs[1:] if value is not None]
    old = [sibling.node for sibling in family]
    first = min(family, key=lambda sibling: sibling.place).node
    ir.convenience.replace_nodes_and_values(graph, first, old, [node], [o.outputs[0] for o in old], node.outputs)
    remove_unused(model, freed)


def _joined_weight(model: ir.Model, graph: ir.Graph, family: Sequence[_Sibling], names: Names) -> ir.Value:
    name = names.unused("+".join(sibling.weight.weight.name for sibling in family) + SUFFIX)
    tensor = PackedSiblings(name, [sibling.weight for sibling in family])
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), const_value=tensor)
    register_initializer(model, graph, value)
    return value


def _fused_node(
    model: ir.Model, graph: ir.Graph, family: Sequence[_Sibling], weight: ir.Value, names: Names
) -> ir.Node:
    inputs = [family[0].node.inputs[0], weight]
    if any(sibling.bias is not None for sibling in family):
        inputs.append(_joined_bias(model, graph, family, names))
    widths = [sibling.n for sibling in family]
    attributes = [
        ir.AttrInt64("K", family[0].chosen.layer.k),
        ir.AttrInt64("N", sum(widths)),
        ir.AttrInt64s("splits", widths),
    ]
    epilogues = [sibling.chosen.layer.epilogue for sibling in family]
    if set(epilogues) != {Epilogue.NONE}:
        attributes.append(ir.AttrString("epilogue", ",".join(epilogue.value for epilogue in epilogues)))
    outputs = [
        ir.Value(name=old.name, doc_string=old.doc_string, metadata_props=dict(old.metadata_props))
        for old in (sibling.node.outputs[0] for sibling in family)
    ]
    metadata = [sibling.node.metadata_props for sibling in family]
    return ir.Node(
        DOMAIN,
        SPARSE_AMX_MATMUL.name,
        inputs,
        attributes,
        outputs=outputs,
        name="+".join(sibling.node.name or "" for sibling in family),
        metadata_props={
            key: value for key, value in metadata[0].items() if all(other.get(key) == value for other in metadata)
        },
    )


def _joined_bias(model: ir.Model, graph: ir.Graph, family: Sequence[_Sibling], names: Names) -> ir.Value:
    dtype = family[0].chosen.layer.dtype
    vector = np.zeros(sum(sibling.n for sibling in family), dtype.numpy())
    parts = []
    column = 0
    for sibling in family:
        if sibling.bias is not None:
            tensor = ir.convenience.get_const_tensor(sibling.bias)
            assert tensor is not None  # only constants become biases
            vector[column : column + sibling.n] = tensor.numpy()
            # An initializer that the conversion has added ends in its suffix already.
            parts.append((sibling.bias.name or "").removesuffix(SUFFIX))
        column += sibling.n
    name = names.unused("+".join(parts) + SUFFIX)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(vector.shape))
    value.const_value = ir.Tensor(vector, name=name)
    register_initializer(model, graph, value)
    return value
