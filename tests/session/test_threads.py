"""One session, many threads: the result never depends on who computed which part, or on how many there are."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest

import sparamx_onnx

CALLERS = 8
# Wide enough to be split along N, and narrow and deep enough to be split along K.
SHAPES = [(1536, 2048), (8192, 48)]
ROWS = [1, 3, 40]


def _session(serialized: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return sparamx_onnx.InferenceSession(serialized, options)


@pytest.fixture(scope="module", params=["bf16", "fp32", "int8", "int4"])
def serialized(
    request: pytest.FixtureRequest, make_layer: Callable[..., object], make_model: Callable[..., onnx.ModelProto]
) -> list[bytes]:
    models = []
    for k, n in SHAPES:
        for form in ("sparse", "dense"):
            layers = [make_layer(k, n, request.param, form, epilogue="gelu"), make_layer(n, 333, request.param, form)]
            models.append(make_model(layers).SerializeToString())
    return models


def _inputs(k: int) -> list[np.ndarray]:
    rng = np.random.default_rng(k)
    return [rng.standard_normal((rows, k), np.float32) for rows in ROWS for _ in range(2)]


def test_the_number_of_threads_does_not_change_a_bit(serialized: list[bytes]) -> None:
    for model in serialized:
        single = _session(model, 1)
        inputs = _inputs(single.get_inputs()[0].shape[1])
        expected = [single.run(None, {"x": x})[0] for x in inputs]
        assert all(np.isfinite(y).all() and y.any() for y in expected)
        for threads in (2, 3, 8):
            session = _session(model, threads)
            for x, y in zip(inputs, expected, strict=True):
                assert session.run(None, {"x": x})[0].tobytes() == y.tobytes(), (threads, x.shape)


def _complaints(
    session: onnxruntime.InferenceSession, inputs: list[np.ndarray], expected: list[bytes], callers: int
) -> list[str]:
    """Runs the inputs from many threads at once, each in another order; what went wrong."""
    start = threading.Barrier(callers)
    wrong: list[str] = []

    def call(caller: int) -> None:
        start.wait()
        for turn in range(2 * len(inputs)):
            index = (caller + turn) % len(inputs)
            try:
                y = session.run(None, {"x": inputs[index]})[0]
            except Exception as error:
                wrong.append(f"caller {caller}, turn {turn}: {error}")
                return
            if y.tobytes() != expected[index]:
                wrong.append(f"caller {caller}, turn {turn}: another result for input {index}")

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_eight_threads_that_share_a_session_get_what_one_gets(serialized: list[bytes]) -> None:
    for model in serialized:
        single = _session(model, 1)
        inputs = _inputs(single.get_inputs()[0].shape[1])
        expected = [single.run(None, {"x": x})[0].tobytes() for x in inputs]
        assert _complaints(_session(model, 3), inputs, expected, CALLERS) == []
