#!/usr/bin/env python3
"""An hour of everything at once: no wrong bit, no error, no growth of memory.

Several processes, each with several threads, run products of every weight type with several outputs and with fp16
activations, attention over float and packed caches, and the trained decoder with caches of its own. All processes map
the same files; threads share sessions, which are opened anew now and then with another number of threads. Every result
is compared, bit by bit, with that of a single-threaded session, which was compared with a reference at the start.

Only time in which the soak itself ran counts: a gap of more than two seconds (the process was stopped) does not.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import machine
import numpy as np
import soak_engine

BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
TICK_SECONDS, LONGEST_GAP = 0.25, 2.0
SAMPLES = 240
MEMORY = ("Rss", "Pss", "Anonymous")
# Memory of the last quarter against the second one: the first fills caches and the allocator's arenas.
MOST_GROWTH = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4, help="in each process")
    parser.add_argument("--cpus", type=float, default=2.0, help="CPUs' worth of time that all processes take together")
    parser.add_argument("--kinds", default="", metavar="REGEX", help="only calls whose name it finds")
    parser.add_argument("--folder", type=Path, default=BUILD)
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    arguments = parser.parse_args()
    about = machine.describe()
    print(machine.headline(about))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        chosen = [kind for kind in soak_engine.kinds(Path(folder)) if re.search(arguments.kinds, kind.name)]
        errors = expect(Path(folder), chosen)
        result = soak(Path(folder), arguments)
    document = {"machine": about, "date": f"{datetime.now(UTC):%Y-%m-%d}", "expected": errors, **result}
    print(summary(document))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(bool(document["wrong"] or document["died"] or document["growth"] > MOST_GROWTH))


def expect(folder: Path, chosen: list[soak_engine.Kind]) -> dict[str, float]:
    """Writes the models and what every kind of call should give; how far that is from the reference."""
    soak_engine.prepare(chosen)
    digests, errors = {}, {}
    for kind in chosen:
        results, references = kind.run(kind.open(1)), kind.reference()
        digests[kind.name] = soak_engine.digest(results)
        errors[kind.name] = max(
            float(np.abs(result.astype(np.float64) - reference).max() / np.abs(reference).max())
            for result, reference in zip(results, references, strict=True)
        )
        if not errors[kind.name] <= kind.near:
            sys.exit(f"soak.py: {kind.name} is {errors[kind.name]:.2g} from its reference, more than {kind.near:.2g}")
    (folder / soak_engine.EXPECTED).write_text(json.dumps(digests))
    return errors


class Engine:
    """One process of the soak. Use as a context manager."""

    def __init__(self, folder: Path, threads: int, cpus: float, seed: int) -> None:
        """Starts it."""
        self.last: dict[str, Any] = {"runs": {}, "opened": 0, "wrong": 0, "errors": []}
        command = [sys.executable, soak_engine.__file__, str(folder), str(threads), str(cpus), str(seed)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.last = json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def status(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def memory(self) -> dict[str, int]:
        """Bytes, threads and open files; nothing once it has ended."""
        process = Path(f"/proc/{self._process.pid}")
        try:
            rollup = (process / "smaps_rollup").read_text().splitlines()[1:]
            files, threads = len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            return {}
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in rollup)}
        return {**{name: sizes[name] for name in MEMORY}, "files": files, "threads": threads}

    def end(self) -> int:
        """Lets all threads finish their runs; the process's status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait()
        self._reader.join()
        return status


def soak(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the engines for so many minutes of running time."""
    seconds = 60.0 * arguments.minutes
    share = arguments.cpus / arguments.processes
    engines = [Engine(folder, arguments.threads, share, seed) for seed in range(arguments.processes)]
    samples: list[dict[str, float]] = []
    ran, started, last = 0.0, time.monotonic(), time.monotonic()
    try:
        while ran < seconds and all(engine.status is None for engine in engines):
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            if now - last < LONGEST_GAP:
                ran += now - last
            last = now
            if ran >= seconds * len(samples) / SAMPLES:
                totals: Counter[str] = Counter()
                for engine in engines:
                    totals.update(engine.memory())
                samples.append({"minutes": round(ran / 60, 2), **totals, **_counts(engines)})
        died = [status for status in (engine.end() for engine in engines) if status]
    finally:
        for engine in engines:
            engine.__exit__(None, None, None)
    runs: Counter[str] = Counter()
    for engine in engines:
        runs.update(engine.last["runs"])
    half = [sample["Pss"] for sample in samples]
    quarter = max(1, len(half) // 4)
    return {
        "minutes": ran / 60,
        "minutes_with_pauses": (time.monotonic() - started) / 60,
        **{name: getattr(arguments, name) for name in ("processes", "threads", "cpus")},
        **_counts(engines),
        "died": died,
        "errors": [error for engine in engines for error in engine.last["errors"]],
        "by_kind": dict(sorted(runs.items())),
        "growth": statistics.median(half[-quarter:]) / statistics.median(half[quarter : 2 * quarter] or half),
        "memory": samples,
    }


def _counts(engines: list[Engine]) -> dict[str, int]:
    return {
        "runs": sum(sum(engine.last["runs"].values()) for engine in engines),
        "opened": sum(engine.last["opened"] for engine in engines),
        "wrong": sum(engine.last["wrong"] for engine in engines),
    }


def summary(document: dict[str, Any]) -> str:
    """For the terminal."""
    samples = document["memory"]
    lines = [
        f"{document['minutes']:.1f} minutes ({document['minutes_with_pauses']:.1f} with pauses), "
        f"{document['processes']} processes of {document['threads']} threads, {document['runs']} runs of "
        f"{len(document['by_kind'])} kinds, {document['opened']} sessions opened: {document['wrong']} wrong, "
        f"{len(document['died'])} processes died"
    ]
    for name, sample in zip(("start", "a quarter", "middle", "end"), _moments(samples), strict=True):
        sizes = ", ".join(f"{key} {sample[key] / 1e6:.0f} MB" for key in MEMORY)
        lines.append(f"{name:<10}{sizes}, {sample['threads']} threads, {sample['files']} files")
    lines.append(f"PSS of the last quarter against the second: {document['growth']:.3f}")
    return "\n".join([*lines, *document["errors"]])


def _moments(samples: list[dict[str, float]]) -> list[dict[str, float]]:
    last = len(samples) - 1
    return [samples[index] for index in (min(1, last), last // 4, last // 2, last)]


if __name__ == "__main__":
    main()
