#!/usr/bin/env python3
"""The kernels alone against the memory that they read: weight type x sparsity x shape x M.

Copies of one packed matrix fill three times the L3 in a mapped file, and turns of the kernel go through them; at M up
to 4, where reading is all the work, in turn with two loops that only read the same file (`plain`: front to back;
`prefetched`: two streams a thread with software prefetch). Prints GB/s of packed weights, their share of what the
loops read, and GFLOP/s as if the matrix were dense.

With --json, what the file already has is not measured again, so a long run can be cut into pieces (--minutes).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import kernel_timer
import machine
import rotation
import shapes

from sparamx_onnx.models import caches
from sparamx_onnx.ops import packing

BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
LARGEST_STREAMED_M = 4
L3_MULTIPLE = 3
SMALLEST_FILE = 1 << 30
FEWEST_TURNS = 3
TURN_SECONDS = 0.012

QUICK_SHAPES = [(4096, 4096), (4096, 14336), (2048, 512), (768, 3072)]
QUICK_SPARSITIES = [0.5, 0.7]
QUICK_ROWS = [1, 4, 16, 128]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = [kind.value for kind in packing.WeightType]
    parser.add_argument("--weights", nargs="+", choices=types, default=types)
    parser.add_argument("--shapes", type=shapes.parse, metavar="KxN,...", help="default: those of shapes.py")
    parser.add_argument("--sparsity", nargs="+", type=float)
    parser.add_argument("--m", nargs="+", type=int)
    parser.add_argument("--quick", action="store_true", help="a few shapes, 50 and 70 %% zeros, M 1, 4, 16 and 128")
    parser.add_argument("--level", help="run this level's own kernels (avx2, avx512, ...), not the library's choice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cell-seconds", type=float, default=0.2, help="time for each combination")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--file-bytes", type=int, help="size of the file of copies; default: three times the L3")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the results here, and go on from them")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else shapes.DISTINCT)
    arguments.sparsity = arguments.sparsity or (QUICK_SPARSITIES if arguments.quick else shapes.SPARSITIES)
    arguments.m = arguments.m or (QUICK_ROWS if arguments.quick else shapes.ROWS)
    return arguments


def measure(timer: kernel_timer.Timer, kernel: kernel_timer.Kernel, m: int, seconds: float) -> dict[str, Any]:
    """Times of one product, and what the loops read meanwhile."""
    once = timer.run(kernel, m, 1)
    count = max(1, round(TURN_SECONDS / once))
    timer.run(kernel, m, count)
    turns: list[float] = []
    read: dict[str, list[float]] = {loop: [] for loop in kernel_timer.LOOPS if m <= LARGEST_STREAMED_M}
    limit = time.monotonic() + seconds
    while len(turns) < FEWEST_TURNS or time.monotonic() < limit:
        turns.append(timer.run(kernel, m, count))
        for loop, rates in read.items():
            rates.append(timer.read(loop, count))
    return {
        "path": timer.path(kernel, m),
        "seconds": statistics.median(turns),
        "quartiles": rotation.quartiles(turns),
        "turns": len(turns),
        **{f"{loop}_bytes_per_second": statistics.median(rates) for loop, rates in read.items()},
    }


def matrices(arguments: argparse.Namespace, done: documents.Cells) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The matrices of which something is missing, and the M that are."""
    for weights in arguments.weights:
        for k, n in arguments.shapes:
            for sparsity in arguments.sparsity:
                matrix = {"weights": weights, "k": k, "n": n, "sparsity": sparsity, "level": arguments.level}
                missing = [m for m in arguments.m if not done.has(matrix | {"m": m})]
                if missing:
                    yield matrix, missing


def line(cell: dict[str, Any]) -> str:
    """One combination for the terminal."""
    rate = cell["blob_bytes"] / cell["seconds"]
    text = (
        f"{cell['weights']:>5} {cell['sparsity']:>4.0%} {shapes.name((cell['k'], cell['n'])):>11} {cell['m']:>4} "
        f"{cell['path']:<14} {cell['seconds'] * 1e6:>10.1f} {rate / 1e9:>7.1f} "
        f"{2 * cell['m'] * cell['k'] * cell['n'] / cell['seconds'] / 1e9:>9.0f}"
    )
    for loop in kernel_timer.LOOPS:
        if f"{loop}_bytes_per_second" in cell:
            text += f" {rate / cell[f'{loop}_bytes_per_second']:>11.1%}"
    return text


def main() -> None:
    arguments = parse()
    stop = time.monotonic() + 60 * arguments.minutes
    about = machine.describe()
    print(machine.headline(about))
    done = documents.Cells(arguments.json, about, ("weights", "k", "n", "sparsity", "level", "m"))
    capacity = arguments.file_bytes or max(SMALLEST_FILE, L3_MULTIPLE * caches.largest_cache_bytes())
    print(f"{arguments.threads} threads, copies of a matrix in {capacity / 1e9:.2f} GB of mapped file")
    print("weights zeros    shape    M kernel          microseconds  GB/s   GFLOP/s  of plain   of prefetched")
    random = kernel_timer.Weights(max(k * n for k, n in arguments.shapes))
    with kernel_timer.Timer(BUILD, arguments.threads, capacity) as timer:
        for matrix, rows in matrices(arguments, done):
            if time.monotonic() > stop:
                print("stopped after the time given; the same command goes on")
                break
            dense = random.draw(matrix["k"], matrix["n"], matrix["sparsity"])
            blob = packing.pack(dense, packing.PackOptions(packing.WeightType(matrix["weights"])))
            timer.fill(blob)
            kernel = timer.kernel(arguments.level)
            if isinstance(kernel, str):
                print(f"{matrix['weights']}: {kernel}")
                continue
            for m in rows:
                cell = matrix | {"m": m, "threads": arguments.threads, "blob_bytes": int(blob.size)}
                cell |= measure(timer, kernel, m, arguments.cell_seconds)
                done.add(cell)
                print(line(cell), flush=True)
            done.save()


if __name__ == "__main__":
    main()
