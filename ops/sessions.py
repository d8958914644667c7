"""Opens ONNX Runtime sessions for the package's own use."""

from __future__ import annotations

import os
from collections.abc import Mapping

import onnxruntime

from sparamx_onnx.ops import library
from sparamx_onnx.ops.errors import in_one_sentence


def open_quietly(
    model: str | os.PathLike[str] | bytes,
    *,
    complaint: str | None = None,
    sparse: bool = True,
    threads: int | None = None,
    config: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Opens a model on the CPU; nothing of ONNX Runtime's log reaches the terminal.

    Args:
        model: Path of a model, or its serialized bytes.
        complaint: What to say if that fails; the reason follows it. By default the path, and that it cannot be run.
        sparse: Whether it holds operators of ours. Others run without the library, as they do for their users.
        threads: Threads within an operator; None or 0 for ONNX Runtime's default.
        config: Further entries of the session's configuration.

    Raises:
        SparamxError: ONNX Runtime cannot run the model, or the shared library is missing.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if sparse:
        library.register(options)
    source = model if isinstance(model, bytes) else os.fspath(model)
    with in_one_sentence(complaint or f"{source!s}: ONNX Runtime cannot run this model"):
        return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"], enable_fallback=0)
