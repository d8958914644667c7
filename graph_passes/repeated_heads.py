"""Keys and values that are repeated for the queries that share them, before they are."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

RANK_BY_HEAD: Final = 4
"""Dimensions of keys and values by head: [batch, heads, tokens, size]."""


def known_shape(value: ir.Value | None) -> tuple[int | str, ...] | None:
    """The shape of a value, where every dimension is known by number or by name."""
    if value is None or value.shape is None:
        return None
    lengths = [length.value if isinstance(length, ir.SymbolicDim) else length for length in value.shape]
    known = tuple(length for length in lengths if length is not None)
    return known if len(known) == len(lengths) else None


def without_repeats(key: ir.Value, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys and values before each of their heads was repeated, where both were, equally often; otherwise as they are.

    Repeating is Unsqueeze, Expand and Reshape: [batch, heads, tokens, size] becomes [batch, heads, times, tokens,
    size], and that [batch, heads * times, tokens, size]. All these shapes must be known.
    """
    sources = _source(key), _source(value)
    if sources[0] is None or sources[1] is None:
        return key, value
    heads = [shape[1] for source in sources if (shape := known_shape(source)) is not None]
    return (sources[0], sources[1]) if heads[0] == heads[1] else (key, value)


def _source(value: ir.Value) -> ir.Value | None:
    chain = [value]
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = chain[-1].producer()
        if node is None or (node.domain, node.op_type) != ("", op_type):
            return None
        source = node.inputs[0] if node.inputs else None
        if source is None:
            return None
        chain.append(source)
    after, many, one, before = (known_shape(x) for x in chain)
    if after is None or many is None or one is None or before is None or len(before) != RANK_BY_HEAD:
        return None
    batch, heads, *rest = before
    times = many[2] if len(many) == RANK_BY_HEAD + 1 else None
    if not isinstance(heads, int) or not isinstance(times, int):
        return None
    is_repeat = (
        one == (batch, heads, 1, *rest)
        and many == (batch, heads, times, *rest)
        and after == (batch, heads * times, *rest)
    )
    return chain[-1] if is_repeat else None
