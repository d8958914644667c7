"""Runs a converted model on the user's inputs, a piece at a time, and shows what enters each group of layers.

The main graph is cut before each group of layers that share an input. A piece between two cuts becomes a model of its
own; what it computes for later pieces is kept in files, run by run. So every node runs once, however many layers there
are, in memory there are the weights of one piece and the activations of one run, and a piece that runs after a group
has been visited sees the group's weights as the visit left them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from sparamx_onnx.graph_passes import write
from sparamx_onnx.graph_passes.packed_weight import PackedSiblings, PackedWeight
from sparamx_onnx.ops.definitions import DOMAIN, SPARSE_AMX_MATMUL
from sparamx_onnx.ops.errors import SparamxError, in_one_sentence
from sparamx_onnx.ops.sessions import open_quietly

Array = npt.NDArray[Any]
Runs = Iterable[Mapping[str, Array]]
"""The inputs of several runs of a model: for each, one array per input by name."""

_MASK = "attention_mask"

# Rows that are shown at a time.
_ROWS = 2048

_OLDEST_IR = 4  # initializers need not be inputs from here on


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same input.

    Attributes:
        x: The input, [..., K].
        weights: Their packed weights, each once; a weight belongs to the first group that uses it.
    """

    x: ir.Value
    weights: tuple[PackedWeight, ...]

    @property
    def k(self) -> int:
        """Rows of the weights."""
        return self.weights[0].weight.shape[0]


class Activations:
    """What enters a group of layers over all runs, in pieces of float32 [rows, K]; it can be gone through repeatedly.

    Rows that belong to padding are left out: where the model has an input ``attention_mask`` of [batch, length], a
    group's input of as many rows is taken where the mask is not 0.
    """

    def __init__(self, name: str, k: int, store: _Store, masks: Sequence[Array | None]) -> None:
        self._name = name
        self._k = k
        self._store = store
        self._masks = masks

    def of_run(self, run: int) -> Array:
        """What entered in one run, [..., K], with padding."""
        return self._store.get(self._name, run)

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        for run, mask in enumerate(self._masks):
            array = self.of_run(run)
            if array.shape[-1:] != (self._k,):
                raise SparamxError(
                    f"The calibration inputs give '{self._name}' the shape {list(array.shape)}; "
                    f"it must end in {self._k}."
                )
            rows = array.reshape(-1, array.shape[-1])
            keep = _kept_rows(array, mask)
            if keep is not None:
                rows = rows[keep]
            for start in range(0, rows.shape[0], _ROWS):
                piece = np.ascontiguousarray(rows[start : start + _ROWS], np.float32)
                if not np.isfinite(piece).all():
                    raise SparamxError(f"The calibration inputs make '{self._name}' infinite or undefined.")
                yield piece


Visit = Callable[[LayerGroup, Activations], None]


def layer_groups(model: ir.Model, wanted: Callable[[PackedWeight], bool]) -> list[LayerGroup]:
    """The layers of the main graph, in the order in which they run, that share an input.

    Args:
        model: A model after ``RewriteMatMulPass``.
        wanted: Says which packed weights count.
    """
    weights: dict[ir.Value, list[PackedWeight]] = {}
    seen: set[int] = set()
    for node in model.graph:
        for packed in _packed_weights(node):
            x = node.inputs[0]
            if wanted(packed) and id(packed) not in seen and x is not None:
                seen.add(id(packed))
                weights.setdefault(x, []).append(packed)
    return [LayerGroup(x, tuple(group)) for x, group in weights.items()]


@dataclass(frozen=True)
class Layer:
    """A layer of a group.

    Attributes:
        node: The operator that computes it, perhaps with siblings.
        index: Which of the operator's outputs it is.
        weight: Its weight.
    """

    node: ir.Node
    index: int
    weight: PackedWeight


def layers_of(group: LayerGroup) -> list[Layer]:
    """The layers of a group in the main graph; several may have the same weight."""
    return [
        Layer(node, index, packed)
        for node in group.x.consumers()
        if node.inputs[0] is group.x and node.graph is group.x.graph
        for index, packed in enumerate(_packed_weights(node))
        if any(packed is weight for weight in group.weights)
    ]


def _packed_weights(node: ir.Node) -> tuple[PackedWeight, ...]:
    """The weights of a sparse operator, one for each of its outputs."""
    is_ours = (node.domain, node.op_type) == (DOMAIN, SPARSE_AMX_MATMUL.name) and len(node.inputs) > 1
    value = node.inputs[1] if is_ours else None
    packed = None if value is None else value.const_value
    if isinstance(packed, PackedSiblings):
        return packed.parts
    return (packed,) if isinstance(packed, PackedWeight) else ()


