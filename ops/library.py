"""Finds and loads the shared library, and registers its operators in ONNX Runtime sessions."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from sparamx_onnx.ops.errors import SparamxError

LIBRARY_NAME = "libsparamx_onnx.so"
LIBRARY_VARIABLE = "SPARAMX_LIBRARY"

_ERROR_BYTES = 1024


class Matrix(ctypes.Structure):
    """``sparamx_matrix``: element (k, n) stands at ``data[k * stride_k + n * stride_n]``, strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("k", ctypes.c_uint64),
        ("n", ctypes.c_uint64),
        ("stride_k", ctypes.c_int64),
        ("stride_n", ctypes.c_int64),
        ("source_type", ctypes.c_uint32),
    ]


class PackOptionsStruct(ctypes.Structure):
    """``sparamx_pack_options``."""

    _fields_ = [
        ("weight_type", ctypes.c_uint32),
        ("form", ctypes.c_uint32),
        ("scale_type", ctypes.c_uint32),
        ("group_size", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("scales", ctypes.c_void_p),
    ]


class Description(ctypes.Structure):
    """``sparamx_description``."""

    _fields_ = [
        ("k", ctypes.c_uint64),
        ("n", ctypes.c_uint64),
        ("nnz", ctypes.c_uint64),
        ("blob_bytes", ctypes.c_uint64),
        ("format_version", ctypes.c_uint32),
        ("weight_type", ctypes.c_uint32),
        ("form", ctypes.c_uint32),
        ("scale_type", ctypes.c_uint32),
        ("group_size", ctypes.c_uint32),
        ("run_k", ctypes.c_uint32),
    ]


# Function: argument types, without the (char* error, size_t error_size) that every function of this table ends with.
_STATUS_FUNCTIONS: dict[str, list[Any]] = {
    "sparamx_packed_size": [
        ctypes.POINTER(Matrix),
        ctypes.POINTER(PackOptionsStruct),
        ctypes.POINTER(ctypes.c_uint64),
    ],
    "sparamx_pack": [
        ctypes.POINTER(Matrix),
        ctypes.POINTER(PackOptionsStruct),
        ctypes.c_void_p,
        ctypes.c_uint64,
    ],
    "sparamx_validate": [ctypes.c_void_p, ctypes.c_uint64],
    "sparamx_describe": [ctypes.c_void_p, ctypes.c_uint64, ctypes.POINTER(Description)],
    "sparamx_unpack": [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint32],
    "sparamx_matmul": [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_char_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ],
}


class _SessionOptions(Protocol):
    def register_custom_ops_library(self, path: str, /) -> None: ...


def get_library_path() -> str:
    """The absolute path of the shared library, for ``SessionOptions.register_custom_ops_library`` in any language.

    The environment variable ``SPARAMX_LIBRARY`` wins over the installed library.

    Raises:
        SparamxError: There is no such file.
    """
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        path = Path(override).absolute()
        if not path.is_file():
            raise SparamxError(f"{LIBRARY_VARIABLE} names {override}, which is not a file.")
        return str(path)
    for path in _installed_places():
        if path.is_file():
            return str(path.absolute())
    raise SparamxError(
        f"The shared library {LIBRARY_NAME} is not installed with sparamx_onnx; reinstall the package, "
        f"or set {LIBRARY_VARIABLE} to the library's path."
    )


def _installed_places() -> Iterator[Path]:
    package = importlib.import_module("sparamx_onnx")
    for folder in package.__path__:
        yield Path(folder) / "lib" / LIBRARY_NAME
    # An editable install keeps the sources and the built library in different folders.
    try:
        distribution = importlib.metadata.distribution("sparamx-onnx")
    except importlib.metadata.PackageNotFoundError:
        return
    yield Path(str(distribution.locate_file(f"sparamx_onnx/lib/{LIBRARY_NAME}")))


def load() -> ctypes.CDLL:
    """The shared library with the types of its C interface declared; loaded once per path.

    Raises:
        SparamxError: It is missing, cannot be loaded, or lacks a function of the interface.
    """
    return _load(get_library_path())


@functools.cache
def _load(path: str) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise SparamxError(f"The shared library {path} cannot be loaded: {error}.") from error
    try:
        for name, arguments in _STATUS_FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes = [*arguments, ctypes.c_char_p, ctypes.c_size_t]
            function.restype = ctypes.c_int
        library.sparamx_version.argtypes = []
        library.sparamx_version.restype = ctypes.c_char_p
        library.sparamx_cpu_info.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        library.sparamx_cpu_info.restype = ctypes.c_size_t
    except AttributeError as error:
        raise SparamxError(f"The shared library {path} is not the one of this package: {error}.") from error
    return library


def call(name: str, *arguments: object) -> None:
    """Calls a function of the C interface that returns a status.

    Args:
        name: The function, e.g. ``sparamx_validate``.
        *arguments: Its arguments, without the error buffer and its size.

    Raises:
        SparamxError: The status is not OK; the message is the library's own sentence.
    """
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    status = getattr(load(), name)(*arguments, error, _ERROR_BYTES)
    if status != 0:
        message = error.value.decode("utf-8", "replace")
        raise SparamxError(message or f"{name} failed with status {status}.")


def version() -> str:
    """The version of the shared library."""
    return cast(bytes, load().sparamx_version()).decode()


def cpu_info() -> dict[str, Any]:
    """CPU name, features, every instruction-set level (supported or why not), the level in force and why."""
    library = load()
    size = library.sparamx_cpu_info(None, 0) + 1
    buffer = ctypes.create_string_buffer(size)
    library.sparamx_cpu_info(buffer, size)
    return cast(dict[str, Any], json.loads(buffer.value.decode()))


_registered: weakref.WeakSet[Any] = weakref.WeakSet()


def register(session_options: _SessionOptions) -> None:
    """Registers the operators in ``onnxruntime.SessionOptions``; a second call with the same object does nothing.

    Raises:
        SparamxError: The library is missing, or ONNX Runtime refuses it; says why.
    """
    if session_options in _registered:
        return
    path = get_library_path()
    try:
        session_options.register_custom_ops_library(path)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        # Registered by other means (a path from get_library_path): the operators are there, which is what was asked.
        if "already set in registry" not in str(error):
            raise SparamxError(f"ONNX Runtime cannot load the shared library {path}: {error}") from error
    _registered.add(session_options)
