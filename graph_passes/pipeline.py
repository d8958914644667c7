"""The conversion of a model: which passes run, in which order, with which options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum, StrEnum, auto
from pathlib import Path
from typing import Final

import onnx_ir as ir

from sparamx_onnx.graph_passes.calibration import Runs
from sparamx_onnx.graph_passes.fold_constants import NotConstant
from sparamx_onnx.graph_passes.fuse_siblings import FuseSiblings, FuseSiblingsPass
from sparamx_onnx.graph_passes.inline_functions import inline_functions
from sparamx_onnx.graph_passes.kept_codes import KeptCodes, kept_codes
from sparamx_onnx.graph_passes.linear_layers import Found, LinearLayer, LinearLayerFinder
from sparamx_onnx.graph_passes.measure import QUANTIZED, Progress, measure, prune_by_magnitude
from sparamx_onnx.graph_passes.pack_cache import PackCachePass
from sparamx_onnx.graph_passes.packed_weight import Pruner
from sparamx_onnx.graph_passes.plan import Action, NodePlan, Plan, Reason
from sparamx_onnx.graph_passes.prune_calibrated import CalibratedPruner, CalibratedPruning
from sparamx_onnx.graph_passes.prune_magnitude import spared_because, zeros_wanted
from sparamx_onnx.graph_passes.prune_pattern import Pattern
from sparamx_onnx.graph_passes.rewrite_attention import RewriteAttentionPass
from sparamx_onnx.graph_passes.rewrite_matmul import Chosen, RewriteMatMulPass
from sparamx_onnx.graph_passes.routers import chooses_experts
from sparamx_onnx.graph_passes.taken_branches import with_taken_branches
from sparamx_onnx.ops import library
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packed_cache import CacheLayout, CacheOptions
from sparamx_onnx.ops.packing import (
    DEFAULT_GROUP_SIZE,
    GROUP_SIZES,
    PackOptions,
    ScaleType,
    WeightType,
)

VERSION_KEY: Final = "sparamx.version"
"""Key of the model's metadata under which the converter's version stands."""

OPTIONS_KEY: Final = "sparamx.options"
"""Key of the model's metadata under which the options of the conversion stand, as JSON."""

KEPT_KEY: Final = "kept"
"""Key of the options there, if quantized weights have kept their codes: the types of these."""

DEFAULT_SPARSITY: Final = 0.5

DEFAULT_CACHE: Final = CacheOptions(k_sparsity=0.3, v_sparsity=0.5, sink=64, recent=64)
"""How a packed cache is pruned by default (docs/quality.md says what that costs)."""

# What --only-if-faster asks for. A product with few activations takes as long as its weights take to be read; a gain
# below a tenth drowns in the difference between two runs.
_FASTER_BELOW = 0.9


_OUT_OF_REACH: Final = (
    "It is in the body of a Loop or Scan, or in a branch that is not taken in all calibration runs, where calibration "
    "does not look."
)


class Method(StrEnum):
    """How zeros come into the weights."""

    AUTO = "auto"
    KEEP = "keep"
    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    SPARSEGPT = "sparsegpt"


class Allocation(StrEnum):
    """How zeros are distributed over the layers."""

    UNIFORM = "uniform"
    SENSITIVITY = "sensitivity"


_CALIBRATED: Final = (Method.WANDA, Method.SPARSEGPT)


class Reading(Enum):
    """How much of the weights is read before they are packed."""

    NOTHING = auto()
    SAMPLES = auto()
    ALL = auto()


