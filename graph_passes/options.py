"""What a conversion can be asked for, checked."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Final

from sparamx_onnx.graph_passes.fuse_siblings import FuseSiblings
from sparamx_onnx.graph_passes.prune_magnitude import zeros_wanted
from sparamx_onnx.graph_passes.prune_pattern import Pattern
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packed_cache import CacheLayout, CacheOptions
from sparamx_onnx.ops.packing import DEFAULT_GROUP_SIZE, GROUP_SIZES, PackOptions, ScaleType, WeightType

DEFAULT_SPARSITY: Final = 0.5

DEFAULT_CACHE: Final = CacheOptions(k_sparsity=0.3, v_sparsity=0.5, sink=64, recent=64)
"""How a packed cache is pruned by default (docs/quality.md says what that costs)."""


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


class AttentionMode(StrEnum):
    """What becomes of attention operators."""

    KEEP = "keep"
    FAST = "fast"
    PACKED = "packed"


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and how: the arguments of ``sparamx_onnx.convert``, which says what they mean and do by default.

    Of an enumeration or a pattern, its text is taken too.

    Attributes:
        calibrated: Whether there are calibration inputs, which ``pipeline.prune`` is then given.
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
                choices = ", ".join(choice for choice in kind if choice is not ScaleType.NONE)
                what = name.replace("_", " ")
                raise SparamxError(f"The {what} must be one of {choices}, not {getattr(self, name)!r}.") from None
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
                raise SparamxError(f"The group size must be one of {sizes}, not {self.group_size}.")
            if self.scale_type is None:
                object.__setattr__(self, "scale_type", ScaleType.INT8)
            if self.scale_type is ScaleType.NONE:
                raise SparamxError("int4 weights need scales; there are int8, fp16 and fp32.")
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
        return PackOptions(weight_type=self.weight_type, scale_type=scales, group_size=self.group_size or 0)

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
        }
