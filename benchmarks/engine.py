"""The worker process of `layer.py`: one model in one ONNX Runtime session, and streaming reads of the same weights.

The parent (see rotation.py), whose process id is the only argument, sends one JSON object per line and gets one back:

- first the job, answered when the model is loaded: {"model", "sparse", "threads", "seed", "stream"}, where "stream" is
  null or {"library", "data", "begin", "end"};
- {"run": TIMES, "m": M}: seconds of each run with M rows; one more run before them is not counted;
- {"stream": TIMES, "loop": 0 or 1}: seconds of each read of the bytes [begin, end) of the mapped data file;
- {"output": PATH, "m": M}: writes the result as .npy.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import sparamx_onnx

_PR_SET_PDEATHSIG = 1
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


def _wait_until_idle() -> None:
    """Returns when no thread of this process computes: ONNX Runtime's threads spin for a while after a run."""
    limit = time.monotonic() + _LONGEST_WAIT_SECONDS
    while time.monotonic() < limit:
        before = time.process_time()
        time.sleep(_POLL_SECONDS)
        if time.process_time() - before < _IDLE_SHARE * _POLL_SECONDS:
            return
    raise RuntimeError("the threads of the session do not come to rest, so a streaming read cannot be timed")


def _die_with_parent(parent: int) -> None:
    """Asks the kernel to end this process with its parent, which reaches it even while it is stopped."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


def main() -> None:
    _die_with_parent(int(sys.argv[1]))
    # Whatever libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    job = json.loads(sys.stdin.readline())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    if job["sparse"]:
        sparamx_onnx.register(options)
    session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    stream = _Stream(**job["stream"], threads=job["threads"]) if job["stream"] else None

    @functools.cache
    def feeds(m: int) -> dict[str, Any]:
        rng = np.random.default_rng(job["seed"])
        width = session.get_inputs()[0].shape[1]
        return {"X": onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal((m, width), np.float32))}

    def run(m: int) -> float:
        start = time.perf_counter()
        session.run_with_ort_values(["Y"], feeds(m))
        return time.perf_counter() - start

    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            run(request["m"])
            answer([run(request["m"]) for _ in range(request["run"])])
        elif "stream" in request:
            assert stream is not None
            _wait_until_idle()
            answer([stream.read(request["loop"]) for _ in range(request["stream"] + 1)][1:])
        else:
            values = session.run_with_ort_values(["Y"], feeds(request["m"]))
            np.save(request["output"], values[0].numpy())
            answer({"written": request["output"]})


if __name__ == "__main__":
    main()
