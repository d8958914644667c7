"""Inlines model-local functions that multiply matrices, so that their weights can be packed."""

from __future__ import annotations

import graphlib

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sparamx_onnx.graph_passes.linear_layers import holds_products
from sparamx_onnx.ops.errors import SparamxError


def inline_functions(model: ir.Model) -> None:
    """Inlines all functions of a model in place, if one of them multiplies matrices and all of them can be inlined.

    ONNX Runtime does the same when it loads a model. Rules:

    1. Functions that call each other in a cycle, that import another version of a domain than the model, that take
       graphs as attributes, or that return one of their inputs are not inlined, and nor is any other then.
    2. Values of functions whose names the model has too are renamed.

    Raises:
        SparamxError: A call does not fit its function.
    """
    if not any(holds_products(function) for function in model.functions.values()) or not _can_be_inlined(model):
        return
    taken = {
        value.name
        for graph in model.graphs()
        for value in (*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs))
    }
    for function in model.functions.values():
        for node in ir.traversal.RecursiveGraphIterator(function):
            for value in node.outputs:
                if value.name in taken:
                    value.name = f"{function.name}.{value.name}"
    try:
        InlinePass()(model)
    except Exception as error:  # whatever a model that is not valid trips over in there
        cause = " ".join(str(error.__cause__ or error).split())
        raise SparamxError(f"The functions of the model cannot be inlined: {cause}") from error


def _can_be_inlined(model: ir.Model) -> bool:
    calls: dict[ir.OperatorIdentifier, set[ir.OperatorIdentifier]] = {}
    for identifier, function in model.functions.items():
        if any(
            model.opset_imports.get(domain, version) != version for domain, version in function.opset_imports.items()
        ):
            return False
        if any(output.producer() is None for output in function.outputs):
            return False
        nodes = list(ir.traversal.RecursiveGraphIterator(function))
        calls[identifier] = {node.op_identifier() for node in nodes} & set(model.functions)
    for graph in model.graphs():
        for node in graph:
            if node.op_identifier() in model.functions and any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                return False
    try:
        graphlib.TopologicalSorter(calls).prepare()
    except graphlib.CycleError:
        return False
    return True
