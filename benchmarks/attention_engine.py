"""The worker process of `attention.py`: one attention operator over caches that are past and present at once.

The parent (see rotation.py), whose process id is the only argument, sends one JSON object per line and gets one back:

- first the job: {"model": "GroupQueryAttention" or "SparseAMXAttention", "threads", "heads", "kv_heads", "size",
  "layers", "seed"};
- {"tokens": S, "past": P}: makes the caches of all layers, and says what one call takes beyond them: {"peak": BYTES};
- {"run": TIMES}: seconds of each call; one call per layer before them is not counted;
- {"output": PATH}: writes the last result as .npy.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import worker
from onnx import TensorProto, helper

import sparamx_onnx

INPUTS = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"]
OUTPUTS = ["output", "present_key", "present_value"]


def model(operator: str, heads: int, kv_heads: int) -> bytes:
    """One node, every dimension free."""
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    domain = "com.microsoft"
    if operator == "SparseAMXAttention":
        attributes["roles"], domain = ",".join(INPUTS[1:]), "com.sparamx"
    ranks = {"past_key": 4, "past_value": 4, "seqlens_k": 1, "total_sequence_length": 0}
    types = {"seqlens_k": TensorProto.INT32, "total_sequence_length": TensorProto.INT32}
    graph = helper.make_graph(
        [helper.make_node(operator, INPUTS, OUTPUTS, operator, domain=domain, **attributes)],
        "attention",
        [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), [None] * ranks.get(name, 3))
            for name in INPUTS
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in OUTPUTS],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    serialized: bytes = helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString()
    return serialized


def status(field: str) -> int:
    """A field of /proc/self/status in bytes, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Caches:
    """One call per layer, each with a cache of its own, all with the same new tokens."""

    def __init__(self, job: dict[str, Any], session: onnxruntime.InferenceSession, tokens: int, past: int) -> None:
        rng = np.random.default_rng([job["seed"], tokens, past])
        heads, kv_heads, size, total = job["heads"], job["kv_heads"], job["size"], past + tokens

        def normal(*shape: int) -> onnxruntime.OrtValue:
            return onnxruntime.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape, np.float32))

        shared = {
            "query": normal(1, tokens, heads * size),
            "key": normal(1, tokens, kv_heads * size),
            "value": normal(1, tokens, kv_heads * size),
            "seqlens_k": onnxruntime.OrtValue.ortvalue_from_numpy(np.array([total - 1], np.int32)),
            "total_sequence_length": onnxruntime.OrtValue.ortvalue_from_numpy(np.array(total, np.int32)),
        }
        self.output = normal(1, tokens, heads * size)
        self._session = session
        self._bindings = []
        for _ in range(job["layers"]):
            cache = {part: normal(1, kv_heads, total, size) for part in ("key", "value")}
            binding = session.io_binding()
            for name, value in {**shared, "past_key": cache["key"], "past_value": cache["value"]}.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output("output", self.output)
            binding.bind_ortvalue_output("present_key", cache["key"])
            binding.bind_ortvalue_output("present_value", cache["value"])
            self._bindings.append(binding)

    def run(self, times: int) -> list[float]:
        """Seconds of each call, layer after layer."""
        seconds = []
        for binding in itertools.islice(itertools.cycle(self._bindings), times):
            start = time.perf_counter()
            self._session.run_with_iobinding(binding)
            seconds.append(time.perf_counter() - start)
        return seconds

    def peak(self) -> int:
        """Bytes that the first call takes beyond inputs and outputs."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before = status("VmRSS")
        self.run(1)
        return max(0, status("VmHWM") - before)


def start(job: Any) -> Callable[[Any], Any]:
    """Opens the operator's session; what answers requests."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    if job["model"] == "SparseAMXAttention":
        sparamx_onnx.register(options)
    session = onnxruntime.InferenceSession(
        model(job["model"], job["heads"], job["kv_heads"]), options, providers=["CPUExecutionProvider"]
    )
    caches: Caches | None = None

    def respond(request: Any) -> Any:
        nonlocal caches
        if "tokens" in request:
            caches = None  # frees the last ones first
            caches = Caches(job, session, request["tokens"], request["past"])
            return {"peak": caches.peak()}
        assert caches is not None
        if "run" in request:
            caches.run(job["layers"])
            return caches.run(request["run"])
        np.save(request["output"], caches.output.numpy())
        return {"written": request["output"]}

    return respond


if __name__ == "__main__":
    worker.serve(start)
