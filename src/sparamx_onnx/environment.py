"""What this installation is and what this machine can run."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import onnxruntime

import sparamx_onnx
from sparamx_onnx.graph_passes.plan import Plan
from sparamx_onnx.ops import library


@dataclasses.dataclass(frozen=True)
class Environment:
    """Result of ``environment``.

    Attributes:
        version: Version of the Python package.
        library: Path of the shared library, to be registered in any session.
        library_version: What the library says of itself.
        onnxruntime: Version of the installed ONNX Runtime.
        python: Version of Python.
        cpu: Name and features of the CPU, the instruction-set ``levels`` with ``supported`` and ``reason``, the
            ``level`` in force and its ``reason``, the ``kernels`` that will run, that of ``attention``, and the level
            that is ``forced``.
    """

    version: str
    library: str
    library_version: str
    onnxruntime: str
    python: str
    cpu: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)


def kernels_here(plan: Plan) -> dict[str, dict[str, str]]:
    """The kernels that run a plan's packed weights on this CPU: weight type -> M from which on -> kernel.

    Empty where no kernel can run, because SPARAMX_ISA asks for a level that the CPU lacks.

    Raises:
        SparamxError: The shared library is missing or cannot be loaded.
    """
    types = {node.weight_type for node in plan if node.weight_type}
    kernels: dict[str, dict[str, str]] = library.cpu_info()["kernels"]
    return {kind: paths for kind, paths in kernels.items() if kind in types}


def environment() -> Environment:
    """Looks at the installation and asks the library about the CPU.

    Raises:
        SparamxError: The shared library is missing or cannot be loaded.
    """
    return Environment(
        version=sparamx_onnx.__version__,
        library=library.get_library_path(),
        library_version=library.version(),
        onnxruntime=onnxruntime.__version__,
        python=platform.python_version(),
        cpu=library.cpu_info(),
    )
