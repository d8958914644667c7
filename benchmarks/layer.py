#!/usr/bin/env python3
"""One linear layer, packed, against ONNX Runtime's own MatMul and against the memory it is read from.

Builds a model of so many equal layers that the packed weights are four times the L3 (or as many as --layers says),
converts it, and times both models in turn, everyone else stopped. The other model is the dense one in fp32 or, with
--against, what ONNX Runtime's own quantizers make of it: dynamic int8, or MatMulNBits in 4 bits (blocks of 32,
accuracy level 4). At M up to 4, where reading the weights is all the work, it also times two plain loops that only
read the same bytes, in the process of the converted model: `plain` (front to back, the hardware alone) and `prefetched`
(two streams per thread with software prefetch: the faster one, see stream_read.cc).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import linear_stack
import machine
import native
import numpy as np
import onnx
import rotation

import sparamx_onnx
from sparamx_onnx.models import caches

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "benchmarks"
LOOPS = ("plain", "prefetched")

# Weights that fit a cache would be timed in the cache.
L3_MULTIPLE = 4
LARGEST_STREAMED_M = 4
# The time of one turn; the first run of a turn comes on top.
TURN_SECONDS = 0.4
# Error of the chain's output, relative to its norm, beyond which something is wrong rather than rounded.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "int8": 0.2, "int4": 0.5}


@dataclass(frozen=True)
class Row:
    """What was measured at one M; times in seconds."""

    m: int
    dense: list[list[float]]
    packed: list[list[float]]
    streams: dict[str, list[list[float]]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=14336)
    parser.add_argument("--layers", type=int, help="default: packed weights of four times the L3")
    parser.add_argument(
        "--m", type=lambda text: [int(m) for m in text.split(",")], default=[1, 16, 128], metavar="M,M,..."
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=sorted(TOLERANCE), default="bf16")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument(
        "--against", choices=("fp32", "int8", "int4"), default="fp32", help="weights of the other model"
    )
    parser.add_argument("--rounds", type=int, default=10, help="turns of each engine")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where the models lie while they are needed")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="also write all samples to this file")
    return parser.parse_args()


def packed_layers(k: int, n: int, weights: str, sparsity: float) -> int:
    """How many layers make packed weights of `L3_MULTIPLE` times the L3."""
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}[weights]
    layer_bytes = k * n * min((bits * (1 - sparsity) + 1), bits) / 8
    return max(1, -int(-L3_MULTIPLE * caches.largest_cache_bytes() // layer_bytes))


def quantized(dense: Path, weights: str, folder: Path) -> Path:
    """The model that ONNX Runtime's own quantizers make of the dense one; itself for fp32."""
    if weights == "fp32":
        return dense
    out = folder / "quantized.onnx"
    if weights == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(dense, out, weight_type=QuantType.QInt8, use_external_data_format=True)
        return out
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(dense), block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)
    return out


def blob_range(model: Path) -> tuple[Path, int, int, int]:
    """The data file of a converted model, where its packed weights begin and end in it, and their bytes in all."""
    blobs = []
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        if tensor.data_type == onnx.TensorProto.UINT8:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            blobs.append((int(entries["offset"]), int(entries["length"]), entries["location"]))
    if len({location for _, _, location in blobs}) != 1:
        raise RuntimeError(f"{model} does not keep its packed weights in one data file")
    begin, end = min(blobs)[0], max(offset + length for offset, length, _ in blobs)
    return model.parent / blobs[0][2], begin, end, sum(length for _, length, _ in blobs)


def measure(dense: rotation.Worker, packed: rotation.Worker, m: int, rounds: int) -> Row:
    workers = {"dense": dense, "packed": packed}
    # Enough runs to fill a turn, from one run of each.
    counts = {
        name: max(1, min(50, round(TURN_SECONDS / worker.ask({"run": 1, "m": m})[0])))
        for name, worker in workers.items()
    }
    row = Row(m, [], [], {loop: [] for loop in LOOPS} if m <= LARGEST_STREAMED_M else {})
    for _ in range(rounds):
        row.dense.append(dense.ask({"run": counts["dense"], "m": m}))
        row.packed.append(packed.ask({"run": counts["packed"], "m": m}))
        for loop, turns in row.streams.items():
            turns.append(packed.ask({"stream": counts["packed"], "loop": LOOPS.index(loop)}))
    return row


def relative_error(dense: rotation.Worker, packed: rotation.Worker) -> float:
    """Norm of the difference of the last outputs, over the norm of the dense model's."""
    outputs = []
    with tempfile.TemporaryDirectory() as folder:
        for index, worker in enumerate((dense, packed)):
            path = Path(folder) / f"{index}.npy"
            worker.ask({"output": str(path), "m": 1})
            outputs.append(np.load(path))
    return float(np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[0]))


