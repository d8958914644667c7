"""Runs a model and its converted form on the same inputs and says how far apart the outputs are."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sparamx_onnx.comparison import OutputError, compare
from sparamx_onnx.decoder import DecoderSession
from sparamx_onnx.feeds import Array, check_inputs, is_decoder, plan_feeds, read_npz
from sparamx_onnx.graph_passes.pack_cache import packed_caches
from sparamx_onnx.graph_passes.pipeline import KEPT_KEY
from sparamx_onnx.inspection import conversion_record
from sparamx_onnx.layer_errors import LayerError, layer_errors
from sparamx_onnx.loading import LoadedModel, load_model
from sparamx_onnx.ops.errors import SparamxError, in_one_sentence
from sparamx_onnx.ops.packed_cache import BLOCK
from sparamx_onnx.ops.sessions import open_quietly

# Largest relative error of an output that conversion alone, without pruning, may cause. For int8 and int4, whose errors
# add up over the layers, half as much again as was seen at most (docs/conversion.md).
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "int8": 0.15, "int4": 0.6}
_UNKNOWN_TOLERANCE = 1e-4
_GENERATED_RUNS = 3
_GENERATED_LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Verification:
    """Result of ``verify``.

    Attributes:
        reference: Path of the first model.
        converted: Path of the second.
        inputs: Where the inputs came from: a file, ``arrays`` or ``generated``.
        runs: Runs of each model.
        tolerance: Largest relative error that passes.
        pruned: How the second model was pruned when it was converted, or None.
        outputs: One entry per output.
        layers: The errors of the converted model's layers, in graph order; None where they were not asked for.
    """

    reference: str
    converted: str
    inputs: str
    runs: int
    tolerance: float
    pruned: str | None
    outputs: tuple[OutputError, ...]
    layers: tuple[LayerError, ...] | None = None

    @property
    def worst_layer(self) -> LayerError | None:
        """The layer whose own error is largest, one that makes infinite or undefined values before all others."""
        return max(self.layers or (), key=lambda layer: math.inf if layer.alone is None else layer.alone, default=None)

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance."""
        return all(output.within for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        worst = self.worst_layer
        return {
            **dataclasses.asdict(self),
            "worst_layer": None if worst is None else worst.layer,
            "passed": self.passed,
        }


def verify(
    reference: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    *,
    inputs: str | os.PathLike[str] | Mapping[str, Array] | None = None,
    tolerance: float | None = None,
    layers: bool = False,
) -> Verification:
    """Compares a converted model with the model it came from, output by output.

    Args:
        reference: The model as it was.
        converted: The converted model; any other model with the same inputs and outputs will do.
        inputs: An ``.npz`` file or a mapping with one array per input, for one run. Without it, three runs on random
            inputs of the declared types and shapes.
        tolerance: Largest relative error that passes. By default what the weight type allows: 1e-4 for fp32 weights,
            2e-2 for bf16, 0.15 for int8, 0.6 for int4; of several types in one model, the loosest. An error beyond that
            is more than rounding. One within it, of int8 and int4, may still be too much for what the model is for. A
            model that was pruned when it was converted differs by more: that is no rounding error.
            A packed cache allows as much as bf16 weights: a model with one is given the tokens in calls of 64, and
            only its ``logits`` are compared.
        layers: Also compare the result of every sparse operator, each with the inputs that it has in ``reference`` and
            with those that it gets. Both models are in memory at once for that.

    Raises:
        SparamxError: A model cannot be read or run, or the inputs do not fit.
    """
    if tolerance is not None and not tolerance >= 0:
        raise SparamxError(f"the tolerance is {tolerance}; it must be 0 or more")
    models = [load_model(reference), load_model(converted)]
    packed = any(packed_caches(model.model) for model in models)
    source, runs = _inputs(models[0], inputs, with_past=not packed)
    record = conversion_record(models[1].model)
    if tolerance is None:
        tolerance = max(TOLERANCES.get(name, _UNKNOWN_TOLERANCE) for name in _weight_types(record))
        tolerance = max(tolerance, TOLERANCES["bf16"]) if packed else tolerance
    sessions = [(model.path, model.imports_our_domain) for model in models]
    of_layers = layer_errors(models[0], models[1], runs) if layers else None
    # One model in memory at a time: a pair of large ones need not fit side by side.
    del models
    if packed:
        expected, actual = (_logits(path, runs) for path, _ in sessions)
    else:
        expected, actual = (_outputs(path, sparse, runs) for path, sparse in sessions)
    names = list(expected[0])
    if list(actual[0]) != names:
        raise SparamxError(
            f"{os.fspath(reference)} and {os.fspath(converted)} cannot be compared: their outputs are"
            f" {', '.join(names)} and {', '.join(actual[0])}"
        )
    outputs = tuple(
        compare(name, [run[name] for run in expected], [run[name] for run in actual], tolerance) for name in names
    )
    pruned = record["method"] if record.get("sparsity") is not None else None
    return Verification(
        os.fspath(reference), os.fspath(converted), source, len(runs), tolerance, pruned, outputs, of_layers
    )


def _weight_types(record: Mapping[str, Any]) -> list[str]:
    """The types of packed weights that a conversion's record names; anybody may have written it."""
    kept = record.get(KEPT_KEY)
    return [str(record.get("weights")), *map(str, kept if isinstance(kept, list) else [])]


def _inputs(
    model: LoadedModel, inputs: str | os.PathLike[str] | Mapping[str, Array] | None, *, with_past: bool
) -> tuple[str, list[dict[str, Array]]]:
    if isinstance(inputs, Mapping):
        return "arrays", [check_inputs(inputs, model.model, "the given inputs")]
    if inputs is not None:
        return os.fspath(inputs), [read_npz(inputs, model.model)]
    # A decoder sees half of its context as cache, half as new tokens, so that both ways through it are compared.
    half = _GENERATED_LENGTH // 2
    decodes = with_past and is_decoder(model.model)
    sizes = {"length": half, "past": half} if decodes else {"length": _GENERATED_LENGTH}
    plan = plan_feeds(model.model, **sizes)
    return "generated", [plan.make(seed) for seed in range(_GENERATED_RUNS)]


def _outputs(path: Path, sparse: bool, runs: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
    session = open_quietly(path, sparse=sparse)
    return [_run(session, path, feeds) for feeds in runs]


def _logits(path: Path, runs: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
    """What a decoder says after each of its tokens; its cache, of whatever kind, begins empty."""
    found = []
    for feeds in runs:
        if "input_ids" not in feeds:
            raise SparamxError(f"{path}: has packed caches, and the inputs have no input_ids to begin them with")
        if any(array.ndim >= 3 and array.size for array in feeds.values()):
            raise SparamxError(f"{path}: has packed caches, so the inputs must not bring a past")
        tokens = feeds["input_ids"]
        session = DecoderSession(path, capacity=max(1, tokens.shape[-1]))
        parts = [session.append(tokens[:, at : at + BLOCK]) for at in range(0, tokens.shape[-1], BLOCK)]
        found.append({"logits": np.concatenate(parts, axis=1)})
    return found


def _run(session: onnxruntime.InferenceSession, path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    if missing := sorted(wanted - set(feeds)):
        raise SparamxError(f"{path}: it has an input '{missing[0]}' that the other model lacks")
    with in_one_sentence(f"{path}: ONNX Runtime fails on these inputs"):
        values = session.run(None, {name: array for name, array in feeds.items() if name in wanted})
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            raise SparamxError(f"{path}: output '{name}' is no tensor of numbers, which verify cannot compare")
    return dict(zip(names, values, strict=True))
