"""Gives attention a packed cache: one input and one output of bytes where the graph had keys and values in floats."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

import onnx_ir as ir

from sparamx_onnx.graph_passes.attention_heads import inputs_by_role, key_size, last_dimension, value_size
from sparamx_onnx.graph_passes.attention_plan import AttentionPlan, AttentionReason
from sparamx_onnx.ops.definitions import DOMAIN, SPARSE_AMX_ATTENTION
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packed_cache import CacheLayout, CacheOptions

CACHES_KEY: Final = "sparamx.caches"
"""Key of the model's metadata under which the packed caches stand, as JSON: a list of ``PackedCache``."""


@dataclass(frozen=True)
class PackedCache:
    """A packed cache of a graph, for whoever must give it and take it.

    Attributes:
        past: Name of the graph's input, uint8 [batch, kv_heads, bytes]; zeros, or no bytes, for no past.
        present: Name of the graph's output, likewise; may be the input's memory.
        kv_heads: Key and value heads.
        key_size: Numbers of a key.
        value_size: Numbers of a value.
        k_sparsity: The part of a packed block of keys that is pruned.
        v_sparsity: Likewise of values.
        sink: First tokens that are not pruned.
        recent: Last tokens that are not pruned.
    """

    past: str
    present: str
    kv_heads: int
    key_size: int
    value_size: int
    k_sparsity: float
    v_sparsity: float
    sink: int
    recent: int

    @property
    def layout(self) -> CacheLayout:
        """The bytes of a row.

        Raises:
            SparamxError: There is no such cache.
        """
        options = CacheOptions(self.k_sparsity, self.v_sparsity, self.sink, self.recent)
        return CacheLayout(options, self.key_size, self.value_size)


class PackCachePass(ir.passes.InPlacePass):
    """Replaces the float caches of SparseAMXAttention by packed ones.

    Rules:

    1. Both pasts are inputs of the graph that nothing else reads, and both presents are outputs of it that nothing else
       reads: the node then reads and writes one cache of bytes in their place.
    2. The sizes of a head must be known: the cache's last dimension, or the query's.
    3. A node that one of these does not hold for keeps its float cache, and its plan says why.
    4. The cache's input and output stand where those of the keys stood, with ``cache`` for ``key`` in their names.
    5. The model's metadata describe every cache under ``sparamx.caches``.
    """

    def __init__(self, options: CacheOptions, plans: list[AttentionPlan]) -> None:
        """What to do.

        Args:
            options: How caches are pruned.
            plans: Those of ``RewriteAttentionPass``; what becomes of a node's cache is written into them.
        """
        super().__init__()
        self._options = options
        ours = (AttentionReason.CONVERTED, AttentionReason.ALREADY_CONVERTED)
        self._plans = [plan for plan in plans if plan.reason in ours]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model in place."""
        caches = []
        nodes = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if _is_ours(node)]
        for node, plan in zip(nodes, self._plans, strict=True):
            if plan.reason is AttentionReason.ALREADY_CONVERTED:
                continue
            found = _read(node, model.graph)
            if isinstance(found, str):
                plan.detail = f"{plan.detail} {found}".lstrip()
                continue
            plan.reason = AttentionReason.PACKED
            caches.append(self._replace(node, found, model.graph))
        if caches:
            model.metadata_props[CACHES_KEY] = json.dumps([asdict(cache) for cache in caches], sort_keys=True)
        return ir.passes.PassResult(model, modified=bool(caches))

    def _replace(self, node: ir.Node, found: _Found, graph: ir.Graph) -> PackedCache:
        """Puts a node with a packed cache in the place of one with a float cache, in the graph's signature too."""
        past_key, past_value = found.inputs["past_key"], found.inputs["past_value"]
        past, present = _bytes_like(past_key, found, graph), _bytes_like(node.outputs[1], found, graph)
        inputs = {role: value for role, value in found.inputs.items() if role not in ("past_key", "past_value")}
        inputs["past_cache"] = past
        output = node.outputs[0]
        new = ir.Node(
            DOMAIN,
            SPARSE_AMX_ATTENTION.name,
            list(inputs.values()),
            [*(a for a in node.attributes.values() if a.name != "roles"), *self._attributes(list(inputs)[1:])],
            # The operator's outputs in between are those of a float cache.
            outputs=[ir.Value(doc_string=output.doc_string), ir.Value(name=""), ir.Value(name=""), present],
            name=node.name,
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        new.outputs[0].metadata_props.update(output.metadata_props)
        graph.inputs[graph.inputs.index(past_key)] = past
        graph.inputs.remove(past_value)
        graph.outputs[graph.outputs.index(node.outputs[1])] = present
        graph.outputs.remove(node.outputs[2])
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [output], [new.outputs[0]])
        o = self._options
        return PackedCache(
            *(past.name or "", present.name or "", found.kv_heads, found.key_size, found.value_size),
            *(o.k_sparsity, o.v_sparsity, o.sink, o.recent),
        )

    def _attributes(self, roles: list[str]) -> list[ir.Attr]:
        return [
            ir.AttrString("roles", ",".join(roles)),
            ir.AttrString("cache", "packed"),
            ir.AttrFloat32("k_sparsity", self._options.k_sparsity),
            ir.AttrFloat32("v_sparsity", self._options.v_sparsity),
            ir.AttrInt64("sink", self._options.sink),
            ir.AttrInt64("recent", self._options.recent),
        ]


