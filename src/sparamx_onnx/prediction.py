"""How fast a converted model will run at one row, from the bytes that it reads and how fast this machine reads."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sparamx_onnx.graph_passes.plan import Action, NodePlan, Plan, Reason
from sparamx_onnx.tables import duration, size

_FP32_BYTES = 4

# As many bytes are read as the model has, so that those of a small one come from the cache, as they will; no more of
# them than tells memory from the largest caches.
_LEAST_BYTES = 16 << 20
_MOST_BYTES = 768 << 20
_REPETITIONS = 5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The time of a product with few rows is the time that its weights take to be read.

    Attributes:
        bytes_before: What linear layers read in each run of the model as it is: float32 weights, as ONNX Runtime
            unpacks float16 ones, and quantized ones as they are.
        bytes_after: What they read when the model is converted, layers that are left alone included.
        bytes_per_second: How fast this machine reads so many bytes with all threads.
        threads: How many these are.
    """

    bytes_before: int
    bytes_after: int
    bytes_per_second: float
    threads: int

    @property
    def seconds_before(self) -> float:
        """Time that the model's linear layers take as it is."""
        return self.bytes_before / self.bytes_per_second

    @property
    def seconds_after(self) -> float:
        """Time that they take when it is converted."""
        return self.bytes_after / self.bytes_per_second

    @property
    def text(self) -> str:
        """What is predicted, and by what."""
        return (
            "Predicted for linear layers at one row (a decode step):"
            f" {duration(self.seconds_before)} -> {duration(self.seconds_after)}, the time to read"
            f" {size(self.bytes_before)} -> {size(self.bytes_after)} of weights at"
            f" {size(round(self.bytes_per_second))}/s, as measured here with"
            f" {self.threads} thread{'' if self.threads == 1 else 's'}."
        )

    def to_dict(self) -> dict[str, float]:
        """The same as JSON values."""
        return {
            **dataclasses.asdict(self),
            "seconds_before": self.seconds_before,
            "seconds_after": self.seconds_after,
        }


def predict(plan: Plan) -> Prediction | None:
    """Predicts the time of a run at one row, such as a decode step; measures how fast this machine reads memory.

    Args:
        plan: A plan whose sizes are known.

    Returns:
        None where nothing is converted or a size is not known.
    """
    if not plan.converted or plan.bytes_after is None:
        return None
    nodes = list(_read_in_a_run(plan))
    before = sum(_dense_bytes(node) for node in nodes)
    after = sum(
        (node.bytes_after or 0)
        if node.action is not Action.LEFT_ALONE or node.reason is Reason.ALREADY_CONVERTED
        else _dense_bytes(node)
        for node in nodes
    )
    threads = len(os.sched_getaffinity(0))
    return Prediction(before, after, bytes_per_second(after, threads), threads)


def _read_in_a_run(plan: Plan) -> Iterable[NodePlan]:
    """The layers that run; of those in bodies that share a weight (the branches of an If) one."""
    seen: set[str] = set()
    for node in plan:
        if node.graph is not None and node.weight is not None:
            if node.weight in seen:
                continue
            seen.add(node.weight)
        yield node


def _dense_bytes(node: NodePlan) -> int:
    """What ONNX Runtime reads of a weight as it is in the model."""
    stored = node.bytes_before or node.bytes_after or 0
    if node.k is None or node.n is None or stored < 2 * node.k * node.n:
        return stored
    return _FP32_BYTES * node.k * node.n


def bytes_per_second(wanted: int, threads: int) -> float:
    """How fast threads read so many bytes of memory together, each its own part, at best; takes about a second.

    Args:
        wanted: Bytes; at least 16 MiB and at most 768 MiB are read.
        threads: Threads.
    """
    count = min(max(wanted, _LEAST_BYTES), _MOST_BYTES)
    parts = [np.empty(count // threads // 8, np.uint64) for _ in range(threads)]

    def fill(part: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        part.fill(1)

    def read(part: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> int:
        return int(part.sum())

    times = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, parts))
        for _ in range(_REPETITIONS):
            start = time.perf_counter()
            list(pool.map(read, parts))
            times.append(time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / min(times)
