"""ONNX Runtime sessions that know the sparse operators."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import onnxruntime

from sparamx_onnx.ops import library


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
