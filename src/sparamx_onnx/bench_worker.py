"""The worker process of ``bench``: one model, timed on request.

Requests come as JSON lines on stdin, answers go as JSON lines to what was stdout when the process started:

* the first line describes the job (model, threads, feeds); the answer is ``{"ready": ...}`` or ``{"error": ...}``;
* ``{"runs": N}`` is answered with ``{"seconds": [N numbers], "memory": {...}}`` or ``{"error": ...}``;
* a job with a ``capacity`` is a decoder: ``{"runs": N, "context": C}`` are N steps after C tokens, and
  ``{"prompt": P}`` is one run over P tokens, up to the choice of the next;
* end of input ends the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_MEMORY_FIELDS = {"Pss": "pss", "Anonymous": "anonymous", "Rss": "resident"}


def memory() -> dict[str, int] | None:
    """Bytes of this process: ``pss`` (shared pages divided among their users), ``anonymous`` and ``resident``.

    None where the kernel does not tell.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        if name in _MEMORY_FIELDS:
            found[_MEMORY_FIELDS[name]] = int(rest.split()[0]) * 1024
    return found


def _die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, which also reaches a stopped process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


def _serve(job: dict[str, Any], answer: Any) -> None:
    import onnxruntime

    from sparamx_onnx.feeds import Feed, read_arrays
    from sparamx_onnx.ops.errors import in_one_sentence
    from sparamx_onnx.ops.sessions import open_quietly

    before = memory()
    start = time.perf_counter()
    session = open_quietly(job["model"], sparse=job["sparse"], threads=job["threads"])
    load_seconds = time.perf_counter() - start
    if job["npz"] is not None:
        arrays = read_arrays(job["npz"])
        feeds = {name: arrays[name] for name in job["names"]}
    else:
        feeds = {feed["name"]: Feed(**{**feed, "shape": tuple(feed["shape"])}).make() for feed in job["feeds"]}
    # As OrtValues neither inputs nor outputs are copied: only the model's own work is timed.
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    names = [output.name for output in session.get_outputs()]

    def run() -> float:
        start = time.perf_counter()
        session.run_with_ort_values(names, values)
        return time.perf_counter() - start

    with in_one_sentence(f"{job['model']}: ONNX Runtime fails on these inputs"):
        first = run()
    answer({"ready": {"load_seconds": load_seconds, "first_seconds": first, "memory_before": before}})
    for line in sys.stdin:
        seconds = [run() for _ in range(json.loads(line)["runs"])]
        answer({"seconds": seconds, "memory": memory()})


def _serve_decoder(job: dict[str, Any], answer: Any) -> None:
    import numpy as np
    import onnxruntime

    from sparamx_onnx.decoder import DecoderSession

    before = memory()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    start = time.perf_counter()
    session = DecoderSession(job["model"], capacity=job["capacity"], threads=job["threads"], session_options=options)
    load_seconds = time.perf_counter() - start
    rng = np.random.default_rng(0)

    def tokens(count: int) -> Any:
        return rng.integers(0, job["tokens"], (job["batch"], count))

    def timed(run: Any) -> float:
        start = time.perf_counter()
        run().argmax(axis=1)
        return time.perf_counter() - start

    answer({"ready": {"load_seconds": load_seconds, "memory_before": before}})
    for line in sys.stdin:
        request = json.loads(line)
        if "prompt" in request:
            prompt = tokens(request["prompt"])
            seconds = [timed(lambda prompt=prompt: session.prefill(prompt))]
        else:
            session.pretend(job["batch"], request["context"])
            seconds = [timed(lambda: session.step(tokens(1))) for _ in range(request["runs"])]
        answer({"seconds": seconds, "memory": memory(), "cache_bytes": session.cache_bytes})


def main() -> None:
    """Runs the worker; the parent's process id is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent(int(sys.argv[1]))
    # Whatever else this process prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    job = json.loads(sys.stdin.readline())
    try:
        (_serve_decoder if "capacity" in job else _serve)(job, answer)
    except ValueError as error:  # SparamxError among them: its message is meant for the user
        answer({"error": str(error)})


if __name__ == "__main__":
    main()