def report(rows: list[Row], against: str, layers: int, stored_bytes: int, read_bytes: int) -> list[dict[str, Any]]:
    """Prints a line per M and returns the same as data."""
    print(f"{'M':>4} {'ONNX Runtime ' + against:>18} {'packed':>12} {'faster by':>24}   per layer, median ms")
    results = []
    for row in rows:
        medians = {"dense": rotation.median(row.dense), "packed": rotation.median(row.packed)}
        faster, spread = rotation.ratio(row.dense, row.packed)
        result: dict[str, Any] = {"m": row.m, "median_seconds": medians, "faster": faster, "faster_quartiles": spread}
        print(
            f"{row.m:>4} {medians['dense'] / layers * 1e3:>18.3f} {medians['packed'] / layers * 1e3:>12.3f} "
            f"{faster:>10.2f}x ({spread[0]:.2f} to {spread[1]:.2f})"
        )
        for loop, turns in row.streams.items():
            median = rotation.median(turns)
            share, share_spread = rotation.ratio(turns, row.packed)
            gaps = stored_bytes / read_bytes  # the loops read the padding between the matrices too
            result[loop] = {
                "kernel_gb_per_second": stored_bytes / medians["packed"] / 1e9,
                "loop_gb_per_second": read_bytes / median / 1e9,
                "share": share * gaps,
                "share_quartiles": [value * gaps for value in share_spread],
            }
            print(
                f"{'':>4} reads {stored_bytes / medians['packed'] / 1e9:.1f} GB/s; a {loop} loop over the same file "
                f"{read_bytes / median / 1e9:.1f} GB/s: {share * gaps:.1%} "
                f"({share_spread[0] * gaps:.1%} to {share_spread[1] * gaps:.1%})"
            )
        results.append(result)
    return results


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Builds the models in `folder`, measures, prints, and returns everything as data."""
    layers = arguments.layers or packed_layers(arguments.k, arguments.n, arguments.weights, arguments.sparsity)
    dense_bytes = layers * arguments.k * arguments.n * 4
    # ONNX Runtime keeps a private, repacked copy of every dense weight.
    if dense_bytes * 1.2 > machine.available_bytes():
        sys.exit(
            f"layer.py: {layers} layers need {dense_bytes * 1.2 / 1e9:.1f} GB of memory for ONNX Runtime's dense copy, "
            f"and {machine.available_bytes() / 1e9:.1f} GB are free; take fewer --layers"
        )
    about = machine.describe()
    print(machine.headline(about))
    print(
        f"{layers} layers {arguments.k} x {arguments.n}, {arguments.weights} weights, {arguments.sparsity:.0%} zeros, "
        f"{arguments.threads} threads, {arguments.rounds} turns each",
        flush=True,
    )
    dense_path, packed_path = folder / "dense.onnx", folder / "packed.onnx"
    linear_stack.write(dense_path, arguments.k, arguments.n, layers, arguments.sparsity)
    sparamx_onnx.convert(dense_path, packed_path, method="keep", weights=arguments.weights)
    other_path = quantized(dense_path, arguments.against, folder)
    data, begin, end, stored_bytes = blob_range(packed_path)
    print(f"packed weights {stored_bytes / 1e9:.2f} GB, dense {dense_bytes / 1e9:.2f} GB", flush=True)
    job = {"threads": arguments.threads, "seed": 0}
    library = str(native.build(HERE / "stream_read.cc", BUILD))
    stream = {"library": library, "data": str(data), "begin": begin, "end": end}
    with (
        rotation.Worker(job | {"model": str(other_path), "sparse": False, "stream": None}) as dense,
        rotation.Worker(job | {"model": str(packed_path), "sparse": True, "stream": stream}) as packed,
    ):
        error = relative_error(dense, packed)
        if not error <= TOLERANCE[arguments.weights] + (
            0 if arguments.against == "fp32" else TOLERANCE[arguments.against]
        ):
            sys.exit(f"layer.py: the packed model's output is wrong: relative error {error:.3g}")
        rows = [measure(dense, packed, m, arguments.rounds) for m in arguments.m]
    results = report(rows, arguments.against, layers, stored_bytes, end - begin)
    return {
        "machine": about,
        "arguments": {key: value for key, value in vars(arguments).items() if key not in ("folder", "json")},
        "layers": layers,
        "packed_bytes": stored_bytes,
        "dense_bytes": dense_bytes,
        "relative_error": error,
        "results": results,
        "samples": [{"m": row.m, "dense": row.dense, "packed": row.packed, **row.streams} for row in rows],
    }


def main() -> None:
    arguments = parse()
    rotation.clean_up_when_terminated()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        document = run(arguments, Path(folder))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
