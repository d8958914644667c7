"""Inputs for a model that nobody gave inputs for: what ``verify`` and ``bench`` feed to it.

Names decide first, as exporters write them (``input_ids``, ``attention_mask``, ``past_key_values.0.key``), then type
and rank. A plan is data (JSON), so that a worker process makes the same arrays from it.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparamx_onnx.graph_passes.attention_heads import value_size
from sparamx_onnx.graph_passes.attributes import int_attribute
from sparamx_onnx.ops.errors import SparamxError

Array = np.ndarray[Any, np.dtype[Any]]

# Random ids stay below this where the graph does not show how long the table is that they look up.
_UNKNOWN_TABLE = 2
_LARGEST_ID = 1000
_UNCHANGING = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_NAMED_DIMENSIONS = {"height": 224, "width": 224, "channel": 3}


@dataclasses.dataclass(frozen=True)
class Feed:
    """One input to make.

    Attributes:
        name: The input's name.
        shape: Its dimensions.
        dtype: NumPy name of its type.
        fill: ``normal`` (standard normal), ``ids`` (integers from 0 up to ``value``, exclusive), ``constant``
            (``value``) or ``positions`` (counting up along the last axis from ``value``).
        value: What ``fill`` says.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: str
    value: int = 0

    def make(self, seed: int = 0) -> Array:
        """The array; the same for the same seed, whatever the order of the inputs."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        if self.fill == "normal":
            return np.asarray(rng.standard_normal(self.shape, dtype=np.float32).astype(self.dtype))
        if self.fill == "ids":
            return np.asarray(rng.integers(0, self.value, self.shape).astype(self.dtype))
        if self.fill == "positions":
            last = self.shape[-1] if self.shape else 1
            return np.broadcast_to(np.arange(last) + self.value, self.shape).astype(self.dtype)
        return np.full(self.shape, self.value, self.dtype)


@dataclasses.dataclass(frozen=True)
class FeedPlan:
    """The inputs of one run and the sizes behind them.

    Attributes:
        feeds: One per input of the model.
        batch: Rows that run side by side (1 where the model has no such axis).
        length: New tokens of each row, or the length of its other sequences.
        past: Positions in the key-value cache; None for a model without one.
    """

    feeds: tuple[Feed, ...]
    batch: int
    length: int
    past: int | None

    def make(self, seed: int = 0) -> dict[str, Array]:
        """All arrays by input name."""
        return {feed.name: feed.make(seed) for feed in self.feeds}


def graph_inputs(model: ir.Model) -> list[ir.Value]:
    """Inputs that must be fed: without initializers, which old IR versions list among the inputs."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def is_decoder(model: ir.Model) -> bool:
    """Whether the model takes a key-value cache."""
    return any(_kind(value) in ("cache", "packed cache") for value in graph_inputs(model))


def plan_feeds(model: ir.Model, *, batch: int | None = None, length: int = 16, past: int = 0) -> FeedPlan:
    """Decides shapes and contents of a model's inputs.

    Args:
        model: The model; only its inputs and the consumers of integer inputs are looked at.
        batch: Size of the batch axis; 1, or what the model fixes, if None.
        length: Tokens per row, and the length of every other axis that has no better name.
        past: Positions in the key-value cache, where the model has one.

    Raises:
        SparamxError: An input has a type that cannot be made up, or the model fixes another batch, or there should be
            positions in a packed cache.
    """
    inputs = graph_inputs(model)
    packed = next((value for value in inputs if _kind(value) == "packed cache"), None)
    if packed is not None and past:
        raise SparamxError(f"input '{packed.name}' is a packed cache, which random bytes do not fill: leave it empty")
    decoder = is_decoder(model)
    sizes = {"batch": batch or 1, "length": length, "past": past if decoder else 0}
    bounds = _table_sizes(model)
    symbols: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for value in sorted(inputs, key=_turn):
        shape = _shape(value, sizes, symbols)
        shapes[value.name or ""] = shape
        # What the model fixes overrides what was asked for, so that masks and positions fit the tokens.
        if shape and _has_batch_axis(value):
            if batch is not None and shape[0] != batch:
                raise SparamxError(f"input '{value.name}' has a fixed batch of {shape[0]}, not {batch}")
            sizes["batch"] = shape[0]
        if _kind(value) == "tokens" and len(shape) == 2:
            sizes["length"] = shape[1]
        if _kind(value) == "cache" and len(shape) == 4:
            sizes["past"] = shape[2]
    feeds = tuple(_feed(value, shapes[value.name or ""], sizes, bounds) for value in inputs)
    return FeedPlan(feeds, sizes["batch"], sizes["length"], sizes["past"] if decoder else None)


