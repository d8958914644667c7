"""The worker process of `attention.py`: one attention operator over caches that are past and present at once.

The parent (see rotation.py), whose process id is the only argument, sends one JSON object per line and gets one back:

- first the job: {"model": "GroupQueryAttention" or "SparseAMXAttention", "sparsity": [of keys, of values] for a packed
  cache or null, "threads", "heads", "kv_heads", "size", "layers", "seed"};
- {"tokens": S, "past": P}: makes the caches of all layers, and says what one call takes beyond them and what of the
  cache it reads: {"peak": BYTES, "reads": BYTES, "token": BYTES of a token in the cache};
- {"run": TIMES}: seconds of each call; one call per layer before them is not counted;
- {"steps": N}: seconds of N steps of each layer, [layer][step], after which the caches are as they were;
- {"output": PATH}: writes the last result as .npy.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import worker
from onnx import TensorProto, helper

import sparamx_onnx
from sparamx_onnx.ops.packed_cache import BLOCK, CacheLayout, CacheOptions

TYPES = {
    "past_cache": TensorProto.UINT8,
    "present_cache": TensorProto.UINT8,
    "seqlens_k": TensorProto.INT32,
    "total_sequence_length": TensorProto.INT32,
}
RANKS = {"past_key": 4, "past_value": 4, "seqlens_k": 1, "total_sequence_length": 0}
# Tokens that go into a packed cache at a time when it is made.
CHUNK = 2048

Array = npt.NDArray[Any]


def caches_of(sparsity: Sequence[float] | None) -> tuple[str, ...]:
    """What the inputs and outputs of the cache are called, without past and present."""
    return ("key", "value") if sparsity is None else ("cache",)


def model(job: dict[str, Any], window: int = -1) -> bytes:
    """One node, every dimension free."""
    operator, sparsity = job["model"], job["sparsity"]
    parts = caches_of(sparsity)
    inputs = ["query", "key", "value", *(f"past_{part}" for part in parts), "seqlens_k", "total_sequence_length"]
    outputs = ["output", *(f"present_{part}" for part in parts)]
    attributes = {"num_heads": job["heads"], "kv_num_heads": job["kv_heads"], "local_window_size": window}
    domain = "com.microsoft"
    if operator == "SparseAMXAttention":
        attributes["roles"], domain = ",".join(inputs[1:]), "com.sparamx"
    node_outputs = outputs
    if sparsity is not None:
        attributes |= {"cache": "packed", "k_sparsity": sparsity[0], "v_sparsity": sparsity[1]}
        node_outputs = ["output", "", "", "present_cache"]

    def info(name: str, rank: int | None) -> Any:
        shape = None if rank is None else [None] * rank
        return helper.make_tensor_value_info(name, TYPES.get(name, TensorProto.FLOAT), shape)

    graph = helper.make_graph(
        [helper.make_node(operator, inputs, node_outputs, operator, domain=domain, **attributes)],
        "attention",
        [info(name, RANKS.get(name, 3)) for name in inputs],
        [info(name, None) for name in outputs],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)]
    serialized: bytes = helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString()
    return serialized


def open_session(job: dict[str, Any], window: int = -1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    if job["model"] == "SparseAMXAttention":
        sparamx_onnx.register(options)
    return onnxruntime.InferenceSession(model(job, window), options, providers=["CPUExecutionProvider"])


def status(field: str) -> int:
    """A field of /proc/self/status in bytes, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Caches:
    """One call per layer, each with a cache of its own, all with the same new tokens."""

    def __init__(self, job: dict[str, Any], session: onnxruntime.InferenceSession, tokens: int, past: int) -> None:
        self._job, self._session, self._past, self._tokens = job, session, past, tokens
        self._rng = np.random.default_rng([job["seed"], tokens, past])
        heads, kv_heads, size = job["heads"], job["kv_heads"], job["size"]
        new = {
            "query": self._normal(1, tokens, heads * size),
            "key": self._normal(1, tokens, kv_heads * size),
            "value": self._normal(1, tokens, kv_heads * size),
            "seqlens_k": np.array([past + tokens - 1], np.int32),
            "total_sequence_length": np.array(past + tokens, np.int32),
        }
        self._shared = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in new.items()}
        self.output = onnxruntime.OrtValue.ortvalue_from_numpy(self._normal(1, tokens, heads * size))
        self._first = self._float_cache() if job["sparsity"] is None else self._packed_cache()
        self._layers = [
            {part: onnxruntime.OrtValue.ortvalue_from_numpy(x.copy()) for part, x in self._first.items()}
            for _ in range(job["layers"])
        ]
        self._bindings = [self._bind(session, self._shared, self.output, layer) for layer in self._layers]

    def _normal(self, *shape: int) -> Array:
        return self._rng.standard_normal(shape, np.float32)

    def _float_cache(self) -> dict[str, Array]:
        """Keys and values [1, kv heads, past and new tokens, size]."""
        shape = (1, self._job["kv_heads"], self._past + self._tokens, self._job["size"])
        return {part: self._normal(*shape) for part in ("key", "value")}

    def _layout(self) -> CacheLayout:
        return CacheLayout(CacheOptions(*self._job["sparsity"]), self._job["size"], self._job["size"])

    def _packed_cache(self) -> dict[str, Array]:
        """A packed cache [1, kv heads, bytes] that has been through a prompt, with room for a block more."""
        kv_heads, size = self._job["kv_heads"], self._job["size"]
        rows = np.zeros((1, kv_heads, self._layout().row_bytes(self._past + self._tokens + BLOCK)), np.uint8)
        cache = onnxruntime.OrtValue.ortvalue_from_numpy(rows)
        session = open_session(self._job, window=1)  # what a prompt attends to does not matter here
        for begin in range(0, self._past, CHUNK):
            tokens = min(CHUNK, self._past - begin)
            new = {
                "query": np.zeros((1, tokens, self._job["heads"] * size), np.float32),
                "key": self._normal(1, tokens, kv_heads * size),
                "value": self._normal(1, tokens, kv_heads * size),
                "seqlens_k": np.array([begin + tokens - 1], np.int32),
                "total_sequence_length": np.array(begin + tokens, np.int32),
            }
            values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in new.items()}
            session.run_with_iobinding(self._bind(session, values, None, {"cache": cache}))
        return {"cache": cache.numpy().copy()}  # the array would not outlive the value

    @staticmethod
    def _bind(
        session: onnxruntime.InferenceSession,
        values: dict[str, onnxruntime.OrtValue],
        output: onnxruntime.OrtValue | None,
        cache: dict[str, onnxruntime.OrtValue],
    ) -> Any:
        binding = session.io_binding()
        for name, value in {**values, **{f"past_{part}": value for part, value in cache.items()}}.items():
            binding.bind_ortvalue_input(name, value)
        if output is None:
            binding.bind_output("output")
        else:
            binding.bind_ortvalue_output("output", output)
        for part, value in cache.items():
            binding.bind_ortvalue_output(f"present_{part}", value)
        return binding

    def _time(self, binding: Any) -> float:
        start = time.perf_counter()
        self._session.run_with_iobinding(binding)
        return time.perf_counter() - start

    def run(self, times: int) -> list[float]:
        """Seconds of each call, layer after layer."""
        return [self._time(binding) for binding in itertools.islice(itertools.cycle(self._bindings), times)]

    def steps(self, count: int) -> list[list[float]]:
        """Seconds of so many steps, [layer][step], each after the one before it; the caches are then as they were."""
        seconds: list[list[float]] = [[] for _ in self._bindings]
        for step in range(count):
            self._set_length(self._past + self._tokens + step)
            for layer, binding in enumerate(self._bindings):
                seconds[layer].append(self._time(binding))
        self._set_length(self._past + self._tokens)
        for values in self._layers:
            for part, value in values.items():
                value.update_inplace(self._first[part])
        return seconds

    def _set_length(self, total: int) -> None:
        self._shared["seqlens_k"].update_inplace(np.array([total - 1], np.int32))
        self._shared["total_sequence_length"].update_inplace(np.array(total, np.int32))

    def describe(self) -> dict[str, int]:
        """Bytes that the first call takes beyond inputs and outputs, that a call reads, and of a token."""
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before = status("VmRSS")
        self.run(1)
        peak = max(0, status("VmHWM") - before)
        kv_heads, size, total = self._job["kv_heads"], self._job["size"], self._past + self._tokens
        if self._job["sparsity"] is None:
            token = 2 * kv_heads * size * np.dtype(np.float32).itemsize
            return {"peak": peak, "reads": total * token, "token": token}
        layout = self._layout()
        packed = layout.packed_blocks(self._past)
        reads = kv_heads * (packed * layout.packed_bytes + layout.dense_bytes)
        return {"peak": peak, "reads": reads, "token": kv_heads * layout.packed_bytes // BLOCK}


def start(job: Any) -> Callable[[Any], Any]:
    """Opens the operator's session; what answers requests."""
    session = open_session(job)
    caches: Caches | None = None

    def respond(request: Any) -> Any:
        nonlocal caches
        if "tokens" in request:
            caches = None  # frees the last ones first
            caches = Caches(job, session, request["tokens"], request["past"])
            return caches.describe()
        assert caches is not None
        if "run" in request:
            caches.run(job["layers"])
            return caches.run(request["run"])
        if "steps" in request:
            return caches.steps(request["steps"])
        np.save(request["output"], caches.output.numpy())
        return {"written": request["output"]}

    return respond


if __name__ == "__main__":
    worker.serve(start)
