#!/usr/bin/env python3
"""Linear layers as ONNX models: packed, in ONNX Runtime's own types, and in other engines, timed in turn.

For every shape, a stack of equal layers with fp32 weights is written; ONNX Runtime's quantizers make the dynamic int8
and the 4-bit model (MatMulNBits, groups of 32, accuracy level 4) of it, `sparamx_onnx.convert` the packed ones. Each
engine has a process of its own, and whoever is not asked is stopped. At M up to 4, where reading the weights is all the
work, the converted models' processes also time two loops that only read the same bytes (see stream_read.cc).

OpenVINO and DeepSparse need environments of their own: --peer-python names the Python of each (docs/performance.md
says what to install); without one their columns say "not installed".

With --json, what the file already has is not measured again. Models are removed afterwards, or kept with --keep.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import documents
import linear_stack
import machine
import native
import numpy as np
import onnx
import rotation
import shapes

import sparamx_onnx

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"
LOOPS = ("plain", "prefetched")
LARGEST_STREAMED_M = 4
MOST_LAYERS = 40
MOST_RUNS = 200
# Error of the chain's output, relative to its norm, beyond which something is wrong rather than rounded.
TOLERANCE = {"packed-fp32": 1e-4, "packed-bf16": 0.05, "packed-int8": 0.2, "packed-int4": 0.7}


@dataclass(frozen=True)
class Engine:
    """A competitor: what runs it, the model file that it gets, and its memory, in bytes per byte of fp32 weights."""

    runs: str
    model: str
    memory: float
    module: str = ""  # what its Python must have; empty: this one


ENGINES = {
    "ort-fp32": Engine("onnxruntime", "dense.onnx", 1.1),
    "ort-int8": Engine("onnxruntime", "int8.onnx", 0.3),
    "ort-int4": Engine("onnxruntime", "int4.onnx", 0.3),
    "openvino-bf16": Engine("openvino-bf16", "dense.onnx", 1.0, "openvino"),
    "openvino-f32": Engine("openvino-f32", "dense.onnx", 1.1, "openvino"),
    "deepsparse": Engine("deepsparse", "dense.onnx", 1.1, "deepsparse"),
    "packed-fp32": Engine("sparamx", "packed-fp32.onnx", 0),
    "packed-bf16": Engine("sparamx", "packed-bf16.onnx", 0),
    "packed-int8": Engine("sparamx", "packed-int8.onnx", 0),
    "packed-int4": Engine("sparamx", "packed-int4.onnx", 0),
}
STANDARD = [name for name in ENGINES if name != "openvino-f32"]
BASELINE = "ort-fp32"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096", metavar="KxN,...", help="or 'all': those of shapes.py")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5])
    parser.add_argument("--m", nargs="+", type=int, default=[1, 2, 4, 16, 128, 512])
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=STANDARD, metavar="NAME")
    parser.add_argument("--peer-python", nargs="+", default=[], metavar="PATH", help="Pythons with other engines")
    parser.add_argument("--layers", type=int, help=f"default: as --dense-gb says, {MOST_LAYERS} at most")
    parser.add_argument("--dense-gb", type=float, default=2.7, help="fp32 weights of a stack")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each engine")
    parser.add_argument("--turn-seconds", type=float, default=0.15, help="of each engine, beside a first run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where the models lie while they are needed")
    parser.add_argument("--keep", action="store_true", help="leave the models there, and use those that are there")
    parser.add_argument("--prepare", action="store_true", help="with --keep: make the models, measure nothing")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the results here, and go on from them")
    arguments = parser.parse_args()
    arguments.shapes = shapes.DISTINCT if arguments.shapes == "all" else shapes.parse(arguments.shapes)
    return arguments


def find_pythons(engines: Sequence[str], peers: Sequence[str]) -> dict[str, str]:
    """The Python that each engine runs in; engines that none of them has are left out."""
    found = {}
    for name in engines:
        module = ENGINES[name].module
        for python in [sys.executable, *peers]:
            search = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
            if not module or subprocess.run([python, "-c", search], check=False).returncode == 0:
                found[name] = python
                break
    return found


# --- Models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """The models of one shape and sparsity, in a folder of their own."""

    k: int
    n: int
    layers: int
    sparsity: float
    folder: Path

    @property
    def dense_bytes(self) -> int:
        """Of the fp32 weights."""
        return self.layers * self.k * self.n * 4

    def model(self, name: str) -> Path:
        """The model of one engine, made if it is not there."""
        path = self.folder / ENGINES[name].model
        if path.exists():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        dense = self.folder / "dense.onnx"
        if path == dense:
            linear_stack.write(dense, self.k, self.n, self.layers, self.sparsity)
            return dense
        self.model(BASELINE)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            made = Path(folder) / path.name
            if name == "ort-int8":
                _quantize_int8(dense, made)
            elif name == "ort-int4":
                quantize_int4(dense, made)
            else:
                sparamx_onnx.convert(dense, made, method="keep", weights=name.removeprefix("packed-"))
            # The model last: where it is, it is whole.
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == made):
                file.replace(self.folder / file.name)
        return path


def _quantize_int8(dense: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(dense, out, weight_type=QuantType.QInt8, use_external_data_format=True)


def quantize_int4(dense: Path, out: Path) -> None:
    """ONNX Runtime's 4-bit form of every MatMul."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(dense), block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)


