"""ONNX Runtime sessions that know the sparse operators."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import onnxruntime

from sparamx_onnx.ops import library
from sparamx_onnx.ops.errors import SparamxError


def register(session_options: onnxruntime.SessionOptions) -> None:
    """Makes the sparse operators known to every session that is created from these options.

    Calling it again with the same object does nothing.

    Args:
        session_options: The ``onnxruntime.SessionOptions`` to register in.

    Raises:
        SparamxError: The shared library is missing or ONNX Runtime refuses it.
    """
    library.register(session_options)


class InferenceSession(onnxruntime.InferenceSession):  # type: ignore[misc]
    """``onnxruntime.InferenceSession`` with the sparse operators registered and the CPU as the default provider."""

    def __init__(
        self,
        path_or_bytes: str | bytes | os.PathLike[str],
        sess_options: onnxruntime.SessionOptions | None = None,
        providers: Sequence[str | tuple[str, dict[Any, Any]]] | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        """Creates the session.

        Args:
            path_or_bytes: Path of a model, or its serialized bytes.
            sess_options: Options to use; the sparse operators are registered in them. New ones by default.
            providers: Execution providers in order of preference; only the CPU by default.
            provider_options: Options of the providers, as onnxruntime takes them.
            **kwargs: Passed to ``onnxruntime.InferenceSession``.

        Raises:
            SparamxError: The shared library is missing or ONNX Runtime refuses it.
            Exception: Whatever ONNX Runtime raises for a model that it cannot run.
        """
        options = onnxruntime.SessionOptions() if sess_options is None else sess_options
        register(options)
        if providers is None:
            providers = ["CPUExecutionProvider"]
            # With nothing but the CPU there is nothing to fall back to: a second try would only repeat the error.
            kwargs.setdefault("enable_fallback", 0)
        super().__init__(path_or_bytes, options, providers, provider_options, **kwargs)


def open_quietly(
    path: str | os.PathLike[str], *, sparse: bool, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Opens a model for ``verify`` and ``bench``: nothing of ONNX Runtime's log reaches the terminal.

    Args:
        path: The model.
        sparse: Whether it holds operators of ours. Others run without the library, as they do for their users.
        threads: Threads within an operator; ONNX Runtime's default if None.

    Raises:
        SparamxError: ONNX Runtime cannot run the model; says why.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    kind = InferenceSession if sparse else onnxruntime.InferenceSession
    try:
        return kind(os.fspath(path), options, ["CPUExecutionProvider"], enable_fallback=0)
    except SparamxError:
        raise
    except Exception as error:  # the exception types of ONNX Runtime derive from nothing more specific
        raise SparamxError(f"{os.fspath(path)}: ONNX Runtime cannot run this model: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, which is where ONNX Runtime says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
