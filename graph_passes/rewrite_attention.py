"""Replaces attention operators over a float cache by SparseAMXAttention."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from sparamx_onnx.graph_passes.absorb_past import absorb_past
from sparamx_onnx.graph_passes.attention_operators import Refusal, Replacement, read_operator
from sparamx_onnx.graph_passes.attention_plan import AttentionPlan, AttentionReason
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder
from sparamx_onnx.graph_passes.plan import Action
from sparamx_onnx.graph_passes.spelled_attention import read_spelled
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_ATTENTION


class RewriteAttentionPass(ir.passes.InPlacePass):
    """Replaces attention operators, and plans every one of them.

    Rules:

    1. What ``attention_operators`` understands becomes one SparseAMXAttention: GroupQueryAttention and
       MultiHeadAttention of com.microsoft, and ONNX's Attention.
    2. So does what ``spelled_attention`` understands: MatMul, Softmax and MatMul, in the place of the last.
    3. What they refuse stays, and so do other attention operators.
    4. Where the new node's keys and values come from a Concat with a past, ``absorb_past`` may take that in.
    5. The node keeps its name, documentation and metadata; its outputs keep their names, types and shapes.
    6. What nothing reads any more is removed. The operators' domain is imported when a node has been replaced; nothing
       else of the model is touched.
    """

    def __init__(self, *, fast: bool, exclude: Sequence[str] = ()) -> None:
        """What to do.

        Args:
            fast: Replace what can be replaced; without it only ``plans`` are made.
            exclude: Regular expressions; nodes in whose name one of them is found stay.
        """
        super().__init__()
        self._fast = fast
        self._exclude = [re.compile(pattern) for pattern in exclude]
        self.plans: list[AttentionPlan] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model in place."""
        modified = False
        folder = ConstantFolder(model)
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            found = read_operator(node, folder) or read_spelled(node, folder)
            if found is None:
                continue
            name = node.name or ""
            excluded = next((pattern.pattern for pattern in self._exclude if pattern.search(name)), None)
            if isinstance(found, Replacement) and excluded is not None:
                found = Refusal(AttentionReason.EXCLUDED_BY_USER, f"It is {excluded}.")
            if isinstance(found, Replacement) and not self._fast:
                found = Refusal(AttentionReason.NOT_ASKED_FOR)
            if isinstance(found, Refusal):
                self.plans.append(AttentionPlan(name, node.op_type, Action.LEFT_ALONE, found.reason, found.detail))
                continue
            self.plans.append(AttentionPlan(name, node.op_type, Action.CONVERTED, AttentionReason.CONVERTED))
            inputs = list(node.inputs)
            new = _replace(node, found)
            _remove_unread(inputs)
            absorb_past(new)
            modified = True
        if modified:
            model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=modified)


def _replace(node: ir.Node, replacement: Replacement) -> ir.Node:
    graph = node.graph
    assert graph is not None
    outputs = [output for output in node.outputs if output.name]
    roles = [role for role in replacement.inputs if role != "query"]
    new = ir.Node(
        DOMAIN,
        SPARSE_AMX_ATTENTION.name,
        [replacement.inputs["query"], *(replacement.inputs[role] for role in roles)],
        [*replacement.attributes, ir.AttrString("roles", ",".join(roles))],
        num_outputs=len(outputs),
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    for old, output in zip(outputs, new.outputs, strict=True):
        output.doc_string = old.doc_string
        output.metadata_props.update(old.metadata_props)
    nodes = [*replacement.before, new]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, outputs, new.outputs)
    return new


def _remove_unread(values: Iterable[ir.Value | None]) -> None:
    """Removes what nothing reads any more, from these values up."""
    todo = [value for value in values if value is not None]
    while todo:
        value = todo.pop()
        node = value.producer()
        if value.uses() or value.is_graph_output():
            continue
        if value.is_initializer() and not value.is_graph_input() and value.graph is not None:
            value.graph.initializers.pop(value.name or "", None)
        if node is None or node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        todo += [one for one in node.inputs if one is not None]
        node.graph.remove(node, safe=True)
