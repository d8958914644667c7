"""Reads attention that is spelled out as exporters of PyTorch do it: MatMul, Softmax, MatMul."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparamx_onnx.graph_passes.attention_operators import Refusal, Replacement
from sparamx_onnx.graph_passes.attention_plan import AttentionReason
from sparamx_onnx.graph_passes.attributes import MalformedAttributeError, int_attribute, ints_attribute
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder, FoldedConstant
from sparamx_onnx.graph_passes.repeated_heads import RANK_BY_HEAD, known_shape, without_repeats

# How many inputs operators have; those of Concat and Slice may differ.
_INPUTS = {
    **dict.fromkeys(("MatMul", "Add", "Mul", "Div", "Reshape"), 2),
    **dict.fromkeys(("Softmax", "Tanh", "Cast", "IsNaN", "Transpose", "Shape"), 1),
    "Where": 3,
}
_FEWEST_OF_SLICE = 3

# Before this version of ONNX's operators, a Softmax that names no dimension is over all but the first.
_SOFTMAX_OF_LAST_SINCE = 13

# Nodes between the Softmax and the product behind it: a cast, a softcap's three, factors.
_LONGEST_WAY = 8


class _NotUnderstoodError(Exception):
    """Why the nodes stay; an exception, as it comes from deep in the pattern."""

    def __init__(self, reason: AttentionReason, detail: str) -> None:
        super().__init__(detail)
        self.refusal = Refusal(reason, detail)


@dataclass
class _Factors:
    """What the scores are multiplied by, wherever that happens."""

    scale: float = 1.0
    softcap: float = 0.0


def read_spelled(node: ir.Node, folder: ConstantFolder) -> Replacement | Refusal | None:
    """What becomes of the second product of an attention; None where a node is none.

    Rules:

    1. The first operand must come from a Softmax over the last dimension, with nothing between but casts to float32 and
       the replacement of NaN by zero; the Softmax from a product of queries with turned keys, times a constant, perhaps
       with a softcap (Div, Tanh, Mul) and a sum with a mask. Nothing else may read what lies between.
    2. Queries, keys and values must have four dimensions that are known, by number or name, and fit without being
       repeated on the way: batch and size the same, the mask's each that of the scores or 1, its last that of the keys.
    3. Heads of keys and values that are repeated for the queries (Unsqueeze, Expand, Reshape) are taken before that.
    """
    try:
        softmax = _softmax_of(node)
        return None if softmax is None else _Reader(node, softmax, folder).read()
    except _NotUnderstoodError as why:
        return why.refusal
    except MalformedAttributeError as error:
        return Refusal(AttentionReason.MALFORMED_NODE, str(error))


def _is(node: ir.Node | None, *op_types: str) -> bool:
    """Whether a node is one of these operators, with as many inputs as that has: a file may say anything."""
    if node is None or node.domain != "" or node.op_type not in op_types or len(node.outputs) != 1:
        return False
    wanted = _INPUTS.get(node.op_type)
    return wanted is None or (len(node.inputs) == wanted and None not in node.inputs)


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, where it is one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and _is(node, *op_types) else None


def _softmax_of(node: ir.Node) -> ir.Node | None:
    """The Softmax whose weights a MatMul multiplies with values, if the scores come from another MatMul."""
    if not _is(node, "MatMul"):
        return None
    weights = _without_casts(node.inputs[0])
    choice = _producer(weights, "Where")
    if choice is not None:
        is_nan = _producer(choice.inputs[0], "IsNaN")
        if is_nan is None or choice.inputs[2] is None or is_nan.inputs[0] is not choice.inputs[2]:
            return None
        weights = _without_casts(choice.inputs[2])
    softmax = _producer(weights, "Softmax")
    scores = None if softmax is None else _without_casts(softmax.inputs[0])
    added = _producer(scores, "Add")
    return softmax if any(map(_leads_to_product, [scores] if added is None else added.inputs)) else None


def _without_casts(value: ir.Value | None) -> ir.Value | None:
    while (cast := _producer(value, "Cast")) is not None and int_attribute(cast, "to", 0) == ir.DataType.FLOAT:
        value = cast.inputs[0]
    return value


def _shape_of(value: ir.Value, what: str) -> tuple[int | str, ...]:
    shape = known_shape(value)
    if shape is None or len(shape) != RANK_BY_HEAD:
        raise _NotUnderstoodError(AttentionReason.UNKNOWN_SHAPE, f"It is that of the {what}.")
    return shape


class _Reader:
    """Reads one attention."""

    def __init__(self, node: ir.Node, softmax: ir.Node, folder: ConstantFolder) -> None:
        self._node = node
        self._softmax = softmax
        self._folder = folder
        self._inner = {node, softmax}  # nodes that the replacement takes the place of

    def read(self) -> Replacement:
        default = -1 if self._folder.opset >= _SOFTMAX_OF_LAST_SINCE else 1
        if int_attribute(self._softmax, "axis", default) not in (-1, RANK_BY_HEAD - 1):
            raise _NotUnderstoodError(AttentionReason.UNSUPPORTED_ATTRIBUTES, "Its Softmax is over another dimension.")
        choice = _producer(_without_casts(self._node.inputs[0]), "Where")
        if choice is not None and self._scalar(choice.inputs[1]) != 0:
            raise _NotUnderstoodError(AttentionReason.UNSUPPORTED_INPUT, "Its NaN are not replaced by zero.")
        factors = _Factors()
        product, bias = self._scores(factors)
        query, key = product.inputs
        assert query is not None
        assert key is not None
        query = self._unscaled(query, factors)
        key, before = self._keys(key, factors)
        value = self._node.inputs[1]
        assert value is not None
        self._check_inner()
        with np.errstate(over="ignore"):
            if not 0 < abs(np.float32(factors.scale)) < np.inf:  # 0 would mean another scale
                raise _NotUnderstoodError(
                    AttentionReason.UNSUPPORTED_ATTRIBUTES, "Its scale is no number that it takes."
                )
        self._check_shapes(query, key, value, bias)
        heads = _shape_of(query, "query")[1]
        key, value = without_repeats(key, value)
        inputs = {"query": query, "key": key, "value": value} | ({} if bias is None else {"attention_bias": bias})
        attributes = [
            ir.AttrInt64("num_heads", int(heads)),
            ir.AttrInt64("kv_num_heads", int(_shape_of(key, "key")[1])),
            ir.AttrInt64("causal", 0),
            ir.AttrFloat32("scale", factors.scale),
            ir.AttrFloat32("softcap", factors.softcap),
        ]
        return Replacement(inputs, attributes, before)

    def _scores(self, factors: _Factors) -> tuple[ir.Node, ir.Value | None]:
        """The first product, and what is added to the scores."""
        scores, bias = self._take_casts(self._softmax.inputs[0]), None
        added = _producer(scores, "Add")
        if added is not None:
            ways = [_leads_to_product(value) for value in added.inputs]
            if ways.count(True) != 1:
                raise _NotUnderstoodError(AttentionReason.UNSUPPORTED_INPUT, "A sum of its scores is not understood.")
            self._inner.add(added)
            scores, bias = self._take_casts(added.inputs[ways.index(True)]), added.inputs[ways.index(False)]
        scores = self._unscaled(self._before_softcap(scores, factors), factors)
        product = _producer(self._take_casts(scores), "MatMul")
        if product is None:
            raise _NotUnderstoodError(AttentionReason.UNSUPPORTED_INPUT, "What makes its scores is not understood.")
        self._inner.add(product)
        return product, bias

    def _take_casts(self, value: ir.Value | None) -> ir.Value:
        while (cast := _producer(value, "Cast")) is not None and int_attribute(cast, "to", 0) == ir.DataType.FLOAT:
            self._inner.add(cast)
            value = cast.inputs[0]
        assert value is not None
        return value

    def _before_softcap(self, scores: ir.Value, factors: _Factors) -> ir.Value:
        """The scores in cap * tanh(scores / cap)."""
        outer = _producer(scores, "Mul")
        tanh = None if outer is None else next((t for v in outer.inputs if (t := _producer(v, "Tanh"))), None)
        inner = None if tanh is None else _producer(tanh.inputs[0], "Div")
        if outer is None or tanh is None or inner is None or inner.inputs[0] is None:
            return scores
        cap, divisor = self._other_scalar(outer, tanh.outputs[0]), self._scalar(inner.inputs[1])
        if cap is None or cap != divisor or cap <= 0:
            raise _NotUnderstoodError(AttentionReason.UNSUPPORTED_ATTRIBUTES, "Its softcap is not understood.")
        factors.softcap = cap
        self._inner |= {outer, tanh, inner}
        return inner.inputs[0]

    def _unscaled(self, value: ir.Value, factors: _Factors) -> ir.Value:
        """The value before it is multiplied by constants."""
        while (node := _producer(value, "Mul", "Div")) is not None:
            if node.op_type == "Div":
                by, source = self._scalar(node.inputs[1]), node.inputs[0]
                by = None if not by else 1 / by
            else:
                by, source = next(
                    ((s, other) for one, other in (node.inputs, node.inputs[::-1]) if (s := self._scalar(one))),
                    (None, None),
                )
            if by is None or source is None or not self._may_take(node):
                break
            factors.scale *= by
            self._inner.add(node)
            value = source
        return value

    def _may_take(self, node: ir.Node) -> bool:
        """Whether nothing else reads a node's output: a scaled query that does not go may stay as it is."""
        return len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output()

    def _scalar(self, value: ir.Value | None) -> float | None:
        constant = None if value is None else self._folder.fold(value)
        if (
            not isinstance(constant, FoldedConstant)
            or constant.dtype != ir.DataType.FLOAT
            or constant.shape not in ((), (1,))
        ):
            return None
        return float(constant.numpy().reshape(()))

    def _other_scalar(self, node: ir.Node, value: ir.Value) -> float | None:
        return next((s for other in node.inputs if other is not value and (s := self._scalar(other)) is not None), None)

    def _keys(self, turned: ir.Value, factors: _Factors) -> tuple[ir.Value, list[ir.Node]]:
        """Keys by head as [batch, heads, keys, size], and the nodes that make them so."""
        turned = self._unscaled(turned, factors)
        transpose = _producer(turned, "Transpose")
        if transpose is not None and transpose.inputs[0] is not None:
            permutation = ints_attribute(transpose, "perm", ())
            if permutation == (0, 1, 3, 2):
                return transpose.inputs[0], []
            if permutation == (0, 2, 3, 1):
                return self._by_head(transpose.inputs[0])
        flat = _turned_flat(turned, self._folder)
        if flat is not None:
            return flat, []
        raise _NotUnderstoodError(AttentionReason.UNSUPPORTED_INPUT, "How its keys are turned is not understood.")

    def _by_head(self, tokens: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
        node = ir.Node("", "Transpose", [tokens], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
        shape = _shape_of(tokens, "key")
        node.outputs[0].shape = ir.Shape([shape[0], shape[2], shape[1], shape[3]])
        node.outputs[0].type = tokens.type
        return node.outputs[0], [node]

    def _check_inner(self) -> None:
        """Nothing but the attention reads what lies between its products."""
        weights = [self._node.inputs[0], *self._softmax.outputs]
        allowed = self._inner | set(_between(weights[0], self._softmax))
        for node in allowed - {self._node}:
            for output in node.outputs:
                if output.is_graph_output() or any(user not in allowed for user, _ in output.uses()):
                    raise _NotUnderstoodError(AttentionReason.UNSUPPORTED_OUTPUT, f"It is {output.name}.")

    def _check_shapes(self, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value | None) -> None:
        q, k, v = (_shape_of(x, what) for x, what in ((query, "query"), (key, "key"), (value, "value")))
        if not isinstance(q[1], int) or not isinstance(k[1], int):
            raise _NotUnderstoodError(AttentionReason.UNKNOWN_SHAPE, "It is the number of heads.")
        if (q[0], q[1], q[3]) != (k[0], k[1], k[3]) or k[:3] != v[:3]:
            raise _NotUnderstoodError(AttentionReason.UNKNOWN_SHAPE, "Its query, key and value may not fit each other.")
        for x in (query, key, value, bias):
            if x is not None and x.dtype not in (None, ir.DataType.FLOAT):
                raise _NotUnderstoodError(AttentionReason.UNSUPPORTED_DTYPE, f"{x.name} is {x.dtype}.")
        if bias is None:
            return
        mask = known_shape(bias)
        whole = (q[0], q[1], q[2], k[2])
        if mask is None or not 1 <= len(mask) <= RANK_BY_HEAD or mask[-1] != whole[-1]:
            raise _NotUnderstoodError(AttentionReason.UNKNOWN_SHAPE, "It is that of its mask.")
        if any(one not in (1, all_) for one, all_ in zip(mask[::-1], whole[::-1], strict=False)):
            raise _NotUnderstoodError(AttentionReason.UNKNOWN_SHAPE, "Its mask may not fit its scores.")


def _leads_to_product(value: ir.Value | None) -> bool:
    """Whether a summand is the scores: a product behind factors and softcap."""
    for _ in range(_LONGEST_WAY):
        if _producer(value, "MatMul") is not None:
            return True
        node = _producer(value, "Mul", "Div", "Tanh", "Cast")
        if node is None:
            return False
        ahead = [v for v in node.inputs if _producer(v, "MatMul", "Mul", "Div", "Tanh", "Cast") is not None]
        value = ahead[0] if len(ahead) == 1 else None
    return False


def _between(weights: ir.Value | None, softmax: ir.Node) -> Iterator[ir.Node]:
    """The nodes from the Softmax's output to the weights that are multiplied with the values."""
    while weights is not None and (node := weights.producer()) is not None and node is not softmax:
        yield node
        if node.op_type == "Where":
            is_nan = _producer(node.inputs[0], "IsNaN")
            if is_nan is not None:
                yield is_nan
            weights = node.inputs[2]
        else:
            weights = node.inputs[0]


def _turned_flat(turned: ir.Value, folder: ConstantFolder) -> ir.Value | None:
    """The keys that a Transpose of three dimensions between two Reshapes turns: [..., a, b] to [..., b, a]."""
    last = _producer(turned, "Reshape")
    transpose = None if last is None else _producer(last.inputs[0], "Transpose")
    first = None if transpose is None else _producer(transpose.inputs[0], "Reshape")
    keys = None if first is None else first.inputs[0]
    if last is None or transpose is None or first is None or keys is None:
        return None
    into = [[-1], (keys, -2, -1), (keys, -1, None)]
    back = [(keys, 0, -2), (keys, -1, None), (keys, -2, -1)]
    is_turned = ints_attribute(transpose, "perm", ()) == (0, 2, 1)
    is_turned &= _parts_of_shape(first.inputs[1], folder) == into and _parts_of_shape(last.inputs[1], folder) == back
    return keys if is_turned else None


def _parts_of_shape(value: ir.Value | None, folder: ConstantFolder) -> list[object]:
    """What a shape is put together from: lists of numbers, and (value, start, end) for slices of a value's shape."""
    concat = _producer(value, "Concat")
    parts: list[object] = []
    for part in concat.inputs if concat is not None else ():
        numbers = _numbers(part, folder)
        cut = _producer(part, "Slice")
        shape = None if cut is None or not cut.inputs else _producer(cut.inputs[0], "Shape")
        if numbers is not None:
            parts.append(numbers)
        elif cut is not None and shape is not None and not _cuts(shape) and len(cut.inputs) >= _FEWEST_OF_SLICE:
            start, end = (_numbers(cut.inputs[i], folder) for i in (1, 2))
            if start is None or end is None or len(start) != 1 or len(end) != 1 or not _is_plain_slice(cut, folder):
                return []
            first = 0 if start[0] <= -RANK_BY_HEAD else start[0]
            parts.append((shape.inputs[0], first, end[0] if end[0] < RANK_BY_HEAD else None))
        else:
            return []
    return parts


def _cuts(shape: ir.Node) -> bool:
    return int_attribute(shape, "start", 0) != 0 or "end" in shape.attributes


def _is_plain_slice(cut: ir.Node, folder: ConstantFolder) -> bool:
    axes, steps = (_numbers(cut.inputs[i], folder) if i < len(cut.inputs) else [i - 3] for i in (3, 4))
    return axes == [0] and steps == [1]


def _numbers(value: ir.Value | None, folder: ConstantFolder) -> list[int] | None:
    constant = None if value is None else folder.fold(value)
    if not isinstance(constant, FoldedConstant) or constant.dtype != ir.DataType.INT64 or len(constant.shape) != 1:
        return None
    return [int(n) for n in constant.numpy()]
