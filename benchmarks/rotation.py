"""Workers that take turns: whoever is not asked is stopped, so that nobody's idle threads slow the others down."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self


class Worker:
    """A process that runs a worker script, stopped except while it answers a request. Use as a context manager."""

    def __init__(self, job: dict[str, Any], python: str = sys.executable, script: str = "engine.py") -> None:
        """Starts the job in an environment's `python`; raises RuntimeError if the engine cannot load the model."""
        self._name = str(job["model"])
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        try:
            self._exchange(job)
        except BaseException:
            self._process.kill()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()  # reaches a stopped process too
        self._process.wait()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, request: dict[str, Any]) -> Any:
        """Lets the worker run for the time of one request."""
        self._process.send_signal(signal.SIGCONT)
        reply = self._exchange(request)
        self._process.send_signal(signal.SIGSTOP)
        return reply

    def _exchange(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self._name} ended with status {self._process.wait()}")
        return json.loads(line)


def median(turns: list[list[float]]) -> float:
    """Median of all samples of all turns."""
    return statistics.median(itertools.chain.from_iterable(turns))


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of a single sample, twice the sample."""
    if len(samples) < 2:
        return samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


def ratio(numerator: list[list[float]], denominator: list[list[float]]) -> tuple[float, tuple[float, float]]:
    """Ratio of the medians of all samples, and the quartiles of the ratios of each turn's medians."""
    turns = [statistics.median(a) / statistics.median(b) for a, b in zip(numerator, denominator, strict=True)]
    return median(numerator) / median(denominator), quartiles(turns)


def clean_up_when_terminated() -> None:
    """Makes SIGTERM an exception, so that what a benchmark has written is removed as after Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)
