#!/usr/bin/env python3
"""A Llama-3.2-1B-shaped decoder with random weights, half of them zero: speed, memory, and what sharing saves.

The models are made once, in --folder (about 17 GB; ONNX Runtime's 4-bit quantizer takes 8 GB of memory):

- dense: fp32 with GroupQueryAttention, as onnxruntime-genai's builder writes it;
- dynamic: DynamicQuantizeMatMul for every linear layer, which is what ONNX Runtime makes of the dynamic int8 models of
  its quantizer (which itself takes more than 18 GB of memory for this one);
- nbits: ONNX Runtime's 4-bit form of it, MatMulNBits for every linear layer, groups of 32, accuracy level 4;
- bf16, int8, int4: what `sparamx-onnx convert --attention fast` makes of it;
- int4-g64: int4 with `--group-size 64`: an eighth of a bit of scale a weight, not a quarter;
- int4-packed: int4 with `--attention packed`;
- int4-huge: int4 in a process with SPARAMX_HUGE_PAGES=1, whose weights are its own, as llama.cpp's are.

Pairs of them are timed in turn, by `sparamx_onnx.bench_generation`, and several processes run one packed model at once.
Before a decode step the cache is filled with noise instead of being read from a prompt; the step reads the same bytes.

llama.cpp is compared with where --peer-python names a Python that has llama-cpp-python, and --gguf a model of the same
shape. With --json, what the file already has is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import documents
import machine
import numpy as np
import onnx
import rotation

import models
import sparamx_onnx
from sparamx_onnx.benchmark import start_worker
from sparamx_onnx.generation_benchmark import decoder_job
from sparamx_onnx.loading import load_model
from sparamx_onnx.models import genai_llama
from sparamx_onnx.models.llama import LlamaShape

BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
DENSE, DYNAMIC, NBITS, LLAMA_CPP = "dense", "dynamic", "nbits", "llama.cpp"
GROUPS_OF_64, PACKED_CACHE, HUGE_PAGES = "-g64", "-packed", "-huge"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One of our models, and what it is compared with.

    Attributes:
        ours: Type of the weights; ``-g64`` if 64 of them have a scale, ``-packed`` if the cache is packed, too, and
            ``-huge`` if they are copied into huge pages.
        theirs: The other model, which may be one of ours.
        decode: How many times as fast decode steps should be at least; 0 if no target is set.
        prefill: The same for reading prompts; None: not timed.
        long: Steps after --long tokens instead of --context.
    """

    ours: str
    theirs: str
    decode: float
    prefill: float | None = None
    long: bool = False

    def target(self, what: str) -> float:
        """For ``context`` or ``prompt``; 0 if there is none."""
        return (self.prefill or 0.0) if what == "prompt" else self.decode


PAIRS = (
    Pair("bf16", DENSE, decode=3.0, prefill=0),
    Pair("int8", DENSE, decode=4.5, prefill=0),
    Pair("int8", DYNAMIC, decode=0, prefill=0),
    Pair("int4", NBITS, decode=1.2, prefill=0),
    Pair("int4" + PACKED_CACHE, NBITS, decode=3.0, long=True),
    Pair("int4", LLAMA_CPP, decode=1.5, prefill=1.3),
    Pair("int4" + GROUPS_OF_64, LLAMA_CPP, decode=1.5, prefill=1.3),
    Pair("int4" + HUGE_PAGES, LLAMA_CPP, decode=1.5, prefill=1.3),
    Pair("int4" + HUGE_PAGES, "int4", decode=0),
)
# What a process may take beyond the file of its packed model.
MOST_BEYOND_FILE = 300e6
# Of a turn beside llama.cpp; and turns in which it reads a prompt.
STEPS = 8
PEER_PROMPTS = 3
ALIGNMENT = 4096

Cell = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILD / "generation", help="where the models are made and stay")
    for field in dataclasses.fields(LlamaShape):
        default = getattr(genai_llama.LLAMA_3_2_1B, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--context", type=int, default=512, help="decode after so many tokens")
    parser.add_argument("--long", type=int, default=16384, help="decode after so many with packed caches")
    parser.add_argument("--prompt", type=int, default=512, help="prompts of so many tokens")
    names = list(dict.fromkeys(pair.ours for pair in PAIRS))
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="which of ours")
    against = list(dict.fromkeys(pair.theirs for pair in PAIRS))
    parser.add_argument("--against", nargs="+", choices=against, default=against, help="which others")
    parser.add_argument("--processes", type=int, default=4, help="on one packed model; 0: do not measure that")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each model")
    parser.add_argument("--prepare", action="store_true", help="make the models, measure nothing")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="what llama.cpp runs")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the results here, and go on from them")
    arguments = parser.parse_args()
    if (arguments.peer_python is None) != (arguments.gguf is None):
        parser.error("--peer-python and --gguf go together")
    return arguments


