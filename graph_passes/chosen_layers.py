"""Decides which of the linear layers that were found are converted, and how each of them is packed and pruned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from sparamx_onnx.graph_passes.fold_constants import NotConstant
from sparamx_onnx.graph_passes.kept_codes import KeptCodes, kept_codes
from sparamx_onnx.graph_passes.linear_layers import Found, LinearLayer
from sparamx_onnx.graph_passes.options import ConvertOptions, Method
from sparamx_onnx.graph_passes.packed_weight import Pruner
from sparamx_onnx.graph_passes.plan import Action, NodePlan, Reason
from sparamx_onnx.graph_passes.prune_calibrated import CalibratedPruner
from sparamx_onnx.graph_passes.prune_magnitude import prune_by_magnitude
from sparamx_onnx.graph_passes.rewrite_matmul import Chosen
from sparamx_onnx.graph_passes.spared_layers import exact_because, spared_because
from sparamx_onnx.ops.packing import QUANTIZED, PackOptions, WeightType


def choose_layers(found: Iterable[Found], options: ConvertOptions) -> Iterator[Chosen]:
    """The layers to convert; the plans of the others then say why they are left alone.

    Rules:

    1. What an exclude pattern matches is left alone, and, where there are include patterns, what none of them matches.
    2. A layer that rounding may ruin (``exact_because``) stays fp32, and what ``spared_because`` names is not pruned,
       unless an include pattern matches it.
    3. A quantized weight keeps its codes unless another type is asked for. One whose codes cannot be kept is converted
       only if a type is asked for.
    """
    for node in found:
        chosen = None if node.layer is None else _choose(node.layer, node.plan, options)
        if chosen is not None:
            yield chosen


def _choose(layer: LinearLayer, plan: NodePlan, options: ConvertOptions) -> Chosen | None:
    included, excluded = (_first_match(patterns, plan) for patterns in (options.include, options.exclude))
    exact = exact_because(layer) if included is None and not layer.static else ""
    codes: KeptCodes | NotConstant | None
    if excluded is not None:
        codes = NotConstant(Reason.EXCLUDED_BY_USER, f"It is {excluded}.")
    elif options.include and included is None:
        codes = NotConstant(Reason.NOT_INCLUDED_BY_USER)
    else:
        codes = None if exact else _codes_to_keep(layer, options)
    if isinstance(codes, NotConstant):
        plan.action, plan.reason, plan.detail = Action.LEFT_ALONE, codes.reason, codes.detail
        plan.bias, plan.epilogue, plan.absorbed = False, "none", ()
        return None
    if exact:
        packed_as = PackOptions(WeightType.FP32)
        plan.detail = f"{exact}, so it stays fp32."
    else:
        packed_as = options.pack_options if codes is None else codes.options
    plan.weight_type, plan.group_size = packed_as.weight_type.value, packed_as.group_size or None
    prune, prune_key = None, None
    sparsity = options.target_sparsity
    if sparsity is not None:
        plan.prune_note = "" if included is not None else spared_because(layer)
        plan.pruned = not plan.prune_note
    if plan.pruned and sparsity is not None:
        prune, prune_key = _pruner(options, sparsity), (options.method, sparsity)
        if options.prunes_by_calibration and options.method is not Method.WANDA:
            codes = None  # SparseGPT changes the weights that stay: they are quantized anew, in the same type
    plan.keeps_codes = codes is not None
    return Chosen(layer, plan, packed_as, prune, prune_key, codes)


def _pruner(options: ConvertOptions, sparsity: float) -> Pruner:
    if options.prunes_by_calibration:
        return CalibratedPruner(sparsity)
    return prune_by_magnitude(sparsity, options.pattern)


def _codes_to_keep(layer: LinearLayer, options: ConvertOptions) -> KeptCodes | NotConstant | None:
    """The codes that a layer's weight has and keeps, None where its values are packed, or why it is left alone."""
    type_is_open = options.weights is None
    if layer.static and (type_is_open or options.weights in QUANTIZED):
        return NotConstant(Reason.STATIC_ACTIVATIONS)
    if not layer.weight.is_quantized or not (type_is_open or options.weights in QUANTIZED):
        return None
    codes = kept_codes(layer.weight, layer.scale)
    if isinstance(codes, KeptCodes):
        return codes if type_is_open or codes.options.weight_type is options.weights else None
    return codes if type_is_open else None


def _first_match(patterns: Iterable[str], plan: NodePlan) -> str | None:
    """The first pattern that is found in a name of a layer."""
    names = [name for name in (plan.node, plan.weight, plan.scope) if name]
    return next((pattern for pattern in patterns if any(re.search(pattern, name) for name in names)), None)
