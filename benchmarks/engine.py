"""The worker process of `models.py`: one model in one engine, and streaming reads of the same weights.

The parent (see rotation.py), whose process id is the only argument, sends one JSON object per line and gets one back:

- first the job, answered when the engine is there: {"engine", "model", "threads", "seed", "stream"}, where "engine" is
  onnxruntime, sparamx, openvino-bf16, openvino-f32 or deepsparse, and "stream" is null or {"library", "data", "begin",
  "end"};
- {"run": TIMES, "m": M}: seconds of each run with M rows; one more run before them is not counted;
- {"stream": TIMES, "loop": 0 or 1}: seconds of each read of the bytes [begin, end) of the mapped data file;
- {"output": PATH, "m": M}: writes the result as .npy.

Runs in environments of other engines too, so it imports nothing of theirs or ours before it must.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import worker
from numpy.typing import NDArray

Run = Callable[[], Any]
Matrix = NDArray[np.float32]

_POLL_SECONDS = 0.02
_IDLE_SHARE = 0.05
_LONGEST_WAIT_SECONDS = 5.0


class _Stream:
    """The bytes of one file range, mapped as ONNX Runtime maps them, and the loops of stream_read.cc over them."""

    def __init__(self, library: str, data: str, begin: int, end: int, threads: int) -> None:
        self._library = ctypes.CDLL(library)
        self._library.stream_pool_create.restype = ctypes.c_void_p
        self._library.stream_pool_create.argtypes = [ctypes.c_int]
        self._library.stream_read.restype = ctypes.c_uint64
        self._library.stream_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
        self._pool = self._library.stream_pool_create(threads)
        with Path(data).open("rb") as file:
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)[begin:end]

    def read(self, loop: int) -> float:
        start = time.perf_counter()
        self._library.stream_read(self._pool, self._bytes.ctypes.data, self._bytes.size, loop)
        return time.perf_counter() - start


class _OnnxRuntime:
    """Any number of rows in one session."""

    def __init__(self, model: str, threads: int, sparse: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if sparse:
            import sparamx_onnx

            sparamx_onnx.register(options)
        self._onnxruntime = onnxruntime
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.width = self._session.get_inputs()[0].shape[1]

    def prepare(self, x: Matrix) -> Run:
        feeds = {"X": self._onnxruntime.OrtValue.ortvalue_from_numpy(x)}
        return lambda: self._session.run_with_ort_values(["Y"], feeds)[0].numpy()


class _OpenVino:
    """Compiled again for every number of rows: what it does best."""

    def __init__(self, model: str, threads: int, precision: str) -> None:
        openvino = importlib.import_module("openvino")
        self._core = openvino.Core()
        self._model = self._core.read_model(model)
        self._settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.width = self._model.input(0).get_partial_shape()[1].get_length()
        self._request: Any = None

    def prepare(self, x: Matrix) -> Run:
        self._request = None  # one compiled copy of the weights at a time
        self._model.reshape(list(x.shape))
        self._request = self._core.compile_model(self._model, "CPU", self._settings).create_infer_request()
        return lambda: self._request.infer([x], share_inputs=True, share_outputs=True)[0]


class _DeepSparse:
    """Compiled again for every number of rows, as it must be."""

    def __init__(self, model: str, threads: int) -> None:
        os.environ["NM_DISABLE_ANALYTICS"] = "True"
        import onnx

        self._deepsparse = importlib.import_module("deepsparse")
        self._model, self._threads = model, threads
        graph = onnx.load(model, load_external_data=False).graph
        self.width = graph.input[0].type.tensor_type.shape.dim[1].dim_value
        self._engine: Any = None

    def prepare(self, x: Matrix) -> Run:
        self._engine = None
        self._engine = self._deepsparse.Engine(self._model, batch_size=x.shape[0], num_cores=self._threads)
        return lambda: self._engine.run([x], val_inp=False)[0]


def _open(engine: str, model: str, threads: int) -> _OnnxRuntime | _OpenVino | _DeepSparse:
    if engine.startswith("openvino-"):
        return _OpenVino(model, threads, engine.removeprefix("openvino-"))
    if engine == "deepsparse":
        return _DeepSparse(model, threads)
    return _OnnxRuntime(model, threads, sparse=engine == "sparamx")


def _wait_until_idle() -> None:
    """Returns when no thread of this process computes: ONNX Runtime's threads spin for a while after a run."""
    limit = time.monotonic() + _LONGEST_WAIT_SECONDS
    while time.monotonic() < limit:
        before = time.process_time()
        time.sleep(_POLL_SECONDS)
        if time.process_time() - before < _IDLE_SHARE * _POLL_SECONDS:
            return
    raise RuntimeError("the threads of the session do not come to rest, so a streaming read cannot be timed")


def start(job: Any) -> Callable[[Any], Any]:
    """Opens the engine; what answers requests."""
    engine = _open(job["engine"], job["model"], job["threads"])
    stream = _Stream(**job["stream"], threads=job["threads"]) if job["stream"] else None
    prepared: dict[int, Run] = {}

    def runner(m: int) -> Run:
        if m not in prepared:
            prepared.clear()
            rng = np.random.default_rng(job["seed"])
            prepared[m] = engine.prepare(rng.standard_normal((m, engine.width), np.float32))
        return prepared[m]

    def timed(run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def respond(request: Any) -> Any:
        if "run" in request:
            run = runner(request["m"])
            run()
            return [timed(run) for _ in range(request["run"])]
        if "stream" in request:
            assert stream is not None
            _wait_until_idle()
            return [stream.read(request["loop"]) for _ in range(request["stream"] + 1)][1:]
        np.save(request["output"], runner(request["m"])())
        return {"written": request["output"]}

    return respond


if __name__ == "__main__":
    worker.serve(start)