# --- Models -----------------------------------------------------------------------------------------------------------


def model(name: str, arguments: argparse.Namespace) -> Path:
    """The file of one model, made if it is not there."""
    file: Path = arguments.folder / name.removesuffix(HUGE_PAGES) / genai_llama.MODEL_NAME
    if file.exists():
        return file
    print(f"making {file}", flush=True)
    if name == DENSE:
        sizes = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(LlamaShape)}
        return genai_llama.export(file.parent, LlamaShape(**sizes), sparsity=arguments.sparsity)
    dense = model(DENSE, arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    if name == NBITS:
        logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)  # it has something to say of every node
        models.quantize_int4(dense, file)
    elif name == DYNAMIC:
        quantize_int8(dense, file)
    else:
        sparamx_onnx.convert(
            dense,
            file,
            weights=name.partition("-")[0],
            group_size=64 if name.endswith(GROUPS_OF_64) else None,
            attention="packed" if name.endswith(PACKED_CACHE) else "fast",
        )
    return file


def quantize_int8(dense: Path, out: Path) -> None:
    """A model with DynamicQuantizeMatMul in place of every MatMul, one scale a weight; holds one weight at a time."""
    graph_model = onnx.load(dense, load_external_data=False)
    graph = graph_model.graph
    weights = {}
    for node in graph.node:
        if node.op_type == "MatMul":
            weights[node.input[1]] = node
            node.domain, node.op_type = "com.microsoft", "DynamicQuantizeMatMul"
            node.input.append(f"{node.input[1]}.scale")
    scales = []
    with out.with_name(out.name + ".data").open("wb") as data:
        for tensor in graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            values = onnx.numpy_helper.to_array(tensor, str(dense.parent))
            if tensor.name in weights:
                scale = np.float32(np.abs(values).max() / 127)
                scales.append(onnx.numpy_helper.from_array(np.array(scale), f"{tensor.name}.scale"))
                values = np.rint(values / scale).astype(np.int8)
                tensor.data_type = onnx.TensorProto.INT8
            data.write(bytes(-data.tell() % ALIGNMENT))
            place = {"location": data.name.rpartition("/")[2], "offset": str(data.tell()), "length": str(values.nbytes)}
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
            data.write(np.ascontiguousarray(values).data)
    graph.initializer.extend(scales)
    onnx.save(graph_model, out)


def file_bytes(file: Path) -> int:
    """Of the model and its data."""
    return load_model(file).bytes_on_disk


# --- Speed ------------------------------------------------------------------------------------------------------------


def compare(pair: Pair, tokens: dict[str, int], arguments: argparse.Namespace) -> dict[str, Cell]:
    """What is to be measured of a pair, with so many tokens each."""
    if pair.theirs == LLAMA_CPP or pair.ours.endswith(HUGE_PAGES):
        return compare_engines(pair, tokens, arguments)
    result = sparamx_onnx.bench_generation(
        model(pair.ours, arguments),
        model(pair.theirs, arguments),
        prompt=tokens.get("prompt"),
        context=tokens.get("context"),
        threads=arguments.threads,
        rounds=arguments.rounds,
    )
    memory = {name: timing.pss for name, timing in zip((pair.ours, pair.theirs), result.timings, strict=True)}
    rates = {
        "context": [timing.decode_tokens_per_second for timing in result.timings],
        "prompt": [timing.prefill_tokens_per_second for timing in result.timings],
    }
    faster = {
        "context": (result.decode_ratio, result.decode_ratio_quartiles),
        "prompt": (result.prefill_ratio, result.prefill_ratio_quartiles),
    }
    return {
        what: {
            "tokens_per_second": rates[what],
            "faster": faster[what][0],
            "faster_quartiles": faster[what][1],
            "pss": memory,
        }
        for what in tokens
    }


def engine(name: str, capacity: int, arguments: argparse.Namespace) -> rotation.Worker:
    """A process of the benchmark's own with one of our models, or with llama.cpp."""
    job = {"threads": arguments.threads, "capacity": capacity, "huge_pages": name.endswith(HUGE_PAGES)}
    if name == LLAMA_CPP:
        job |= {"engine": LLAMA_CPP, "model": str(arguments.gguf)}
        return rotation.Worker(job, arguments.peer_python, script="generation_engine.py")
    job |= {"engine": "sparamx", "model": str(model(name, arguments))}
    return rotation.Worker(job, script="generation_engine.py")


