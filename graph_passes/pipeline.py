"""The conversion of a model: which passes run, and in which order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

import onnx_ir as ir

from sparamx_onnx.graph_passes.calibration import Runs
from sparamx_onnx.graph_passes.chosen_layers import choose_layers
from sparamx_onnx.graph_passes.fuse_siblings import FuseSiblingsPass
from sparamx_onnx.graph_passes.inline_functions import inline_functions
from sparamx_onnx.graph_passes.linear_layers import LinearLayerFinder
from sparamx_onnx.graph_passes.measure import Progress, measure
from sparamx_onnx.graph_passes.options import Allocation, AttentionMode, ConvertOptions, Method
from sparamx_onnx.graph_passes.pack_cache import PackCachePass
from sparamx_onnx.graph_passes.plan import Action, Plan
from sparamx_onnx.graph_passes.prune_calibrated import CalibratedPruning
from sparamx_onnx.graph_passes.rewrite_attention import RewriteAttentionPass
from sparamx_onnx.graph_passes.rewrite_matmul import Chosen, RewriteMatMulPass
from sparamx_onnx.graph_passes.taken_branches import with_taken_branches
from sparamx_onnx.ops import library
from sparamx_onnx.ops.errors import SparamxError

VERSION_KEY: Final = "sparamx.version"
"""Key of the model's metadata under which the converter's version stands."""

OPTIONS_KEY: Final = "sparamx.options"
"""Key of the model's metadata under which the options of the conversion stand, as JSON."""

KEPT_KEY: Final = "kept"
"""Key of the options there, if quantized weights have kept their codes or were packed before: the types of these."""

_OPTIONS_OF_WEIGHTS: Final = ("method", "sparsity", "pattern", "allocation", "calibrated", "weights", "group_size",
                              "scale_type")  # fmt: skip

_OUT_OF_REACH: Final = (
    "It is in the body of a Loop or Scan, or in a branch that is not taken in all calibration runs, where calibration "
    "does not look."
)


class Reading(Enum):
    """How much of the weights is read before they are packed."""

    NOTHING = auto()
    SAMPLES = auto()
    ALL = auto()


def run(
    model: ir.Model, options: ConvertOptions, progress: Progress | None = None, *, reading: Reading = Reading.ALL
) -> Plan:
    """Rewrites a model in place. No weight is packed yet: ``write.save`` does that, and completes the plan.

    Args:
        model: The model; external tensors stay on disk.
        options: What to convert, and how.
        progress: Called while weights are measured.
        reading: How much of the weights to read, so that the plan tells their non-zeros and sizes. With ``NOTHING``
            these are None until the model is saved (which is all that a conversion needs).

    Returns:
        The plan: every MatMul, Gemm and relative, and every attention operator, with what happens to it and why.

    Raises:
        SparamxError: A weight cannot be read, or a node reads a value that nothing defines.
    """
    _check_values_are_defined(model)
    inline_functions(model)
    found = list(LinearLayerFinder(model).find())
    plan = Plan([node.plan for node in found], options.to_json())
    chosen = list(choose_layers(found, options))
    if reading is not Reading.NOTHING:
        sampled = reading is Reading.SAMPLES
        measure(chosen, options.target_sparsity or 0.0, options.pattern, progress, sampled=sampled)
    RewriteMatMulPass(chosen)(model)
    FuseSiblingsPass(chosen, options.fuse_siblings)(model)
    replaces = options.attention is not AttentionMode.KEEP
    rewrite_attention = RewriteAttentionPass(fast=replaces, exclude=options.exclude)
    rewrite_attention(model)
    plan.attention = rewrite_attention.plans
    # The products inside an attention that was replaced are gone: nobody leaves them alone.
    plan.nodes = [one.plan for one in found if one.plan.action is not Action.LEFT_ALONE or one.node.graph is not None]
    if plan.changes:
        model.metadata_props[VERSION_KEY] = library.version()
        _record_types(model, plan, chosen)
        model.metadata_props[OPTIONS_KEY] = json.dumps(plan.options, sort_keys=True)
    return plan


def _record_types(model: ir.Model, plan: Plan, chosen: Sequence[Chosen]) -> None:
    """Notes what the options do not say of the packed weights, some of which an earlier conversion may have packed."""
    kept = {one.options.weight_type.value for one in chosen if one.codes is not None}
    kept |= {node.weight_type for node in plan.already_converted if node.weight_type is not None}
    if kept:
        plan.options[KEPT_KEY] = sorted(kept)
    if not chosen:  # attention alone is new: how weights were packed and pruned is what it was
        earlier = recorded_options(model)
        plan.options.update({name: earlier[name] for name in _OPTIONS_OF_WEIGHTS if name in earlier})


def recorded_options(model: ir.Model) -> dict[str, Any]:
    """The options of the last conversion as they stand in a model's metadata; empty where there are none."""
    try:
        options = json.loads(model.metadata_props.get(OPTIONS_KEY, "{}"))
    except ValueError:
        return {}
    return options if isinstance(options, dict) else {}


def pack_caches(model: ir.Model, plan: Plan, options: ConvertOptions) -> None:
    """Gives packed attention its cache, where the options ask for it; after ``prune``, whose inputs are the original's.

    Args:
        model: What ``run`` has rewritten.
        plan: What ``run`` returned; completed by what becomes of each cache.
        options: The same as for ``run``.
    """
    if options.attention is AttentionMode.PACKED:
        PackCachePass(options.cache, plan.attention)(model)


def prune(
    model: ir.Model, plan: Plan, options: ConvertOptions, runs: Runs, folder: Path, progress: Progress | None = None
) -> None:
    """Prunes by calibration, which the options must ask for; between ``run`` and ``write.save``.

    Args:
        model: What ``run`` has rewritten.
        plan: What ``run`` returned; completed by the error of each pruned layer.
        options: The same as for ``run``.
        runs: The calibration inputs: for each run of the model, one array per input by name.
        folder: For the pruned weights, which must stay there until the model is saved, and for intermediate results.
        progress: Called with steps done and steps in total.

    Raises:
        SparamxError: ONNX Runtime cannot run the model on the inputs, or a weight cannot be read or pruned.
    """
    pruning = CalibratedPruning(
        with_taken_branches(model, runs),
        runs,
        folder,
        updates=options.method is not Method.WANDA,
        pattern=options.pattern,
        by_sensitivity=options.allocation is Allocation.SENSITIVITY,
        progress=progress,
    )
    errors = pruning.run()
    for node in plan.converted:
        node.error = errors.get(node.shared or "")
        if node.pruned and node.error is None:
            node.pruned, node.prune_note = False, _OUT_OF_REACH


def _check_values_are_defined(model: ir.Model) -> None:
    """Refuses what onnx_ir cannot represent: it drops sparse initializers, so they would be missing when saved."""
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            for value in node.inputs:
                if value is not None and not _is_defined(value):
                    raise SparamxError(
                        f"Nothing defines the value '{value.name}' that the node '{node.name}' reads "
                        "(sparse initializers are not supported)."
                    )
    for graph in model.graphs():
        for value in graph.outputs:
            if not _is_defined(value):
                raise SparamxError(f"Nothing defines the output '{value.name}' of the graph '{graph.name}'.")


def _is_defined(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()
