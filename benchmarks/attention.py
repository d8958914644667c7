#!/usr/bin/env python3
"""SparseAMXAttention over float and packed caches against ONNX Runtime's GroupQueryAttention, all with one buffer.

Times one decode step at several lengths of the past, and the prefill of several prompts, in turn, the other engines
stopped. Every layer has a cache of its own, so that with enough --layers caches come from memory, as in a decoder, and
not from the L3. A step over a packed cache is a step that packs nothing, and its share of one that packs a block.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
import rotation

from sparamx_onnx.ops.packed_cache import BLOCK

# Sparsity of keys and of values.
PACKED = {"packed 30/50": (0.3, 0.5), "packed 50/50": (0.5, 0.5)}
THEIRS, FAST = "GroupQueryAttention", "fast"
# Largest difference of the outputs over a float cache, relative to the largest output, beyond which something is wrong.
TOLERANCE = 1e-3
# The time of one turn, in which at least two calls are made.
TURN_SECONDS = 0.3

Workers = dict[str, rotation.Worker]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="numbers of a head")
    parser.add_argument(
        "--past",
        type=int,
        nargs="*",
        default=[2048, 8192, 16384],
        help="decode after so many tokens",
    )
    parser.add_argument("--prefill", type=int, nargs="*", default=[512, 2048], help="prompts of so many tokens")
    parser.add_argument("--layers", type=int, default=4, help="caches to go through in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each engine")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="also write everything to this file")
    arguments = parser.parse_args()
    if any(past % BLOCK for past in arguments.past):
        parser.error(f"--past takes multiples of {BLOCK}")
    return arguments


def relative_error(workers: Workers) -> float:
    """Of the last outputs over float caches, relative to the largest."""
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in (THEIRS, FAST):
            path = Path(folder) / f"{name}.npy"
            workers[name].ask({"output": str(path)})
            outputs.append(np.load(path))
    return float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())


def over_a_block(worker: rotation.Worker) -> tuple[list[float], float]:
    """Steps over a packed cache: seconds of those that pack nothing, and what packing adds to each.

    All of it falls into the last step of a block. The first one finds the cache as its copy left it.
    """
    layers = worker.ask({"steps": BLOCK})
    steps = [second for layer in layers for second in layer[1:-1]]
    last = statistics.median(layer[-1] for layer in layers)
    return steps, max(0.0, last - statistics.median(steps)) / BLOCK


def measure(workers: Workers, tokens: int, past: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case; prints a line for each engine."""
    facts = {name: worker.ask({"tokens": tokens, "past": past}) for name, worker in workers.items()}
    error = relative_error(workers)
    if not error <= TOLERANCE:
        sys.exit(f"attention.py: the outputs differ by {error:.3g} at {tokens} tokens after {past}")
    turns: dict[str, list[list[float]]] = {name: [] for name in workers}
    packs: dict[str, list[float]] = {name: [] for name in workers if name in PACKED}
    times = {
        name: max(2, round(TURN_SECONDS / min(worker.ask({"run": 2}))))
        for name, worker in workers.items()
        if name not in packs
    }
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            if name in packs:
                steps, packing = over_a_block(worker)
                packs[name].append(packing)
            else:
                steps = worker.ask({"run": times[name]})
            turns[name].append(steps)
    engines: dict[str, Any] = {}
    for name, worker_facts in facts.items():
        packed = statistics.median(packs[name]) if name in packs else 0.0
        with_packing = [[second + packed for second in turn] for turn in turns[name]]
        faster, spread = rotation.ratio(turns[THEIRS], with_packing)
        engines[name] = {
            "seconds": rotation.median(with_packing),
            "packing_seconds": packed,
            "faster": faster,
            "faster_quartiles": spread,
            "bytes_read": worker_facts["reads"],
            "bytes_of_a_token": worker_facts["token"],
            "peak_scratch_bytes": worker_facts["peak"],
            "turn_medians": [statistics.median(turn) for turn in turns[name]],
        }
        report(name, tokens, past, engines[name])
    return {"tokens": tokens, "past": past, "relative_error": error, "engines": engines}


def report(name: str, tokens: int, past: int, engine: dict[str, Any]) -> None:
    """A line for the terminal."""
    low, high = engine["faster_quartiles"]
    seconds, read = engine["seconds"], engine["bytes_read"]
    print(
        f"{tokens:>6} {past:>6} {name:>20} {seconds * 1e3:>8.3f} ms {engine['faster']:>6.2f}x ({low:.2f} to {high:.2f})"
        f" {read / 1e6:>6.1f} MB {read / seconds / 1e9:>5.1f} GB/s  packing {engine['packing_seconds'] / seconds:>5.1%}"
        f"  scratch {engine['peak_scratch_bytes'] / 1e6:.1f} MB",
        flush=True,
    )


def main() -> None:
    arguments = parse()
    rotation.clean_up_when_terminated()
    about = machine.describe()
    print(machine.headline(about))
    print(
        f"{arguments.heads}/{arguments.kv_heads} heads of {arguments.size}, {arguments.layers} layers, "
        f"{arguments.threads} threads, {arguments.rounds} turns each; medians per layer"
    )
    shared = {name: getattr(arguments, name) for name in ("threads", "heads", "kv_heads", "size", "layers")}
    jobs: dict[str, dict[str, Any]] = {
        THEIRS: {"model": THEIRS, "sparsity": None},
        FAST: {"model": "SparseAMXAttention", "sparsity": None},
        **{name: {"model": "SparseAMXAttention", "sparsity": sparsity} for name, sparsity in PACKED.items()},
    }
    results = []
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(rotation.Worker(job | shared | {"seed": 0}, script="attention_engine.py"))
            for name, job in jobs.items()
        }
        results += [measure(workers, 1, past, arguments) for past in arguments.past]
        floats = {name: worker for name, worker in workers.items() if name not in PACKED}
        results += [measure(floats, tokens, 0, arguments) for tokens in arguments.prefill]
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
