"""Recognizes layers that pruning spares: output heads, embeddings, small heads, and layers that stay exact."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from sparamx_onnx.graph_passes.linear_layers import LinearLayer, scope_of

_ROUTERS = re.compile(
    r"(^|[./_])(router|(mlp|moe|ffn|feed_forward|block_sparse_moe)[./](shared_expert_)?gate)([./]|$)", re.I
)

# A vocabulary from which TopK picks tokens is larger; experts are a few hundred at most.
_MOST_EXPERTS = 1024

# A result that reaches its user through these alone is a prediction, not a hidden state.
_FOLLOWERS = frozenset({"Cast", "Identity", "LogSoftmax", "Sigmoid", "Softmax", "Squeeze", "Tanh"})

# A result that reaches a sine or cosine through these alone is its angle, perhaps scaled.
_OF_ANGLES = frozenset(
    {
        *("Cast", "Concat", "Div", "Expand", "Identity", "Mul", "Neg", "Reshape"),
        *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    }
)

# Below this, in either dimension, a layer is a small head: its zeros would save next to nothing, and every one of its
# outputs counts.
_SMALL_HEAD = 64

_SPARED_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "the model's output head",
        re.compile(
            r"(^|[./_])(lm_head|embed_out|output_projection|proj_out|classifier|qa_outputs|score)([./_]|$)", re.I
        ),
    ),
    (
        "an embedding",
        re.compile(r"(^|[./_])(embeddings?|embed_tokens|embed_in|word_embeddings?|wte|wpe)\.?(weight)?$", re.I),
    ),
)

# A head has many more outputs than inputs (a vocabulary); a block's last projection does not.
_VOCABULARY_RATIO = 4


def spared_because(layer: LinearLayer) -> str:
    """Why a layer is not pruned unless the user names it; empty if it may be.

    Rules:

    1. Its name (of the weight, the module or the node) is that of an output head or an embedding; or it stays exact
       (see ``exact_because``).
    2. Its weight is also looked up by a Gather: it is a tied embedding.
    3. It has fewer than 64 inputs or outputs: a small head.
    4. A TopK takes its result, directly or behind a Softmax or Sigmoid.
    5. Its result is a graph output, directly or behind a Softmax or the like, and it has at least four times as many
       outputs as inputs: it predicts over a vocabulary.
    """
    names = _names(layer)
    for what, pattern in _SPARED_NAMES:
        if any(pattern.search(name) for name in names):
            return f"It is {what} by its name."
    if because := exact_because(layer):
        return f"{because}."
    if any(node.op_type.startswith("Gather") for node in layer.weight.root.consumers()):
        return "Its weight is also an embedding."
    if min(layer.k, layer.n) < _SMALL_HEAD:
        return f"It is a small head ({layer.k} x {layer.n})."
    if _is_ranked(layer.output):
        return "Its largest outputs are picked."
    if layer.n >= _VOCABULARY_RATIO * layer.k and any(
        value.is_graph_output() for value in _reached(layer.output, _FOLLOWERS)
    ):
        return "It is the model's output head."
    return ""


def exact_because(layer: LinearLayer) -> str:
    """Why rounding a layer's weights and activations may change everything behind it; empty if it does not.

    Rules:

    1. Its outputs decide which experts a token goes to: by its name, or because a TopK follows. Two experts may be so
       close that rounding exchanges them.
    2. Its outputs are angles: a Sin or Cos takes them, moved or scaled perhaps. A position of 1001 is 1000 in bf16, so
       the angles of a rotary embedding would be off by up to several turns.
    """
    chooses_experts = any(map(_ROUTERS.search, _names(layer))) or _is_ranked(layer.output)
    if layer.n <= _MOST_EXPERTS and chooses_experts:
        return "It chooses experts"
    if any(
        node.op_type in ("Sin", "Cos") for value in _reached(layer.output, _OF_ANGLES) for node in value.consumers()
    ):
        return "It makes angles"
    return ""


def _names(layer: LinearLayer) -> tuple[str, ...]:
    return layer.weight.name, layer.node.name or "", scope_of(layer.node) or ""


def _is_ranked(value: ir.Value) -> bool:
    """Whether a TopK takes the value, directly or behind a Softmax or the like."""
    return any(node.op_type == "TopK" for result in _reached(value, _FOLLOWERS) for node in result.consumers())


def _reached(value: ir.Value, through: frozenset[str]) -> Iterator[ir.Value]:
    """A value, and what becomes of it through some operators alone."""
    stack, seen = [value], {value}
    while stack:
        current = stack.pop()
        yield current
        for node in current.consumers():
            if node.domain == "" and node.op_type in through:
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                stack.extend(new)