class AttentionMode(StrEnum):
    """What becomes of attention operators."""

    KEEP = "keep"
    FAST = "fast"
    PACKED = "packed"


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and how.

    Attributes:
        method: ``keep`` keeps the zeros that are there. ``magnitude`` sets the smallest weights to zero, which takes no
            calibration inputs and can ruin a model. ``wanda`` chooses the weights to set to zero by calibration inputs,
            and ``sparsegpt`` also changes the others to make up for them. ``auto`` is ``sparsegpt`` with calibration
            inputs and ``keep`` without.
        sparsity: The share of zeros that pruning aims at, at least 0 and below 1; None takes 0.5. Only for methods that
            prune, without a pattern.
        pattern: ``N:M`` (2:4, 4:8): of M consecutive weights of an output along K at most N are not zero. Only for
            methods that prune.
        allocation: ``uniform`` gives every pruned weight the same sparsity. ``sensitivity`` measures for which layers
            the model's outputs suffer less and gives them more of the zeros; for calibrated methods without a pattern.
        calibrated: Whether there are calibration inputs, which ``prune`` is then given.
        weights: The type of the packed weights: fp32, bf16, int8 or int4. The latter two quantize the weights when they
            are packed (after pruning, so zeros stay zeros), and the activations when the model runs. None takes bf16,
            but leaves weights that are quantized already in int8 or int4.
        group_size: int4 only: weights along K that share a scale, one of 16, 32, 64, 128 and 256; None takes 32.
            Smaller groups are more accurate and larger.
        scale_type: int4 only: fp16, which None takes, or fp32.
        include: Regular expressions; if there are any, only layers that one of them matches are converted. They are
            searched in the names of the node, of the weight and of the module it came from.
        exclude: Regular expressions; layers, and attention operators by name, that one of them matches are left alone.
        fuse_siblings: ``auto`` makes one operator of layers with the same input where that was measured to be faster,
            ``always`` wherever it can be done, ``never`` nowhere.
        attention: ``keep`` leaves attention operators; ``fast`` replaces those over a float cache by an operator that
            computes the same; ``packed`` does so, too, and gives it a cache in bf16, pruned as it grows old.
        k_sparsity: The part of old keys that is pruned, from 0 to below 1; None takes 0.3. This and the next three are
            for ``packed`` attention only.
        v_sparsity: The part of old values that is pruned; None takes 0.5.
        sink: So many first tokens are never pruned; None takes 64.
        recent: So many last tokens are not pruned yet; None takes 64.
        only_if_faster: Leave layers alone that would hardly be smaller than the dense weight is in float32.
        threads: Threads to pack with; 0 takes one per core. The result does not depend on it.
    """

    method: Method = Method.AUTO
    sparsity: float | None = None
    pattern: Pattern | None = None
    allocation: Allocation = Allocation.UNIFORM
    calibrated: bool = False
    weights: WeightType | None = None
    group_size: int | None = None
    scale_type: ScaleType | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    fuse_siblings: FuseSiblings = FuseSiblings.AUTO
    attention: AttentionMode = AttentionMode.KEEP
    k_sparsity: float | None = None
    v_sparsity: float | None = None
    sink: int | None = None
    recent: int | None = None
    only_if_faster: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuses options that contradict each other.

        Raises:
            SparamxError: Says which and why.
        """
        # Plain strings are welcome, as they come from a command line.
        kinds = {
            "method": Method,
            "allocation": Allocation,
            "weights": WeightType,
            "scale_type": ScaleType,
            "fuse_siblings": FuseSiblings,
            "attention": AttentionMode,
        }
        for name, kind in kinds.items():
            if getattr(self, name) is None:
                continue
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError:
                choices = ", ".join(kind)
                what = name.replace("_", " ")
                raise SparamxError(f"There is no {what} {getattr(self, name)!r}; there are {choices}.") from None
        text: object = self.pattern
        if isinstance(text, str):
            object.__setattr__(self, "pattern", Pattern.parse(text))
        self._check_scales()
        self._check_pruning()
        self._check_cache()
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                patterns = (patterns,)
            object.__setattr__(self, name, tuple(patterns))
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise SparamxError(f"The {name} pattern {pattern!r} is no regular expression: {error}.") from None

    def _check_pruning(self) -> None:
        method = self.method.value
        if self.method in _CALIBRATED and not self.calibrated:
            raise SparamxError(f"The method {method} needs calibration inputs.")
        if self.calibrated and not self.prunes_by_calibration:
            raise SparamxError(f"The method {method} takes no calibration inputs; choose sparsegpt, wanda or auto.")
        if not self.prunes and (self.sparsity is not None or self.pattern is not None):
            what = "sparsity" if self.sparsity is not None else "pattern"
            raise SparamxError(
                f"The method {method} keeps the weights as they are, so it takes no {what}; "
                f"give calibration inputs, or choose the method {Method.MAGNITUDE.value}."
            )
        if self.sparsity is not None:
            zeros_wanted(0, self.sparsity)
            if self.pattern is not None:
                raise SparamxError(f"The pattern {self.pattern} decides the sparsity; leave one of the two out.")
        if self.allocation is Allocation.SENSITIVITY:
            if not self.prunes_by_calibration:
                raise SparamxError("Sparsity by sensitivity needs calibration inputs.")
            if self.pattern is not None:
                raise SparamxError(f"The pattern {self.pattern} gives every layer the same sparsity.")

    def _check_cache(self) -> None:
        for name in asdict(DEFAULT_CACHE):
            if self.attention is not AttentionMode.PACKED and getattr(self, name) is not None:
                what = name.replace("_", " ")
                raise SparamxError(f"Only packed attention takes a {what}, not the mode {self.attention.value}.")
        CacheLayout(self.cache, key_size=1, value_size=1)

    def _check_scales(self) -> None:
        if self.weights is WeightType.INT4:
            if self.group_size is None:
                object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE)
            if self.group_size not in GROUP_SIZES:
                sizes = ", ".join(map(str, GROUP_SIZES))
                raise SparamxError(f"There is no group size {self.group_size}; there are {sizes}.")
            if self.scale_type is None:
                object.__setattr__(self, "scale_type", ScaleType.FP16)
            if self.scale_type is ScaleType.NONE:
                raise SparamxError("int4 weights need scales; there are fp16 and fp32.")
            return
        for value, what in ((self.group_size, "group size"), (self.scale_type, "scale type")):
            if value is not None:
                raise SparamxError(f"Only int4 weights take a {what}, not {self.weight_type.value} weights.")

    @property
    def weight_type(self) -> WeightType:
        """The type of the packed weights, but for those that are quantized already."""
        return WeightType.BF16 if self.weights is None else self.weights

    @property
    def pack_options(self) -> PackOptions:
        """How every weight is packed, but for those that are quantized already."""
        scales = ScaleType.NONE if self.scale_type is None else self.scale_type
        return PackOptions(
            weight_type=self.weight_type, scale_type=scales, group_size=self.group_size or 0, threads=self.threads
        )

    @property
    def cache(self) -> CacheOptions:
        """How the cache of packed attention is pruned."""
        given = {name: getattr(self, name) for name in asdict(DEFAULT_CACHE)}
        return replace(DEFAULT_CACHE, **{name: value for name, value in given.items() if value is not None})

    @property
    def prunes_by_calibration(self) -> bool:
        """Whether the method sets weights to zero by calibration inputs."""
        return self.calibrated and self.method in (Method.AUTO, *_CALIBRATED)

    @property
    def prunes(self) -> bool:
        """Whether the method sets weights to zero."""
        return self.method is Method.MAGNITUDE or self.prunes_by_calibration

    @property
    def target_sparsity(self) -> float | None:
        """The sparsity that pruning aims at; None where nothing is pruned."""
        if not self.prunes:
            return None
        if self.pattern is not None:
            return self.pattern.sparsity
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def to_json(self) -> dict[str, object]:
        """The options that decide about the result, as JSON values."""
        method = self.method
        if method is Method.AUTO:
            method = Method.SPARSEGPT if self.calibrated else Method.KEEP
        return {
            "method": method.value,
            "sparsity": self.target_sparsity,
            "pattern": None if self.pattern is None else str(self.pattern),
            "allocation": self.allocation.value if self.prunes_by_calibration else None,
            "calibrated": self.calibrated,
            "weights": self.weight_type.value,
            "group_size": self.group_size,
            "scale_type": None if self.scale_type is None else self.scale_type.value,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "fuse_siblings": self.fuse_siblings.value,
            "attention": self.attention.value,
            **(asdict(self.cache) if self.attention is AttentionMode.PACKED else {}),
            "only_if_faster": self.only_if_faster,
        }


