"""Says what of a model could be converted, or what has been, without changing anything."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from sparamx_onnx.environment import kernels_here
from sparamx_onnx.graph_passes import pipeline
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.pack_cache import PackedCache, packed_caches
from sparamx_onnx.graph_passes.plan import Plan
from sparamx_onnx.loading import load_model
from sparamx_onnx.progress import Report, byte_report

_FP32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Result of ``inspect``.

    Attributes:
        model: Path of the model.
        bytes_on_disk: Size of the model file and of its external data.
        record: What conversion recorded in the model: ``version`` and its options; empty if it was not converted.
        converted: Sparse operators in it.
        plan: Every MatMul, Gemm and relative: what has become of it, or what ``convert`` would do with it.
        caches: The packed caches of its attention.
        kernels: For every type of packed weights in it, what runs them on this CPU: by M from which on, the kernel.
    """

    model: str
    bytes_on_disk: int
    record: Mapping[str, Any]
    converted: int
    plan: Plan
    caches: tuple[PackedCache, ...]
    kernels: Mapping[str, Mapping[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "model": self.model,
            "bytes_on_disk": self.bytes_on_disk,
            "record": dict(self.record),
            "converted": self.converted,
            "caches": [dataclasses.asdict(cache) for cache in self.caches],
            "kernels": {kind: dict(paths) for kind, paths in self.kernels.items()},
            **self.plan.to_json(),
        }


def inspect(model: str | os.PathLike[str], *, progress: Report | None = None) -> Inspection:
    """Looks at every matrix product of a model.

    Of a dense weight the zeros are counted, and the size that it would have with bf16 weights is worked out. Of a
    packed weight its own description is read; its size before is that of a dense fp32 matrix.

    Args:
        model: An ONNX file, converted or not.
        progress: Called with (done, total, what is going on) while weights are read.

    Raises:
        SparamxError: The model cannot be read.
    """
    loaded = load_model(model)
    record = conversion_record(loaded.model)
    caches = tuple(packed_caches(loaded.model))
    plan = pipeline.run(loaded.model, ConvertOptions(), byte_report(progress, "reading weights"))
    for node in plan.already_converted:
        if node.k is not None and node.n is not None:
            node.bytes_before = _FP32_BYTES * node.k * node.n
    return Inspection(
        os.fspath(model), loaded.bytes_on_disk, record, len(plan.already_converted), plan, caches, kernels_here(plan)
    )


def conversion_record(model: ir.Model) -> dict[str, Any]:
    """The converter's version and options as they stand in a model's metadata; empty where there are none."""
    version = model.metadata_props.get(pipeline.VERSION_KEY)
    if version is None:
        return {}
    return {"version": version, **pipeline.recorded_options(model)}