def read_npz(path: str | os.PathLike[str], model: ir.Model) -> dict[str, Array]:
    """Inputs from a file that ``numpy.savez`` wrote, checked against the model's.

    Raises:
        SparamxError: The file cannot be read, lacks an input, or has one of another type or shape.
    """
    return check_inputs(read_arrays(path), model, os.fspath(path))


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """All arrays of a file that ``numpy.savez`` wrote, by name.

    Raises:
        SparamxError: The file cannot be read or is of another kind.
    """
    shown = os.fspath(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise SparamxError(f"{shown}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and NumPy each have their own complaint about another kind of file
        raise SparamxError(f"{shown}: not a file of arrays that numpy.savez wrote") from error


class CalibrationRuns:
    """The inputs of several runs of a model, from files; each file is read when its turn comes."""

    def __init__(self, paths: Sequence[Path], model: ir.Model) -> None:
        self._paths = tuple(paths)
        self._model = model

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for path in self._paths:
            yield from _runs_of(path, self._model)


def read_calibration(path: str | os.PathLike[str], model: ir.Model) -> CalibrationRuns:
    """Calibration inputs from a file that ``numpy.savez`` wrote, or from all such files of a folder, by name.

    A file holds one array per input of the model, by name: the inputs of one run, of any batch and length that the
    model takes. If all of them have one axis more than the model declares, the first axis counts runs.

    Args:
        path: The file or folder.
        model: Whose inputs.

    Raises:
        SparamxError: There is no such file, or none in the folder, or the first does not fit the model. The others are
            read, and checked, when they are iterated over.
    """
    path = Path(path)
    paths = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not paths:
        raise SparamxError(f"{path}: holds no .npz file of calibration inputs")
    if next(_runs_of(paths[0], model), None) is None:
        raise SparamxError(f"{paths[0]}: holds no run")
    return CalibrationRuns(paths, model)


def _runs_of(path: Path, model: ir.Model) -> Iterator[dict[str, Array]]:
    arrays, inputs = read_arrays(path), graph_inputs(model)
    declared = {value.name or "": len(value.shape) for value in inputs if value.shape is not None}
    several = bool(declared) and all(
        name in arrays and arrays[name].ndim == rank + 1 for name, rank in declared.items()
    )
    if not several:
        yield check_inputs(arrays, model, os.fspath(path))
        return
    counts = {arrays[name].shape[0] for name in declared}
    if len(counts) != 1:
        raise SparamxError(f"{path}: its arrays hold different numbers of runs")
    for index in range(counts.pop()):
        yield check_inputs({name: arrays[name][index] for name in declared}, model, os.fspath(path))


def check_inputs(arrays: Mapping[str, Array], model: ir.Model, source: str) -> dict[str, Array]:
    """Picks a model's inputs out of ``arrays``.

    Args:
        arrays: Arrays by input name; others are ignored.
        model: Whose inputs.
        source: Where the arrays come from, for messages.

    Raises:
        SparamxError: One is missing, or has another type or shape than the model declares.
    """
    chosen: dict[str, Array] = {}
    for value in graph_inputs(model):
        name = value.name or ""
        if name not in arrays:
            raise SparamxError(f"{source}: has no array for input '{name}'")
        array, wanted = arrays[name], _dtype(value)
        if array.dtype != wanted:
            raise SparamxError(f"{source}: input '{name}' is {array.dtype}, the model wants {wanted}")
        if value.shape is not None and len(value.shape) != array.ndim:
            raise SparamxError(f"{source}: input '{name}' has {array.ndim} axes, the model wants {len(value.shape)}")
        dimensions = array.shape if value.shape is None else value.shape
        if any(isinstance(size, int) and size != given for size, given in zip(dimensions, array.shape, strict=True)):
            shown = ", ".join(map(str, dimensions))
            raise SparamxError(f"{source}: input '{name}' has the shape {list(array.shape)}, the model wants [{shown}]")
        chosen[name] = array
    return chosen


def _kind(value: ir.Value) -> str:
    name = (value.name or "").lower()
    integer = value.dtype is not None and value.dtype.is_integer()
    rank = len(value.shape) if value.shape is not None else 0
    if not integer and rank >= 3 and any(part in name for part in ("past", "cache")):
        return "cache"
    if value.dtype == ir.DataType.UINT8 and rank == 3 and "cache" in name:
        return "packed cache"
    if "mask" in name:
        return "mask"
    if integer and "position" in name:
        return "positions"
    if integer and any(part in name for part in ("seqlens_k", "seq_lens", "total_seq")):
        return "lengths"
    if integer and any(part in name for part in ("token_type", "segment")):
        return "segments"
    if integer and rank == 2:
        return "tokens"
    return "other"


def _turn(value: ir.Value) -> int:
    """Tokens and cache first: what they call their axes, the others (masks, positions) refer to."""
    order = ("tokens", "cache", "positions", "mask")
    kind = _kind(value)
    return order.index(kind) if kind in order else len(order)


def _has_batch_axis(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and len(shape) >= 2 and not (_kind(value) == "positions" and len(shape) > 2)


def _dtype(value: ir.Value) -> np.dtype[Any]:
    if value.dtype is None or value.dtype == ir.DataType.UNDEFINED:
        raise SparamxError(f"input '{value.name}' has no type, so no input can be made")
    dtype = np.dtype(value.dtype.numpy())
    if dtype.kind not in "biuf":
        raise SparamxError(f"input '{value.name}' has type {value.dtype.name.lower()}, for which no input can be made")
    return dtype


def _shape(value: ir.Value, sizes: Mapping[str, int], symbols: dict[str, int]) -> tuple[int, ...]:
    if value.shape is None:
        raise SparamxError(f"input '{value.name}' has no declared shape")
    result = []
    for axis, dimension in enumerate(value.shape):
        if isinstance(dimension, int):
            result.append(dimension)
            continue
        if _kind(value) == "packed cache" and axis == 2:
            result.append(0)  # no bytes: no past
            continue
        symbol = dimension.value or ""
        size = _sum(symbol, sizes, symbols)
        if size is None:
            size = _by_position(value, axis, sizes)
            if symbol:
                symbols[symbol] = size
        result.append(size)
    return tuple(result)


def _sum(symbol: str, sizes: Mapping[str, int], symbols: dict[str, int]) -> int | None:
    """The size that an axis' name stands for: known already, telling by itself, or a sum of such."""
    symbol = symbol.strip()
    if symbol in symbols:
        return symbols[symbol]
    if "+" in symbol:
        parts = [_sum(part, sizes, symbols) for part in symbol.split("+")]
        return sum(part for part in parts if part is not None) if None not in parts else None
    if symbol.isdecimal():
        return int(symbol)
    name = symbol.lower()
    size = None
    if "batch" in name:
        size = sizes["batch"]
    elif "total" in name:
        size = sizes["past"] + sizes["length"]
    elif "past" in name:
        size = sizes["past"]
    elif "seq" in name and "encoder" not in name:
        size = sizes["length"]
    for part, usual in _NAMED_DIMENSIONS.items():
        if part in name:
            size = usual
    if size is not None:
        symbols[symbol] = size
    return size


def _by_position(value: ir.Value, axis: int, sizes: Mapping[str, int]) -> int:
    kind = _kind(value)
    if axis == 0 and (_has_batch_axis(value) or kind == "lengths"):
        return sizes["batch"]
    if kind == "cache":
        is_last = value.shape is not None and axis == len(value.shape) - 1
        known = (size for node in value.consumers() if is_last and (size := value_size(node)) is not None)
        return next(known, sizes["past"])
    if kind == "mask":
        return sizes["past"] + sizes["length"]
    return sizes["length"]


def _feed(value: ir.Value, shape: tuple[int, ...], sizes: Mapping[str, int], bounds: Mapping[str, int]) -> Feed:
    name, dtype, kind = value.name or "", _dtype(value), _kind(value)
    if kind == "mask":
        # A mask of four axes is added to the scores: nothing hidden is 0 there, and 1 in the mask of tokens.
        return Feed(name, shape, dtype.name, "constant", 0 if dtype.kind == "f" and len(shape) == 4 else 1)
    if dtype.kind == "f":
        return Feed(name, shape, dtype.name, "normal")
    if kind == "positions":
        return Feed(name, shape, dtype.name, "positions", sizes["past"])
    if kind == "lengths":
        total = sizes["past"] + sizes["length"]
        return Feed(name, shape, dtype.name, "constant", total - 1 if "seqlens_k" in name.lower() else total)
    if kind == "segments":
        return Feed(name, shape, dtype.name, "constant", 0)
    if dtype.kind == "b" or not shape:
        return Feed(name, shape, dtype.name, "constant", 1)
    return Feed(name, shape, dtype.name, "ids", min(bounds.get(name, _UNKNOWN_TABLE), _LARGEST_ID))


def _table_sizes(model: ir.Model) -> dict[str, int]:
    """For each input that is used as an index: the rows of the shortest constant table that it looks up."""
    bounds: dict[str, int] = {}
    for value in graph_inputs(model):
        for table in _tables(value):
            rows = table.shape[0] if table.shape is not None and len(table.shape) else None
            if isinstance(rows, int) and rows > 0:
                bounds[value.name or ""] = min(rows, bounds.get(value.name or "", rows))
    return bounds


def _tables(value: ir.Value) -> Iterator[ir.Value]:
    """The tables of the Gather nodes that a value reaches without being changed."""
    waiting, seen = [value], {id(value)}
    while waiting:
        for node, index in waiting.pop().uses():
            if node.op_type == "Gather" and index == 1 and node.inputs[0] is not None:
                if int_attribute(node, "axis", 0) == 0:
                    yield node.inputs[0]
            elif node.op_type in _UNCHANGING and index == 0 and id(node.outputs[0]) not in seen:
                seen.add(id(node.outputs[0]))
                waiting.append(node.outputs[0])