@dataclass(frozen=True)
class BlobRange:
    """Where the packed weights of a converted model lie."""

    data: Path
    begin: int
    end: int
    packed_bytes: int  # without the padding between them


def blob_range(model: Path) -> BlobRange:
    """Reads it from the model's external data entries."""
    blobs = []
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        if tensor.data_type == onnx.TensorProto.UINT8:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            blobs.append((int(entries["offset"]), int(entries["length"]), entries["location"]))
    if len({location for _, _, location in blobs}) != 1:
        raise RuntimeError(f"{model} does not keep its packed weights in one data file")
    end = max(offset + length for offset, length, _ in blobs)
    return BlobRange(model.parent / blobs[0][2], min(blobs)[0], end, sum(length for _, length, _ in blobs))


# --- Measuring --------------------------------------------------------------------------------------------------------


def start(name: str, stack: Stack, python: str, threads: int) -> rotation.Worker:
    """The engine's process, with its model loaded."""
    model = stack.model(name)
    job = {"engine": ENGINES[name].runs, "model": str(model), "threads": threads, "seed": 0, "stream": None}
    if ENGINES[name].runs == "sparamx":
        where = blob_range(model)
        library = str(native.build(HERE / "stream_read.cc", BUILD))
        job["stream"] = {"library": library, "data": str(where.data), "begin": where.begin, "end": where.end}
    return rotation.Worker(job, python)


def check(workers: dict[str, rotation.Worker]) -> None:
    """Ends the program where a packed model's output is not what the dense one's is, as far as rounding goes."""
    if BASELINE not in workers:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.npy"

        def output(name: str) -> np.ndarray[Any, Any]:
            workers[name].ask({"output": str(path), "m": 1})
            result: np.ndarray[Any, Any] = np.load(path)
            return result

        right = output(BASELINE)
        for name in workers:
            if name in TOLERANCE:
                error = float(np.linalg.norm(output(name) - right) / np.linalg.norm(right))
                if not error <= TOLERANCE[name]:
                    sys.exit(f"models.py: the output of {name} is wrong: relative error {error:.3g}")


def measure(workers: dict[str, rotation.Worker], m: int, rounds: int, turn_seconds: float) -> dict[str, Any]:
    """Median times of every engine, and of every turn; times of the loops over the packed weights."""
    counts = {}
    for name, worker in workers.items():
        counts[name] = max(1, min(MOST_RUNS, round(turn_seconds / worker.ask({"run": 1, "m": m})[0])))
    samples: dict[str, list[list[float]]] = {name: [] for name in workers}
    streamed = [name for name in workers if ENGINES[name].runs == "sparamx" and m <= LARGEST_STREAMED_M]
    streams: dict[str, dict[str, list[list[float]]]] = {name: {loop: [] for loop in LOOPS} for name in streamed}
    for _ in range(rounds):
        for name, worker in workers.items():
            samples[name].append(worker.ask({"run": counts[name], "m": m}))
            for index, turns in enumerate(streams.get(name, {}).values()):
                turns.append(worker.ask({"stream": counts[name], "loop": index}))
    return {
        "engines": {name: _summary(turns) for name, turns in samples.items()},
        "streams": {name: {loop: _summary(turns) for loop, turns in loops.items()} for name, loops in streams.items()},
    }


def _summary(turns: list[list[float]]) -> dict[str, Any]:
    return {"seconds": rotation.median(turns), "turns": [statistics.median(turn) for turn in turns]}