def calibrate(
    model: ir.Model,
    groups: Sequence[LayerGroup],
    runs: Runs,
    folder: Path,
    visit: Visit,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs the model up to each group of layers in turn, and lets ``visit`` look at what enters it.

    Args:
        model: A model after ``RewriteMatMulPass``; it is not changed.
        groups: From ``layer_groups``.
        runs: The inputs. Gone through once, at the start.
        folder: Where intermediate results may be written. They are removed as soon as nothing needs them.
        visit: Called for each group. The layers of a group run with the weights that they have after their visit.
        progress: Called with steps done and steps in total; a step is one run of a piece, or a visit.

    Raises:
        SparamxError: There are no runs, ONNX Runtime cannot run a piece on them, or a value between two pieces is not
            an array.
    """
    pieces = Pieces(model, groups)
    store = _Store(folder)
    masks: list[Array | None] = []
    for run in runs:
        for name in pieces.first_inputs():
            store.put(name, len(masks), run[name])
        mask = run.get(_MASK)
        masks.append(mask.astype(np.bool_) if mask is not None and mask.ndim == 2 else None)
    if not masks:
        raise SparamxError("There are no calibration inputs.")
    total, done = len(groups) * (len(masks) + 1), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for index, group in enumerate(groups):
        piece = pieces.piece(index)
        runner = _Runner(piece, model, store, folder) if piece.outputs else None
        for run_index in range(len(masks)):
            if runner is not None:
                runner.run(run_index)
            advance()
        del runner
        store.keep_only(piece.alive)
        visit(group, Activations(_name(group.x), group.k, store, masks))
        advance()
    store.keep_only(set())


def _kept_rows(array: Array, mask: Array | None) -> Array | None:
    """Which rows of an activation are not padding, if that can be told."""
    if mask is None:
        return None
    if array.ndim == 3 and array.shape[0] == mask.shape[0] and array.shape[1] <= mask.shape[1]:
        # With a cache, the mask begins with the tokens that are in it.
        return mask[:, mask.shape[1] - array.shape[1] :].reshape(-1)
    if array.ndim == 2 and array.shape[0] == mask.size:
        return mask.reshape(-1)
    return None


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


# --- cutting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What runs between two cuts.

    Attributes:
        nodes: Its nodes, in graph order.
        constants: The initializers that they read.
        inputs: Names of the values that it reads from the store.
        outputs: Names of the values that it computes for later.
        alive: Names of all values that are needed later.
    """

    nodes: tuple[ir.Node, ...]
    constants: tuple[ir.Value, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    alive: frozenset[str]


class Pieces:
    """The main graph, cut before the first layer of each group, without what no group needs.

    Nodes that depend on constants alone belong to every piece that reads them.
    """

    def __init__(self, model: ir.Model, groups: Sequence[LayerGroup]) -> None:
        self._nodes = list(model.graph)
        self._position = {node: position for position, node in enumerate(self._nodes)}
        self._reads = [_reads(node, model.graph) for node in self._nodes]
        self._constant = self._find_constant()
        layers = [layers_of(group) for group in groups]
        self._results = {layer.node.outputs[layer.index] for group in layers for layer in group}
        self.cuts = [min(self._position[layer.node] for layer in group) for group in layers]
        needed = self._reaching([group.x for group in groups])
        self._body = [p for p in sorted(needed) if not self._constant[p]]
        # Where the stored values are used last: by a node, or by a group that looks at it.
        self._last: dict[ir.Value, int] = {}
        for position in self._body:
            self._last.update({value: position for value in self._reads[position] if self._is_stored(value)})
        for group, cut in zip(groups, self.cuts, strict=True):
            self._last[group.x] = max(cut, self._last.get(group.x, 0))

    def first_inputs(self) -> list[str]:
        """Names of the model's inputs that are needed."""
        return sorted(_name(value) for value in self._last if self._made(value) < 0)

    def piece(self, index: int) -> Piece:
        """What runs between the cuts before two groups; the first piece begins with the graph."""
        start, end = 0 if index == 0 else self.cuts[index - 1], self.cuts[index]
        alive = {value for value, last in self._last.items() if self._made(value) < end <= last}
        body = [position for position in self._body if start <= position < end]
        return self._piece(body, start, [value for value in alive if self._made(value) >= start], alive)

    def whole(self, outputs: Sequence[ir.Value]) -> Piece:
        """All that some values depend on."""
        body = [position for position in sorted(self._reaching(outputs)) if not self._constant[position]]
        return self._piece(body, 0, outputs, set(outputs))

    def layers_before(self, value: ir.Value) -> int:
        """How many layers of the groups a value depends on."""
        read = {source for position in self._reaching([value]) for source in self._reads[position]}
        return len(self._results & (read | {value}))

    def _piece(self, body: Sequence[int], start: int, outputs: Iterable[ir.Value], alive: set[ir.Value]) -> Piece:
        read = {value for position in body for value in self._reads[position]}
        positions = self._reaching_constants(body)
        initializers = {
            value: None
            for position in positions
            for value in self._reads[position]
            if value.producer() is None and value.is_initializer()
        }
        return Piece(
            tuple(self._nodes[position] for position in positions),
            tuple(initializers),
            tuple(sorted(_name(value) for value in read if self._is_stored(value) and self._made(value) < start)),
            tuple(sorted(_name(value) for value in outputs)),
            frozenset(_name(value) for value in alive),
        )

    def _find_constant(self) -> list[bool]:
        """For each node, whether all that it reads is constant."""
        constant: list[bool] = []
        for reads in self._reads:
            sources = [(value, value.producer()) for value in reads]
            constant.append(
                all(
                    value.is_initializer() if node is None else constant[self._position[node]]
                    for value, node in sources
                )
            )
        return constant

    def _reaching(self, values: Iterable[ir.Value]) -> set[int]:
        """The nodes that values depend on."""
        found: set[int] = set()
        stack = list(values)
        while stack:
            node = stack.pop().producer()
            if node is not None and self._position[node] not in found:
                found.add(self._position[node])
                stack.extend(self._reads[self._position[node]])
        return found

    def _reaching_constants(self, body: Sequence[int]) -> list[int]:
        """Nodes, and the constant ones that they depend on, in graph order."""
        read = (value for position in body for value in self._reads[position])
        return sorted({*body, *self._reaching(value for value in read if not self._is_stored(value))})

    def _is_stored(self, value: ir.Value) -> bool:
        producer = value.producer()
        return not value.is_initializer() if producer is None else not self._constant[self._position[producer]]

    def _made(self, value: ir.Value) -> int:
        producer = value.producer()
        return -1 if producer is None else self._position[producer]


def _reads(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    """The values of a graph that a node reads, itself or in its bodies."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            body = attribute.as_graph()
            values.extend(value for inner in body for value in _reads(inner, graph))
            values.extend(body.outputs)
    return list(dict.fromkeys(value for value in values if value.graph is graph))


# --- running --------------------------------------------------------------------------------------------------------


class _Store:
    """Arrays in files, by name and run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, dict[int, Path]] = {}
        self._number = itertools.count()

    def put(self, name: str, run: int, array: Array) -> None:
        path = self._folder / f"activation{next(self._number)}.npy"
        np.save(path, array, allow_pickle=False)
        self._files.setdefault(name, {})[run] = path

    def get(self, name: str, run: int) -> Array:
        array: Array = np.load(self._files[name][run], allow_pickle=False)
        return array

    def keep_only(self, names: Iterable[str]) -> None:
        for name in self._files.keys() - set(names):
            for path in self._files.pop(name).values():
                path.unlink()


class _Runner:
    """Runs a piece on what is stored, and stores what it computes."""

    def __init__(self, piece: Piece, model: ir.Model, store: _Store, folder: Path) -> None:
        self._piece = piece
        self._store = store
        types = {name: ir.DataType.from_numpy(store.get(name, 0).dtype) for name in piece.inputs}
        self._session = open_session(as_model(piece, model, types), folder / "piece.onnx")

    def run(self, index: int) -> None:
        """Runs one run's piece."""
        feeds = {name: self._store.get(name, index) for name in self._piece.inputs}
        results = run_session(self._session, self._piece.outputs, feeds)
        for name, result in zip(self._piece.outputs, results, strict=True):
            if not isinstance(result, np.ndarray) or result.dtype.hasobject:
                raise SparamxError(f"'{name}' is no array of numbers, so calibration cannot be cut there.")
            self._store.put(name, index, result)


def open_session(model: ir.Model, path: Path) -> onnxruntime.InferenceSession:
    """Writes a model as ``path``, over what is there, and opens it.

    Raises:
        SparamxError: ONNX Runtime refuses it.
    """
    write.save(model, path)
    return open_quietly(path, complaint="ONNX Runtime cannot run the model to calibrate")


def run_session(session: onnxruntime.InferenceSession, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Any]:
    """Runs a model on calibration inputs.

    Raises:
        SparamxError: ONNX Runtime fails on them.
    """
    with in_one_sentence("ONNX Runtime fails on the calibration inputs"):
        results: list[Any] = session.run(list(outputs), dict(feeds))
    return results


def as_model(piece: Piece, model: ir.Model, types: Mapping[str, ir.DataType]) -> ir.Model:
    """The piece as a model of its own; constants are shared with the model, nodes are copied."""
    proto = onnx.ModelProto(ir_version=max(_OLDEST_IR, model.ir_version or _OLDEST_IR))
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    graph = proto.graph
    graph.name = "piece"
    graph.node.extend(ir.serde.serialize_node(node) for node in piece.nodes)
    # Constants stand among the inputs until the copy is there to hold them.
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in (*piece.inputs, *map(_name, piece.constants)))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.outputs)
    copy = ir.serde.deserialize_model(proto)
    inputs = {_name(value): value for value in copy.graph.inputs}
    for name, dtype in types.items():
        inputs[name].type = ir.TensorType(dtype)
    for constant in piece.constants:
        value = inputs[_name(constant)]
        copy.graph.inputs.remove(value)
        value.type, value.const_value = constant.type, constant.const_value
        copy.graph.register_initializer(value)
    return copy
