"""Times a model, alone or against another, in a way that a noisy machine cannot easily fool.

Each model has a worker process of its own. The workers take turns in short bursts, so that a change of clock or of
memory bandwidth meets all of them; a worker whose turn it is not is stopped, because the thread pool of an idle engine
spins and slows its neighbours by up to 1.9x. The first run of every burst finds cold caches and a sleeping pool: it is
not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from sparamx_onnx.feeds import FeedPlan, graph_inputs, is_decoder, plan_feeds, read_npz
from sparamx_onnx.loading import LoadedModel, load_model
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.progress import Report

# A burst lasts about this long, so that it is long beside the switch and short beside the machine's moods.
_BURST_SECONDS = 0.2
_SHORTEST_BURST, _LONGEST_BURST = 2, 200
_DEFAULT_LENGTH = 128

Turns = Sequence[Sequence[float]]
"""Seconds of the runs of each turn."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one model took.

    Attributes:
        model: Path of the model.
        median: Median of all counted runs, in seconds.
        quartiles: First and third quartile, in seconds.
        runs: Counted runs.
        load_seconds: Time to create the session.
        pss: Memory of the process in bytes, shared pages divided among their users; None where unknown.
        model_pss: The part of it that came with the model.
        anonymous: Memory of the process that no file backs, in bytes.
    """

    model: str
    median: float
    quartiles: tuple[float, float]
    runs: int
    load_seconds: float
    pss: int | None
    model_pss: int | None
    anonymous: int | None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Result of ``bench``.

    Attributes:
        timings: The model, then the other one if there was one.
        ratio: Median of the other model over the median of the model: above 1, the model is the faster one.
        ratio_quartiles: Quartiles of that ratio taken round by round.
        batch: Rows per run; None for given inputs.
        length: Tokens per row, or length of the sequences; None for given inputs.
        past: Positions in the key-value cache; None for a model without one and for given inputs.
        threads: Threads within an operator; None for ONNX Runtime's default.
        rounds: Turns of each worker.
    """

    timings: tuple[Timing, ...]
    ratio: float | None
    ratio_quartiles: tuple[float, float] | None
    batch: int | None
    length: int | None
    past: int | None
    threads: int | None
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)


def bench(
    model: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    batch: int | None = None,
    length: int | None = None,
    threads: int | None = None,
    inputs: str | os.PathLike[str] | None = None,
    rounds: int = 15,
    progress: Report | None = None,
) -> Benchmark:
    """Times a model, interleaved with another one if there is one.

    A model with a key-value cache is timed on one decode step: one new token per row after ``length`` cached positions.
    Any other model gets sequences of ``length``.

    Args:
        model: The model to time.
        against: A model with the same inputs to compare with.
        batch: Rows per run; 1, or what the model fixes, if None.
        length: Positions in the cache, or length of the sequences; 128 if None.
        threads: Threads within an operator; ONNX Runtime's default (one per core) if None.
        inputs: An ``.npz`` file with one array per input, instead of random ones; then neither batch nor length.
        rounds: Turns of each model; more give narrower quartiles.
        progress: Called with (rounds done, rounds in all, what is going on).

    Raises:
        SparamxError: A model cannot be read or run, or the inputs do not fit.
    """
    for name, number in (("batch", batch), ("length", length), ("threads", threads), ("rounds", rounds)):
        if number is not None and number < 1:
            raise SparamxError(f"{name} is {number}; it must be 1 or more")
    if inputs is not None and (batch is not None or length is not None):
        raise SparamxError("batch and length are those of the given inputs; give one or the other")
    models = [load_model(path) for path in ([model] if against is None else [model, against])]
    plan = None
    if inputs is None:
        plan = _plan(models[0], batch, length)
    else:
        read_npz(inputs, models[0].model)
    if len(models) == 2:
        _check_same_inputs(*models)
    jobs = [_job(loaded, plan, inputs, threads) for loaded in models]
    paths = [os.fspath(loaded.path) for loaded in models]
    del models  # the graphs, and inline weights with them, are no use while the workers run
    with contextlib.ExitStack() as stack:
        if progress is not None:
            progress(0, rounds, "loading")
        workers = [stack.enter_context(start_worker(job)) for job in jobs]
        turns = _take_turns(workers, rounds, progress)
    timings = tuple(_timing(path, worker, runs) for path, worker, runs in zip(paths, workers, turns, strict=True))
    ratio, ratio_quartiles = None, None
    if len(timings) == 2:
        ratio, ratio_quartiles = compare(*turns)
    return Benchmark(
        timings=timings,
        ratio=ratio,
        ratio_quartiles=ratio_quartiles,
        batch=None if plan is None else plan.batch,
        length=None if plan is None else plan.length,
        past=None if plan is None else plan.past,
        threads=threads,
        rounds=rounds,
    )


def _plan(model: LoadedModel, batch: int | None, length: int | None) -> FeedPlan:
    length = _DEFAULT_LENGTH if length is None else length
    if is_decoder(model.model):
        return plan_feeds(model.model, batch=batch, length=1, past=length)
    return plan_feeds(model.model, batch=batch, length=length)


