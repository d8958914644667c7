#!/usr/bin/env python3
"""Layers with the same input (query, key, value; gate, up) as one operator against one operator each.

Builds models of many such blocks, converts them with --fuse-siblings always and never, and runs both in turn on one
thread. Times are the processor time of that thread, in which other load counts little; what several threads save by
sharing out work once and not three times comes on top. This is what the rule of `auto` in graph_passes/fuse_siblings.py
was made from.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import documents
import linear_stack
import machine
import numpy as np
import onnx
import onnxruntime
import rotation
from onnx import TensorProto, helper

import sparamx_onnx

BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
_OPSET, _IR_VERSION = 20, 10  # what the oldest supported ONNX Runtime reads

# K and the outputs of the siblings: query, key and value of Llama-3-8B and Llama-3.2-1B and of a MiniLM; gate and up of
# the first two.
CASES = {
    "qkv-8b": (4096, (4096, 1024, 1024)),
    "qkv-1b": (2048, (2048, 512, 512)),
    "qkv-384": (384, (384, 384, 384)),
    "gate-up-8b": (4096, (14336, 14336)),
    "gate-up-1b": (2048, (8192, 8192)),
}
MOST_BLOCKS = 32
# The time of one turn.
TURN_SECONDS = 0.2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), metavar="CASE,CASE,...")
    parser.add_argument("--weights", type=lambda text: text.split(","), default=["bf16", "int4"], metavar="TYPE,...")
    parser.add_argument("--m", type=lambda text: [int(m) for m in text.split(",")], default=[1, 16, 128])
    parser.add_argument("--megabytes", type=int, default=1000, help="dense weights of a model, at most")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each model")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where the models lie while they are needed")
    parser.add_argument(
        "--json", type=Path, metavar="OUT.json", help="write results to this file, and go on from what it has"
    )
    arguments = parser.parse_args()
    for case in arguments.cases:
        if case not in CASES:
            parser.error(f"there is no case {case}; there are {', '.join(CASES)}")
    return arguments


def write(path: Path, k: int, widths: tuple[int, ...], blocks: int, sparsity: float) -> None:
    """Writes `path` and `path`.data: X [M, k] through blocks of siblings, the first of which hands on k outputs.

    One column of each of the others is added, so that nobody can leave them out.
    """
    nodes, initializers = [], []
    rng = np.random.default_rng(0)
    data = path.with_name(path.name + ".data")
    for name, value in {"zero": 0, "one": 1, "k": k, "axis": 1}.items():
        initializers.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    current = "X"
    with data.open("wb") as file:
        bases = [linear_stack.draw(k, n, sparsity, seed) for seed, n in enumerate(widths)]
        for block in range(blocks):
            outputs = [f"y.{block}.{index}" for index in range(len(widths))]
            for base, output in zip(bases, outputs, strict=True):
                weight = f"{output}.weight"
                turn = int(rng.integers(k))  # other bytes in every block, without drawing them anew
                initializers.append(
                    linear_stack.external(weight, list(base.shape), data.name, file.tell(), base.nbytes)
                )
                file.write(base[turn:].data)
                file.write(base[:turn].data)
                nodes.append(helper.make_node("MatMul", [current, weight], [output], name=output))
            current = f"{outputs[0]}.next"
            nodes.append(helper.make_node("Slice", [outputs[0], "zero", "k", "axis"], [current]))
            for output in outputs[1:]:
                nodes.append(helper.make_node("Slice", [output, "zero", "one", "axis"], [f"{output}.column"]))
                nodes.append(helper.make_node("Add", [current, f"{output}.column"], [f"{output}.sum"]))
                current = f"{output}.sum"
    nodes.append(helper.make_node("Identity", [current], ["Y"]))
    graph = helper.make_graph(
        nodes,
        "siblings",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", k])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION), path)


def measure(models: dict[str, Path], m: int, rounds: int) -> dict[str, list[list[float]]]:
    """Processor seconds of every run, a turn of each model after the other."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # no other thread that spins while it is not asked
    sessions = {when: sparamx_onnx.InferenceSession(path, options) for when, path in models.items()}
    width = next(iter(sessions.values())).get_inputs()[0].shape[1]
    feeds = {"X": np.random.default_rng(0).standard_normal((m, width), np.float32)}

    def seconds(session: onnxruntime.InferenceSession) -> float:
        start = time.thread_time()
        session.run(None, feeds)
        return time.thread_time() - start

    first = max(min(seconds(session) for _ in range(2)) for session in sessions.values())
    count = max(1, min(200, round(TURN_SECONDS / first)))
    turns: dict[str, list[list[float]]] = {when: [] for when in sessions}
    for _ in range(rounds):
        for when, session in sessions.items():
            turns[when].append([seconds(session) for _ in range(count)])
    return turns


def run(arguments: argparse.Namespace, folder: Path, done: documents.Cells) -> None:
    """Builds the models, measures and prints every case, weight type and M that has not been measured."""
    print(f"{'case':<12} {'weights':<8} {'M':>4} {'apart, us':>10} {'fused, us':>10} {'faster by':>22}   per block")
    for case in arguments.cases:
        k, widths = CASES[case]
        blocks = max(2, min(MOST_BLOCKS, arguments.megabytes * 10**6 // (4 * k * sum(widths))))
        dense = folder / f"{case}.onnx"
        write(dense, k, widths, blocks, arguments.sparsity)
        for weights in arguments.weights:
            cells = [{"case": case, "weights": weights, "m": m} for m in arguments.m]
            cells = [cell for cell in cells if not done.has(cell)]
            models = {when: folder / f"{when}.onnx" for when in ("never", "always")}
            for when, path in models.items() if cells else ():
                sparamx_onnx.convert(dense, path, weights=weights, fuse_siblings=when, force=True)
            for cell in cells:
                turns = measure(models, cell["m"], arguments.rounds)
                faster, spread = rotation.ratio(turns["never"], turns["always"])
                medians = {name: rotation.median(samples) / blocks for name, samples in turns.items()}
                print(
                    f"{case:<12} {weights:<8} {cell['m']:>4} {medians['never'] * 1e6:>10.1f} "
                    f"{medians['always'] * 1e6:>10.1f} {faster:>8.3f}x ({spread[0]:.3f} to {spread[1]:.3f})",
                    flush=True,
                )
                about = {"k": k, "widths": widths, "blocks": blocks, "block_seconds": medians}
                done.add(cell | about | {"faster": faster, "faster_quartiles": spread})
                done.save()
        for path in folder.iterdir():
            path.unlink()


def main() -> None:
    arguments = parse()
    rotation.clean_up_when_terminated()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    about = machine.describe()
    print(machine.headline(about))
    done = documents.Cells(arguments.json, about, ("case", "weights", "m"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(arguments, Path(folder), done)


if __name__ == "__main__":
    main()
