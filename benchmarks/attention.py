#!/usr/bin/env python3
"""SparseAMXAttention against ONNX Runtime's GroupQueryAttention, both with one buffer for past and present.

Times one decode step at several lengths of the past, and the prefill of several prompts, in turn, the other engine
stopped. Every layer has a cache of its own, so that with enough --layers caches come from memory, as in a decoder, and
not from the L3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
import rotation

OPERATORS = ("GroupQueryAttention", "SparseAMXAttention")
# Largest difference of the outputs, relative to the largest output, beyond which something is wrong.
TOLERANCE = 1e-3
# The time of one turn, in which at least two calls are made.
TURN_SECONDS = 0.3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="numbers of a head")
    parser.add_argument("--past", type=int, nargs="*", default=[2048, 8192, 16384], help="decode after so many tokens")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048], help="prompts of so many tokens")
    parser.add_argument("--layers", type=int, default=4, help="caches to go through in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each engine")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="also write everything to this file")
    return parser.parse_args()


def relative_error(workers: list[rotation.Worker]) -> float:
    """Of the last outputs, relative to the largest."""
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        for index, worker in enumerate(workers):
            path = Path(folder) / f"{index}.npy"
            worker.ask({"output": str(path)})
            outputs.append(np.load(path))
    return float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())


def measure(workers: list[rotation.Worker], tokens: int, past: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case; prints a line."""
    peaks = [worker.ask({"tokens": tokens, "past": past})["peak"] for worker in workers]
    error = relative_error(workers)
    if not error <= TOLERANCE:
        sys.exit(f"attention.py: the outputs differ by {error:.3g} at {tokens} tokens after {past}")
    times = [max(2, round(TURN_SECONDS / min(worker.ask({"run": 2})))) for worker in workers]
    turns: list[list[list[float]]] = [[], []]
    for _ in range(arguments.rounds):
        for index, worker in enumerate(workers):
            turns[index].append(worker.ask({"run": times[index]}))
    medians = [rotation.median(samples) for samples in turns]
    faster, spread = rotation.ratio(*turns)
    cache_bytes = 2 * (past + tokens) * arguments.kv_heads * arguments.size * 4
    print(
        f"{tokens:>6} {past:>6} {medians[0] * 1e3:>20.3f} {medians[1] * 1e3:>19.3f} "
        f"{faster:>7.2f}x ({spread[0]:.2f} to {spread[1]:.2f}) {cache_bytes / medians[1] / 1e9:>8.1f} GB/s "
        f"{peaks[1] / 1e6:>8.1f} MB",
        flush=True,
    )
    return {
        "tokens": tokens,
        "past": past,
        "median_seconds": dict(zip(OPERATORS, medians, strict=True)),
        "faster": faster,
        "faster_quartiles": spread,
        "relative_error": error,
        "cache_bytes": cache_bytes,
        "peak_scratch_bytes": dict(zip(OPERATORS, peaks, strict=True)),
        "turn_medians": {
            name: [statistics.median(turn) for turn in samples] for name, samples in zip(OPERATORS, turns, strict=True)
        },
    }


def main() -> None:
    arguments = parse()
    rotation.clean_up_when_terminated()
    about = machine.describe()
    print(machine.headline(about))
    print(
        f"{arguments.heads}/{arguments.kv_heads} heads of {arguments.size}, {arguments.layers} layers, "
        f"{arguments.threads} threads, {arguments.rounds} turns each; medians in ms per layer"
    )
    print(
        f"{'tokens':>6} {'past':>6} {OPERATORS[0]:>20} {OPERATORS[1]:>19} {'faster':>23} {'reads':>13} {'scratch':>11}"
    )
    job = {
        "threads": arguments.threads,
        "heads": arguments.heads,
        "kv_heads": arguments.kv_heads,
        "size": arguments.size,
        "layers": arguments.layers,
        "seed": 0,
    }
    with (
        rotation.Worker(job | {"model": OPERATORS[0]}, script="attention_engine.py") as theirs,
        rotation.Worker(job | {"model": OPERATORS[1]}, script="attention_engine.py") as ours,
    ):
        cases = [(1, past) for past in arguments.past] + [(tokens, 0) for tokens in arguments.prefill]
        results = [measure([theirs, ours], tokens, past, arguments) for tokens, past in cases]
    document = {
        "machine": about,
        "arguments": {key: value for key, value in vars(arguments).items() if key != "json"},
        "results": results,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
