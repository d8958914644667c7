#!/usr/bin/env python3
"""How fast matrices are packed, checked and unpacked, in GB of fp32 weights per second."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np

from sparamx_onnx.ops import packing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=14336)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--weights", nargs="+", choices=list(packing.WeightType), default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    arguments = parser.parse_args()
    about = machine.describe()
    print(machine.headline(about))
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((arguments.k, arguments.n), np.float32)
    dense[rng.random(dense.shape, np.float32) < arguments.sparsity] = 0
    # Exporters store a Linear's weight both ways round; the packer takes a transposed view without copying it.
    layouts = {"[K, N]": dense, "[N, K]": np.ascontiguousarray(dense.T).T}
    print(f"{arguments.k} x {arguments.n}, {arguments.sparsity:.0%} zeros, {arguments.threads} threads; GB/s of fp32")
    results = []
    for weights in arguments.weights:
        options = packing.PackOptions(weight_type=packing.WeightType(weights), threads=arguments.threads)
        blob = packing.pack(dense, options)
        # The buffer is touched before: the file it would be written to is the operating system's affair.
        out = np.zeros(blob.size, np.uint8)
        work: dict[str, Callable[[], Any]] = {
            f"pack {layout}": functools.partial(_pack, matrix, options, out) for layout, matrix in layouts.items()
        }
        work["validate"] = functools.partial(packing.validate, blob)
        work["unpack"] = functools.partial(packing.unpack, blob, arguments.threads)
        for name, call in work.items():
            seconds = [_time(call) for _ in range(arguments.repeat)]
            rate = dense.nbytes / statistics.median(seconds) / 1e9
            print(
                f"{weights:>5} {name:<12} {rate:>8.2f}   ({dense.nbytes / max(seconds) / 1e9:.2f} to "
                f"{dense.nbytes / min(seconds) / 1e9:.2f})"
            )
            results.append({"weights": weights, "what": name, "gb_per_second": rate, "seconds": seconds})
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


def _pack(matrix: np.ndarray[Any, Any], options: packing.PackOptions, out: packing.Blob) -> None:
    """Both passes that a conversion makes: the size, then the bytes."""
    if packing.packed_size(matrix, options) != out.size:
        raise RuntimeError("the packed size of the same matrix changed")
    packing.pack_into(matrix, options, out)


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
