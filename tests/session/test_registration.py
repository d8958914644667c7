"""The library in ONNX Runtime sessions: registered once, twice, by hand, and not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import sparamx_onnx
from sparamx_onnx.ops.packing import unpack

X = np.random.default_rng(0).standard_normal((3, 64), np.float32)


@pytest.fixture(scope="module")
def layer(make_layer: Callable[..., object]) -> object:
    return make_layer(64, 48, "fp32")


@pytest.fixture(scope="module")
def serialized(layer: object, make_model: Callable[..., onnx.ModelProto]) -> bytes:
    return make_model([layer]).SerializeToString()


@pytest.fixture(scope="module")
def expected(layer: object) -> np.ndarray:
    return X @ unpack(layer.blob)  # type: ignore[attr-defined]


def _check(session: onnxruntime.InferenceSession, expected: np.ndarray) -> None:
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_registering_twice_on_one_object(serialized: bytes, expected: np.ndarray) -> None:
    options = onnxruntime.SessionOptions()
    sparamx_onnx.register(options)
    sparamx_onnx.register(options)
    _check(onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"]), expected)


def test_registering_on_two_objects(serialized: bytes, expected: np.ndarray) -> None:
    sessions = []
    for _ in range(2):
        options = onnxruntime.SessionOptions()
        sparamx_onnx.register(options)
        sessions.append(onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"]))
    for session in sessions:
        _check(session, expected)


def test_objects_that_come_and_go(serialized: bytes, expected: np.ndarray) -> None:
    # A new object may get the address of one that is gone: what was registered there must not count for it.
    for _ in range(50):
        options = onnxruntime.SessionOptions()
        sparamx_onnx.register(options)
        _check(onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"]), expected)
        del options


def test_registering_after_somebody_did_it_by_hand_twice(serialized: bytes, expected: np.ndarray) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(sparamx_onnx.get_library_path())
    options.register_custom_ops_library(sparamx_onnx.get_library_path())
    sparamx_onnx.register(options)
    _check(onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"]), expected)


def test_the_drop_in_session_from_bytes_and_from_a_path(
    serialized: bytes, expected: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "m.onnx").write_bytes(serialized)
    for source in (serialized, tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        session = sparamx_onnx.InferenceSession(source)
        assert isinstance(session, onnxruntime.InferenceSession)
        assert session.get_providers() == ["CPUExecutionProvider"]
        _check(session, expected)


def test_the_drop_in_session_takes_what_the_original_takes(serialized: bytes, expected: np.ndarray) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for _ in range(2):  # the same options again
        session = sparamx_onnx.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        assert session.get_session_options().intra_op_num_threads == 1
        _check(session, expected)
    _check(sparamx_onnx.InferenceSession(serialized, sess_options=options, disabled_optimizers=["NoSuch"]), expected)


def test_a_session_without_the_library_says_what_it_lacks(serialized: bytes) -> None:
    with pytest.raises(Exception, match=r"com\.sparamx:SparseAMXMatMul\(-1\) is not a registered function/op"):
        onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("content", "words"), [(None, "is not a file"), (b"no library", "cannot load")])
def test_a_library_that_is_not_there(
    tmp_path: Path, serialized: bytes, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    path = tmp_path / "libother.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("SPARAMX_LIBRARY", str(path))
    attempts = [
        lambda: sparamx_onnx.register(onnxruntime.SessionOptions()),
        lambda: sparamx_onnx.InferenceSession(serialized),
    ]
    for attempt in attempts:
        with pytest.raises(sparamx_onnx.SparamxError, match=words) as caught:
            attempt()
        assert str(path) in str(caught.value)


def test_the_library_path_is_absolute_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(sparamx_onnx.get_library_path())
    assert path.is_absolute()
    assert path.is_file()
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("SPARAMX_LIBRARY", path.name)
    assert Path(sparamx_onnx.get_library_path()) == path


def test_importing_the_package_loads_neither_onnx_nor_onnxruntime() -> None:
    script = "import sys, sparamx_onnx; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert not {"numpy", "onnx", "onnx_ir", "onnxruntime", "rich"} & set(result.stdout.split())


def test_every_public_name_is_there() -> None:
    assert set(sparamx_onnx.__all__) <= set(dir(sparamx_onnx))
    for name in sparamx_onnx.__all__:
        assert getattr(sparamx_onnx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparamx_onnx.nonsense


def test_an_unsupported_level_is_an_error_that_names_it(serialized: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARAMX_ISA", "mmx")
    with pytest.raises(Exception, match="SPARAMX_ISA=mmx"):
        sparamx_onnx.InferenceSession(serialized)
