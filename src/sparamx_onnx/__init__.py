"""Run pruned transformers in ONNX Runtime at the speed and size that their zeros promise.

>>> import sparamx_onnx
>>> sparamx_onnx.convert("model.onnx")                          # writes model.sparse.onnx and its .data file
>>> session = sparamx_onnx.InferenceSession("model.sparse.onnx")

Importing this package loads neither onnx nor onnxruntime: each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from sparamx_onnx.benchmark import bench as bench
    from sparamx_onnx.conversion import convert as convert
    from sparamx_onnx.decoder import DecoderSession as DecoderSession
    from sparamx_onnx.generation_benchmark import bench_generation as bench_generation
    from sparamx_onnx.inspection import inspect as inspect
    from sparamx_onnx.ops.errors import SparamxError as SparamxError
    from sparamx_onnx.ops.library import get_library_path as get_library_path
    from sparamx_onnx.session import InferenceSession as InferenceSession
    from sparamx_onnx.session import register as register
    from sparamx_onnx.verification import verify as verify

_HOMES = {
    "DecoderSession": "sparamx_onnx.decoder",
    "InferenceSession": "sparamx_onnx.session",
    "SparamxError": "sparamx_onnx.ops.errors",
    "bench": "sparamx_onnx.benchmark",
    "bench_generation": "sparamx_onnx.generation_benchmark",
    "convert": "sparamx_onnx.conversion",
    "get_library_path": "sparamx_onnx.ops.library",
    "inspect": "sparamx_onnx.inspection",
    "register": "sparamx_onnx.session",
    "verify": "sparamx_onnx.verification",
}

__all__ = [
    "DecoderSession",
    "InferenceSession",
    "SparamxError",
    "__version__",
    "bench",
    "bench_generation",
    "convert",
    "get_library_path",
    "inspect",
    "register",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("sparamx-onnx")
        except PackageNotFoundError:  # the sources on a path, not installed
            return "0+unknown"
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
