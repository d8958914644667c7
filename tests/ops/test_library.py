"""Finding, loading and registering the shared library."""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import sparamx_onnx
from sparamx_onnx.ops import library, packing
from sparamx_onnx.ops.errors import SparamxError, in_one_sentence


def test_the_installed_library_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    path = Path(library.get_library_path())
    assert path.is_absolute()
    assert path.name == library.LIBRARY_NAME
    assert path.is_file()


def test_the_environment_names_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "mine.so"
    shutil.copy(library.get_library_path(), copy)
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(copy))
    assert library.get_library_path() == str(copy)
    assert library.load()._name == str(copy)


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(SparamxError, match=r"^SPARAMX_LIBRARY names .*none\.so, which is not a file\.$"):
        library.get_library_path()


def test_no_library_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(library, "_installed_places", lambda: iter([Path("/nowhere/lib.so")]))
    with pytest.raises(SparamxError, match="is not installed with sparamx_onnx"):
        library.get_library_path()


def test_sources_on_a_path_have_neither_a_library_nor_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert [path.name for path in library._installed_places()] == [library.LIBRARY_NAME]
    assert sparamx_onnx.__version__ == "0+unknown"


def test_an_error_of_ours_stays_as_it_is() -> None:
    with pytest.raises(SparamxError, match=r"^the reason$"), in_one_sentence("what cannot be done"):
        raise SparamxError("the reason")


def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library")
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(text))
    with pytest.raises(SparamxError, match=r"^The shared library .*text\.so cannot be loaded: "):
        packing.pack(np.ones((2, 2), np.float32), packing.PackOptions())
    with pytest.raises(SparamxError, match="ONNX Runtime cannot load the shared library"):
        library.register(onnxruntime.SessionOptions())


def test_a_library_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(Path(np.__file__).parent.rglob("_multiarray_umath*.so"))
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(other))
    with pytest.raises(SparamxError, match="is not the one of this package"):
        library.load()


def test_registering_twice_does_nothing() -> None:
    options = onnxruntime.SessionOptions()
    library.register(options)
    library.register(options)
    library.register(onnxruntime.SessionOptions())


def test_registering_after_the_user_did() -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library.get_library_path())
    library.register(options)


def test_registration_does_not_keep_options_alive() -> None:
    before = len(library._registered)
    options = onnxruntime.SessionOptions()
    library.register(options)
    assert len(library._registered) == before + 1
    del options
    assert len(library._registered) == before


_GetApi = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
_GetVersion = ctypes.CFUNCTYPE(ctypes.c_void_p)


class _Runtime(ctypes.Structure):
    """OrtApiBase, what a runtime hands to a library of operators."""

    _fields_ = (("get_api", _GetApi), ("get_version", _GetVersion))


def test_a_second_runtime_in_the_process() -> None:
    """Python's module and the library beside it are two runtimes of one version; of another one, objects differ."""
    options = onnxruntime.SessionOptions()  # they keep the library in the process
    library.register(options)
    path = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    get_base = ctypes.CDLL(str(path)).OrtGetApiBase
    get_base.restype = ctypes.POINTER(_Runtime)
    real = get_base().contents
    register = ctypes.CDLL(library.get_library_path()).RegisterCustomOps
    register.argtypes, register.restype = [ctypes.c_void_p, ctypes.POINTER(_Runtime)], ctypes.c_void_p
    version = ctypes.create_string_buffer(b"1.21.99")
    other = _Runtime(real.get_api, _GetVersion(lambda: ctypes.addressof(version)))
    # A status is of the runtime's, whose third function gives its text.
    status = register(None, ctypes.byref(other))
    assert status is not None
    functions = ctypes.cast(real.get_api(21), ctypes.POINTER(ctypes.c_void_p))
    message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(functions[2])(status)
    assert message.decode() == (
        f"sparamx-onnx serves ONNX Runtime {onnxruntime.__version__} in this process, "
        "and cannot serve another version beside it"
    )


def test_cpu_info_names_every_level() -> None:
    info = library.cpu_info()
    levels = {level["name"]: level for level in info["levels"]}
    assert levels["scalar"]["supported"] is True
    assert info["level"] in levels
    assert all(level["supported"] or level["reason"] for level in levels.values())


def test_version_is_a_version() -> None:
    assert library.version()[0].isdigit()
