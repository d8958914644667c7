#!/usr/bin/env python3
"""What an operator costs beside its work: many tiny layers in a row, K = N = 64, one row, for every weight type.

Times are the processor time of one thread, in which other load on the machine counts little; ONNX Runtime's own cost of
a node is part of them. Beside them, the same row of ONNX Runtime's MatMul.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import linear_stack
import machine
import numpy as np
import onnxruntime
import rotation

import sparamx_onnx

BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="K and N")
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=200, help="runs of each model, in turn")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where the models lie while they are needed")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="also write the results to this file")
    return parser.parse_args()


def sessions(arguments: argparse.Namespace, folder: Path) -> dict[str, onnxruntime.InferenceSession]:
    """The dense model and its conversions, one thread each."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    dense = folder / "dense.onnx"
    linear_stack.write(dense, arguments.size, arguments.size, arguments.layers, 0.5)
    opened = {"MatMul": onnxruntime.InferenceSession(dense, options, providers=["CPUExecutionProvider"])}
    for weights in ("fp32", "bf16", "int8", "int4"):
        path = folder / f"{weights}.onnx"
        sparamx_onnx.convert(dense, path, weights=weights)
        opened[weights] = sparamx_onnx.InferenceSession(path, options)
    return opened


def measure(opened: dict[str, onnxruntime.InferenceSession], rounds: int, layers: int) -> list[dict[str, Any]]:
    """Median and quartiles of the seconds of a layer, for every session."""
    samples: dict[str, list[float]] = {name: [] for name in opened}
    for _ in range(rounds):
        for name, session in opened.items():
            feeds = {"X": np.ones((1, session.get_inputs()[0].shape[1]), np.float32)}
            start = time.thread_time()
            session.run(None, feeds)
            samples[name].append((time.thread_time() - start) / layers)
    return [
        {"layer": name, "median_seconds": statistics.median(times), "quartiles": rotation.quartiles(times)}
        for name, times in samples.items()
    ]


def main() -> None:
    arguments = parse()
    rotation.clean_up_when_terminated()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    about = machine.describe()
    print(machine.headline(about))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(sessions(arguments, Path(folder)), arguments.rounds, arguments.layers)
    for result in results:
        low, high = (seconds * 1e6 for seconds in result["quartiles"])
        print(f"{result['layer']:<8} {result['median_seconds'] * 1e6:6.2f} us a layer ({low:.2f} to {high:.2f})")
    if arguments.json:
        values = {"size": arguments.size, "layers": arguments.layers, "rounds": arguments.rounds}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": about, **values, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