def run(
    model: ir.Model, options: ConvertOptions, progress: Progress | None = None, *, reading: Reading = Reading.ALL
) -> Plan:
    """Rewrites a model in place. No weight is packed yet: ``write.save`` does that, and completes the plan.

    Args:
        model: The model; external tensors stay on disk.
        options: What to convert, and how.
        progress: Called while weights are measured.
        reading: How much of the weights to read, so that the plan tells their non-zeros and sizes. With ``NOTHING``
            these are None until the model is saved (which is all that a conversion needs). ``only_if_faster`` reads
            all of them.

    Returns:
        The plan: every MatMul, Gemm and relative, and every attention operator, with what happens to it and why.

    Raises:
        SparamxError: A weight cannot be read, or a node reads a value that nothing defines.
    """
    _check_values_are_defined(model)
    inline_functions(model)
    found = list(LinearLayerFinder(model).find())
    plan = Plan([node.plan for node in found], options.to_json())
    chosen = list(_choose(found, options))
    if reading is not Reading.NOTHING or options.only_if_faster:
        sampled = reading is Reading.SAMPLES and not options.only_if_faster
        measure(chosen, options.target_sparsity or 0.0, options.pattern, progress, sampled=sampled)
    if options.only_if_faster:
        chosen = [candidate for candidate in chosen if _is_faster(candidate.plan)]
    RewriteMatMulPass(chosen)(model)
    FuseSiblingsPass(chosen, options.fuse_siblings)(model)
    replaces = options.attention is not AttentionMode.KEEP
    rewrite_attention = RewriteAttentionPass(fast=replaces, exclude=options.exclude)
    rewrite_attention(model)
    plan.attention = rewrite_attention.plans
    if plan.changes:
        model.metadata_props[VERSION_KEY] = library.version()
        record = options.to_json()
        kept = {chosen.options.weight_type.value for chosen in chosen if chosen.codes is not None}
        if kept:
            record[KEPT_KEY] = sorted(kept)
        model.metadata_props[OPTIONS_KEY] = json.dumps(record, sort_keys=True)
    return plan


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
    """Prunes by calibration, where the options ask for it; between ``run`` and ``write.save``.

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
    if not options.prunes_by_calibration:
        return
    pruning = CalibratedPruning(
        with_taken_branches(model, runs),
        runs,
        folder,
        updates=options.method is not Method.WANDA,
        pattern=options.pattern,
        by_sensitivity=options.allocation is Allocation.SENSITIVITY,
        threads=options.threads,
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


def _choose(found: Iterable[Found], options: ConvertOptions) -> Iterable[Chosen]:
    """The layers that the user wants converted; the plans of the others say why they are not."""
    include = [re.compile(pattern) for pattern in options.include]
    exclude = [re.compile(pattern) for pattern in options.exclude]
    pack_options = options.pack_options
    sparsity = options.target_sparsity
    for node in found:
        layer, plan = node.layer, node.plan
        if layer is None:
            continue
        included = _first_match(include, plan)
        excluded = _first_match(exclude, plan)
        if excluded is not None:
            _leave_alone(plan, Reason.EXCLUDED_BY_USER, f"It is {excluded}.")
        elif include and included is None:
            _leave_alone(plan, Reason.NOT_INCLUDED_BY_USER)
        else:
            # Rounding may exchange two experts; a pattern that includes a router names it.
            stays_exact = chooses_experts(layer) and included is None and not layer.static
            codes = None if stays_exact else _codes_to_keep(layer, options)
            if isinstance(codes, NotConstant):
                _leave_alone(plan, codes.reason, codes.detail)
                continue
            if stays_exact:
                packed_as = PackOptions(WeightType.FP32, threads=options.threads)
                plan.detail = "It chooses experts, so it stays fp32."
            else:
                packed_as = pack_options if codes is None else replace(codes.options, threads=options.threads)
            plan.weight_type, plan.group_size = packed_as.weight_type.value, packed_as.group_size or None
            plan.keeps_codes = codes is not None
            chosen = Chosen(layer, plan, packed_as, codes=codes)
            if sparsity is not None:
                # A pattern that includes a layer names it.
                plan.prune_note = "" if included is not None else spared_because(layer)
                plan.pruned = not plan.prune_note
            if plan.pruned and sparsity is not None:
                chosen = replace(chosen, prune=_pruner(options, sparsity), prune_key=(options.method, sparsity))
                if options.prunes_by_calibration and options.method is not Method.WANDA and codes is not None:
                    # SparseGPT changes the weights that stay, so they are quantized anew, in the same type.
                    plan.keeps_codes, chosen = False, replace(chosen, codes=None)
            yield chosen


def _pruner(options: ConvertOptions, sparsity: float) -> Pruner:
    return (
        CalibratedPruner(sparsity) if options.prunes_by_calibration else prune_by_magnitude(sparsity, options.pattern)
    )


def _codes_to_keep(layer: LinearLayer, options: ConvertOptions) -> KeptCodes | NotConstant | None:
    """The codes that a layer's weight has and keeps, None where its values are packed, or why it is left alone.

    A quantized weight keeps its codes unless another type of weights is asked for. Where they cannot be kept, it is
    converted only if a type is asked for.
    """
    type_is_open = options.weights is None
    if layer.static and (type_is_open or options.weights in QUANTIZED):
        return NotConstant(Reason.STATIC_ACTIVATIONS)
    if not layer.weight.is_quantized or not (type_is_open or options.weights in QUANTIZED):
        return None
    codes = kept_codes(layer.weight, layer.scale)
    if isinstance(codes, KeptCodes):
        return codes if type_is_open or codes.options.weight_type is options.weights else None
    return codes if type_is_open else None


def _first_match(patterns: Iterable[re.Pattern[str]], plan: NodePlan) -> str | None:
    """The first pattern that is found in a name of a layer."""
    names = [name for name in (plan.node, plan.weight, plan.scope) if name]
    return next((pattern.pattern for pattern in patterns if any(pattern.search(name) for name in names)), None)


def _leave_alone(plan: NodePlan, reason: Reason, detail: str = "") -> None:
    plan.action, plan.reason, plan.detail = Action.LEFT_ALONE, reason, detail
    plan.bias, plan.epilogue, plan.absorbed = False, "none", ()
    plan.weight_type, plan.group_size, plan.pruned, plan.prune_note = None, None, False, ""
    plan.keeps_codes = False


def _is_faster(plan: NodePlan) -> bool:
    assert plan.k is not None
    assert plan.n is not None
    assert plan.bytes_after is not None
    # ONNX Runtime multiplies in float32, whatever type the file has.
    if plan.bytes_after <= _FASTER_BELOW * 4 * plan.k * plan.n:
        return True
    nnz = plan.nnz
    _leave_alone(plan, Reason.NOT_FASTER)
    plan.nnz, plan.bytes_after = nnz, None
    return False
