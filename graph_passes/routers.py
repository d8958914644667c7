"""Recognizes the layers of a mixture of experts that choose the experts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from sparamx_onnx.graph_passes.linear_layers import LinearLayer, scope_of

_NAMES = re.compile(
    r"(^|[./_])(router|(mlp|moe|ffn|feed_forward|block_sparse_moe)[./](shared_expert_)?gate)([./]|$)", re.I
)

# A vocabulary from which TopK picks tokens is larger; experts are a few hundred at most.
_MOST_EXPERTS = 1024

# A result that reaches its user through these alone is a prediction, not a hidden state.
_FOLLOWERS = frozenset({"Cast", "Identity", "LogSoftmax", "Sigmoid", "Softmax", "Squeeze", "Tanh"})


def chooses_experts(layer: LinearLayer) -> bool:
    """Whether a layer's outputs decide which experts a token goes to: by its name, or because a TopK follows.

    Two experts may be so close that rounding the weights exchanges them, and the whole result with them.
    """
    names = (layer.weight.name, layer.node.name or "", scope_of(layer.node) or "")
    return layer.n <= _MOST_EXPERTS and (any(map(_NAMES.search, names)) or is_ranked(layer.output))


def is_ranked(value: ir.Value) -> bool:
    """Whether a TopK takes the value, directly or behind a Softmax or the like."""
    return any(node.op_type == "TopK" for result in predictions(value) for node in result.consumers())


def predictions(value: ir.Value) -> Iterator[ir.Value]:
    """A value, and what becomes of it through operators that a head may be followed by."""
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        yield current
        for node in current.consumers():
            if node.domain == "" and node.op_type in _FOLLOWERS:
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                stack.extend(new)