def compare_engines(pair: Pair, tokens: dict[str, int], arguments: argparse.Namespace) -> dict[str, Cell]:
    """What `sparamx_onnx.bench_generation` cannot compare: the same turns with llama.cpp, or in huge pages."""
    capacity = max(tokens.values()) + 2 * STEPS
    found = {}
    with engine(pair.ours, capacity, arguments) as one, engine(pair.theirs, capacity, arguments) as other:
        for what, count in tokens.items():
            request = {"prompt": count} if what == "prompt" else {"context": count, "runs": STEPS}
            turns: list[list[list[float]]] = [[], []]
            for worker in (one, other):
                worker.ask(request)
            for _ in range(arguments.rounds if what == "context" else min(arguments.rounds, PEER_PROMPTS)):
                for worker, samples in zip((one, other), turns, strict=True):
                    samples.append(worker.ask(request))
            scale = count if what == "prompt" else 1
            faster, spread = rotation.ratio(turns[1], turns[0])
            rates = [scale / rotation.median(samples) for samples in turns]
            found[what] = {"tokens_per_second": rates, "faster": faster, "faster_quartiles": spread, "pss": {}}
    return found


def report_speed(cell: Cell, target: float) -> None:
    first, second = cell["tokens_per_second"]
    low, high = cell["faster_quartiles"]
    text = f"{cell['what']} {cell['tokens']:>6}  {cell['ours']} {first:.1f} tokens/s, {cell['theirs']} {second:.1f}: "
    text += f"{cell['faster']:.2f}x ({low:.2f} to {high:.2f})"
    if target:
        text += f", at least {target}x wanted"
    pss = cell["pss"].get(cell["ours"])
    if pss is not None:
        beyond = pss - cell["file_bytes"]
        text += f"; PSS {pss / 1e6:.0f} MB, file {cell['file_bytes'] / 1e6:.0f} MB"
        text += f" ({beyond / 1e6:+.0f} MB, at most {MOST_BEYOND_FILE / 1e6:.0f} wanted)"
    print(text, flush=True)


# --- Sharing ----------------------------------------------------------------------------------------------------------


def share(weights: str, arguments: argparse.Namespace) -> Cell:
    """Memory of several processes that have all decoded with one model, and are all alive."""
    file, context = model(weights, arguments), arguments.context
    job = decoder_job(load_model(file), None, context, 1, 1)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(start_worker(job)) for _ in range(arguments.processes)]
        for _ in range(2):  # what the first one says, it says before the others share its pages
            for worker in workers:
                worker.turn({"context": context, "runs": STEPS})
        memory = [worker.memory or {} for worker in workers]
    return {"processes": memory, "file_bytes": file_bytes(file)}


def report_sharing(cell: Cell) -> None:
    pss = [memory.get("pss", 0) / 1e6 for memory in cell["processes"]]
    print(
        f"{len(pss)} processes on {cell['ours']} ({cell['file_bytes'] / 1e6:.0f} MB): PSS "
        + ", ".join(f"{each:.0f}" for each in pss)
        + f" MB, {sum(pss):.0f} MB in all",
        flush=True,
    )


def main() -> None:
    arguments = parse()
    rotation.clean_up_when_terminated()
    about = machine.describe()
    print(machine.headline(about))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pairs = [pair for pair in PAIRS if pair.ours in arguments.models and pair.theirs in arguments.against]
    if arguments.gguf is None:
        pairs = [pair for pair in pairs if pair.theirs != LLAMA_CPP]
    if arguments.prepare:
        for name in dict.fromkeys(name for pair in pairs for name in (pair.ours, pair.theirs)):
            if name != LLAMA_CPP:
                model(name, arguments)
        return
    keys = ("ours", "theirs", "what", "tokens", "threads", "hidden", "layers", "vocab", "sparsity")
    done = documents.Cells(arguments.json, about, keys)
    common = {name: getattr(arguments, name) for name in keys[4:]}
    for pair in pairs:
        tokens = {"context": arguments.long if pair.long else arguments.context}
        if pair.prefill is not None:
            tokens["prompt"] = arguments.prompt
        cells = {
            what: common | {"ours": pair.ours, "theirs": pair.theirs, "what": what, "tokens": count}
            for what, count in tokens.items()
        }
        missing = {what: tokens[what] for what, cell in cells.items() if not done.has(cell)}
        for what, figures in compare(pair, missing, arguments).items() if missing else ():
            cell = cells[what] | {"file_bytes": file_bytes(model(pair.ours, arguments))} | figures
            done.add(cell)
            report_speed(cell, pair.target(what))
        done.save()
    shared = dict.fromkeys(pair.ours for pair in pairs if not pair.ours.endswith(HUGE_PAGES))
    for name in shared if arguments.processes else ():
        cell = common | {"ours": name, "theirs": None, "what": "processes", "tokens": arguments.processes}
        if not done.has(cell):
            cell |= share(name, arguments)
            done.add(cell)
            done.save()
            report_sharing(cell)


if __name__ == "__main__":
    main()