def _check_same_inputs(one: LoadedModel, other: LoadedModel) -> None:
    first, second = ({value.name: value.dtype for value in graph_inputs(loaded.model)} for loaded in (one, other))
    if first != second:
        name = min(name or "" for name in first.keys() | second.keys() if first.get(name) != second.get(name))
        raise SparamxError(f"{one.path} and {other.path} cannot be compared: their inputs differ at '{name}'")


def _job(
    loaded: LoadedModel, plan: FeedPlan | None, inputs: str | os.PathLike[str] | None, threads: int | None
) -> dict[str, Any]:
    return {
        "model": os.fspath(loaded.path),
        "sparse": loaded.imports_our_domain,
        "threads": threads,
        "feeds": [dataclasses.asdict(feed) for feed in plan.feeds] if plan is not None else [],
        "npz": None if inputs is None else os.fspath(inputs),
        "names": [value.name for value in graph_inputs(loaded.model)],
    }


class Worker:
    """A running worker process, stopped between its turns."""

    def __init__(self, job: dict[str, Any], process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.model: str = job["model"]
        self.memory: dict[str, int] | None = None
        self.answer: dict[str, Any] = {}
        self._process = process
        self._errors = errors
        self.ready: dict[str, Any] = self._ask(job)["ready"]
        self.pause()

    def pause(self) -> None:
        """Stops the worker, and returns when it has stopped or is dead (which the next request will notice)."""
        self._process.send_signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def burst(self, runs: int) -> list[float]:
        """Wakes the worker for ``runs`` runs and one that is not counted; seconds of each."""
        return self.turn({"runs": runs + 1})[1:]

    def turn(self, request: dict[str, int]) -> list[float]:
        """Wakes the worker for one request (see bench_worker); seconds of each run."""
        self._process.send_signal(signal.SIGCONT)
        self.answer = self._ask(request)
        self.pause()
        self.memory = self.answer["memory"]
        return [float(seconds) for seconds in self.answer["seconds"]]

    def memory_figures(self) -> dict[str, int | None]:
        """What its answers say of its memory, in bytes: ``pss``, ``model_pss`` and ``anonymous`` of a timing."""
        memory, before = self.memory or {}, self.ready["memory_before"] or {}
        pss = memory.get("pss")
        model_pss = pss - before["pss"] if pss is not None and "pss" in before else None
        return {"pss": pss, "model_pss": model_pss, "anonymous": memory.get("anonymous")}

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise SparamxError(f"{self.model}: {self._cause_of_death()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SparamxError(answer["error"])
        return answer

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"the process that ran it was killed by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"the process that ran it failed: {lines[-1] if lines else f'exit status {code}'}"


@contextlib.contextmanager
def start_worker(job: dict[str, Any]) -> Iterator[Worker]:
    """A worker process for a job (see bench_worker), stopped, with its model loaded; killed in the end."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            # -P: the package that is installed, whatever the current folder holds.
            [sys.executable, "-P", "-m", "sparamx_onnx.bench_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Ctrl-C is for this process, which then ends its workers itself.
            start_new_session=True,
        )
        try:
            yield Worker(job, process, errors)
        finally:
            # A worker holds nothing that would need an orderly end, and killing reaches it even when it is stopped.
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


def _take_turns(workers: Sequence[Worker], rounds: int, progress: Report | None) -> list[list[list[float]]]:
    """Seconds of every counted run, by worker and round."""
    sizes = []
    for worker in workers:
        # Two bursts to warm up; the second one says how many runs fill a burst.
        worker.burst(1)
        seconds = statistics.median(worker.burst(_SHORTEST_BURST))
        sizes.append(burst_size(seconds))
    turns: list[list[list[float]]] = [[] for _ in workers]
    for number in range(rounds):
        if progress is not None:
            progress(number, rounds, "timing")
        # Every other round in the opposite order: nobody always follows the same neighbour.
        order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
        for index in order:
            turns[index].append(workers[index].burst(sizes[index]))
    if progress is not None:
        progress(rounds, rounds, "timing")
    return turns


def burst_size(seconds: float) -> int:
    """Runs that fill a burst, if one takes so long."""
    return min(max(math.ceil(_BURST_SECONDS / max(seconds, 1e-9)), _SHORTEST_BURST), _LONGEST_BURST)


def compare(one: Turns, other: Turns) -> tuple[float, tuple[float, float]]:
    """How many times as fast one is as the other.

    Returns:
        Median of the other's seconds over the median of one's, and the quartiles of that ratio taken turn by turn.
    """
    medians = [statistics.median(seconds for turn in turns for seconds in turn) for turns in (one, other)]
    per_turn = [statistics.median(b) / statistics.median(a) for a, b in zip(one, other, strict=True)]
    return medians[1] / medians[0], quartiles(per_turn)


def _timing(path: str, worker: Worker, turns: Sequence[Sequence[float]]) -> Timing:
    samples = [seconds for turn in turns for seconds in turn]
    return Timing(
        model=path,
        median=statistics.median(samples),
        quartiles=quartiles(samples),
        runs=len(samples),
        load_seconds=worker.ready["load_seconds"],
        **worker.memory_figures(),
    )


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of a single sample, twice the sample."""
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high
