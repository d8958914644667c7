"""Puts the branch that calibration takes in the place of an If, so that its layers are layers of the main graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sparamx_onnx.graph_passes.calibration import Runs
from sparamx_onnx.graph_passes.rewrite_matmul import Names


def with_taken_branches(model: ir.Model, runs: Runs) -> ir.Model:
    """The model as it is in all calibration runs.

    Rules:

    1. An If whose condition is an input of the model that is the same in all runs is replaced by the branch that it
       takes: what a merged decoder is, with ``use_cache_branch``. So are such Ifs in that branch.
    2. An If that is damaged, without that branch or with one of other results, stays: ONNX Runtime says what is wrong.
    3. Tensors are shared with the model, packed weights included: what is decided about them holds there too.

    Args:
        model: The model; it is not changed.
        runs: The calibration inputs. Gone through only where there is such an If.

    Returns:
        The model itself where there is no such If, else a copy.
    """
    conditions = {condition for node in _conditional(model) if (condition := _input_condition(node, model)) is not None}
    taken = _same_in_all(conditions, runs)
    if not taken:
        return model
    copy = model.clone()
    names = Names(copy)
    waiting = list(copy.graph)
    while waiting:
        node = waiting.pop()
        condition = _input_condition(node, copy)
        branch = _branch(node, taken[condition]) if condition in taken else None
        if branch is not None:
            waiting += _inline(copy.graph, node, branch, names)
    return copy


def _conditional(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "If")


def _input_condition(node: ir.Node, model: ir.Model) -> str | None:
    """The name of the model's input that is an If's condition."""
    if node.op_type != "If" or node.domain != "" or len(node.inputs) != 1:
        return None
    condition = node.inputs[0]
    if condition is None or not condition.is_graph_input() or condition.graph is not model.graph:
        return None
    # With a default, runs may not have it.
    return None if condition.is_initializer() else condition.name


def _same_in_all(names: set[str], runs: Runs) -> dict[str, bool]:
    """The values of inputs that are the same single value in all runs."""
    if not names:
        return {}
    values: dict[str, set[bool | None]] = {name: set() for name in names}
    for run in runs:
        for name in names:
            array = np.asarray(run[name])
            values[name].add(bool(array.reshape(-1)[0]) if array.size == 1 else None)
    return {name: value for name, seen in values.items() if len(seen) == 1 and (value := seen.pop()) is not None}


def _branch(node: ir.Node, taken: bool) -> ir.Graph | None:
    attribute = node.attributes.get("then_branch" if taken else "else_branch")
    if attribute is None or attribute.type != ir.AttributeType.GRAPH:
        return None
    branch = attribute.as_graph()
    return branch if len(branch.outputs) == len(node.outputs) else None


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph, names: Names) -> list[ir.Node]:
    """Moves a branch into the place of its If; returns its nodes."""
    for name, value in list(branch.initializers.items()):
        # Of another name, as another branch may have this one. Renaming the value would rename its tensor.
        moved = ir.Value(name=names.unused(name), type=value.type, shape=value.shape, const_value=value.const_value)
        ir.convenience.replace_all_uses_with(value, moved)
        graph.register_initializer(moved)
    nodes = list(branch)
    results = list(branch.outputs)
    branch.outputs.clear()
    branch.remove(nodes)
    for inner in nodes:
        for output in inner.outputs:
            if output.name:
                output.name = names.unused(output.name)
    # Results have other names inside than outside.
    ends = [ir.Node("", "Identity", [result], name=names.unused(f"{node.name}/Identity")) for result in results]
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [*nodes, *ends], node.outputs, [end.outputs[0] for end in ends]
    )
    return nodes