@dataclass(frozen=True)
class _Found:
    """A node whose cache can be packed: its inputs by role, the query first, and the sizes of its cache."""

    inputs: dict[str, ir.Value]
    kv_heads: int
    key_size: int
    value_size: int


def _is_ours(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, SPARSE_AMX_ATTENTION.name)


def _read(node: ir.Node, graph: ir.Graph) -> _Found | str:
    """What there is to pack, or why not."""
    inputs = inputs_by_role(node)
    pasts = [inputs.get("past_key"), inputs.get("past_value")]
    presents = list(node.outputs[1:3])
    if None in pasts or len(presents) < len(pasts):
        return "It has no cache to pack."
    for past in pasts:
        if past is None or past not in graph.inputs or len(past.uses()) != 1:
            return "Its cache is not packed: something else makes or reads its past."
    for present in presents:
        if present not in graph.outputs or present.uses():
            return "Its cache is not packed: something else reads its present."
    kv_heads = node.attributes["kv_num_heads"].as_int()
    of_key = last_dimension(inputs["past_key"]) or key_size(node)
    if of_key is None:
        return "Its cache is not packed: the graph does not tell the size of a head."
    return _Found(inputs, kv_heads, of_key, last_dimension(inputs["past_value"]) or value_size(node) or of_key)


def _bytes_like(key: ir.Value, found: _Found, graph: ir.Graph) -> ir.Value:
    """A value of bytes in the place of keys: ``past_key_values.0.key`` becomes ``past_key_values.0.cache``."""
    before, found_key, after = (key.name or "").rpartition("key")
    name = f"{before}cache{after}" if found_key else f"{after}_cache"
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    while name in taken:
        name += "_packed"
    batch = key.shape[0] if key.shape is not None else None
    which = "past" if key in graph.inputs else "present"
    shape = ir.Shape([batch, found.kv_heads, f"{which}_cache_bytes"])
    return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.UINT8))


def packed_caches(model: ir.Model) -> list[PackedCache]:
    """The packed caches that a model's metadata describe.

    Raises:
        SparamxError: The description is damaged, or names what the graph does not have.
    """
    inputs, outputs = ({value.name for value in values} for values in (model.graph.inputs, model.graph.outputs))
    try:
        found = [PackedCache(**entry) for entry in json.loads(model.metadata_props.get(CACHES_KEY, "[]"))]
        for cache in found:
            cache.layout.row_bytes(0)
    except (TypeError, ValueError) as error:
        raise SparamxError(f"The model's metadata {CACHES_KEY} do not describe packed caches: {error}") from error
    for cache in found:
        if cache.past not in inputs or cache.present not in outputs:
            raise SparamxError(f"The model's metadata {CACHES_KEY} name {cache.past}, which the graph does not have.")
    return found