def measure_stack(stack: Stack, arguments: argparse.Namespace, pythons: dict[str, str], done: documents.Cells) -> None:
    """Everything that is missing of one shape and sparsity."""
    matrix = {"k": stack.k, "n": stack.n, "sparsity": stack.sparsity, "layers": stack.layers}
    rows = [m for m in arguments.m if not done.has(matrix | {"m": m, "threads": arguments.threads})]
    if not rows:
        return
    print(
        f"\n{stack.layers} layers {stack.k} x {stack.n}, {stack.sparsity:.0%} zeros, "
        f"dense {stack.dense_bytes / 1e9:.2f} GB, {arguments.threads} threads, {arguments.rounds} turns each",
        flush=True,
    )
    with contextlib.ExitStack() as open_workers:
        workers = {
            name: open_workers.enter_context(start(name, stack, python, arguments.threads))
            for name, python in pythons.items()
        }
        packed = {name: blob_range(stack.model(name)) for name in workers if ENGINES[name].runs == "sparamx"}
        check(workers)
        for m in rows:
            cell = matrix | {
                "m": m,
                "threads": arguments.threads,
                "dense_bytes": stack.dense_bytes,
                "packed_bytes": {name: where.packed_bytes for name, where in packed.items()},
                "streamed_bytes": {name: where.end - where.begin for name, where in packed.items()},
                "missing": [name for name in arguments.engines if name not in pythons],
            }
            cell |= measure(workers, m, arguments.rounds, arguments.turn_seconds)
            done.add(cell)
            done.save()
            report(cell, arguments.engines)


def report(cell: dict[str, Any], engines: Sequence[str]) -> None:
    """Prints one M: a line per engine."""
    baseline = cell["engines"].get(BASELINE)
    for name in engines:
        text = f"M {cell['m']:>4} {name:<14}"
        if name not in cell["engines"]:
            print(f"{text} not installed")
            continue
        engine = cell["engines"][name]
        text += f" {engine['seconds'] / cell['layers'] * 1e3:>9.3f} ms a layer"
        if baseline and name != BASELINE:
            ratios = [a / b for a, b in zip(baseline["turns"], engine["turns"], strict=True)]
            low, high = rotation.quartiles(ratios)
            text += f"   {baseline['seconds'] / engine['seconds']:>5.2f}x {BASELINE} ({low:.2f} to {high:.2f})"
        for loop, share in shares(cell, name).items():
            text += f"   {share:.1%} of the {loop} loop"
        print(text, flush=True)


def shares(cell: dict[str, Any], name: str) -> dict[str, float]:
    """Bandwidth of a packed engine by that of the loops over the same file. The loops read the padding too."""
    loops = cell["streams"].get(name, {})
    padded = cell["streamed_bytes"].get(name, 1) / cell["packed_bytes"].get(name, 1)
    return {loop: times["seconds"] / padded / cell["engines"][name]["seconds"] for loop, times in loops.items()}


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """All shapes and sparsities."""
    about = machine.describe()
    print(machine.headline(about))
    pythons = find_pythons(arguments.engines, arguments.peer_python)
    done = documents.Cells(arguments.json, about, ("k", "n", "sparsity", "layers", "threads", "m"))
    end = time.monotonic() + 60 * arguments.minutes
    for (k, n), sparsity in itertools.product(arguments.shapes, arguments.sparsity):
        if time.monotonic() > end:
            print("stopped after the time given; the same command goes on")
            return
        layers = arguments.layers or max(1, min(MOST_LAYERS, round(arguments.dense_gb * 1e9 / (k * n * 4))))
        stack = Stack(k, n, layers, sparsity, folder / f"{shapes.name((k, n))}-{layers}-{sparsity:g}")
        needed = stack.dense_bytes * sum(ENGINES[name].memory for name in pythons)
        if needed > machine.available_bytes():
            sys.exit(
                f"models.py: {layers} layers need {needed / 1e9:.1f} GB of memory for the engines' copies, "
                f"and {machine.available_bytes() / 1e9:.1f} GB are free; take fewer --layers or --engines"
            )
        for name in pythons:
            stack.model(name)
        if not arguments.prepare:
            measure_stack(stack, arguments, pythons, done)
        if not arguments.keep:
            shutil.rmtree(stack.folder)


def main() -> None:
    arguments = parse()
    rotation.clean_up_when_terminated()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.keep:
        run(arguments, arguments.folder)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(arguments, Path(folder))


if __name__ == "__main__":
    main()
