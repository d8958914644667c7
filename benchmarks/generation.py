#!/usr/bin/env python3
"""A Llama-3.2-1B-shaped decoder with random weights, half of them zero: speed, memory, and what sharing saves.

The models are made once, in --folder (about 13 GB; ONNX Runtime's quantizer takes 8 GB of memory):

- dense: fp32 with GroupQueryAttention, as onnxruntime-genai's builder writes it;
- nbits: ONNX Runtime's 4-bit form of it, MatMulNBits for every linear layer, groups of 32, accuracy level 4;
- bf16, int8, int4: what `sparamx-onnx convert --attention fast` makes of it.

Pairs of them are timed in turn, by `sparamx_onnx.bench_generation`, and several processes run one packed model at once.

llama.cpp is compared with where --peer-python names a Python that has llama-cpp-python, and --gguf a model of the same
shape. With --json, what the file already has is not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import documents
import machine
import rotation

import models
import sparamx_onnx
from sparamx_onnx.benchmark import start_worker
from sparamx_onnx.genai_config import CONFIG_NAME
from sparamx_onnx.generation_benchmark import decoder_job
from sparamx_onnx.loading import load_model
from sparamx_onnx.models import genai_llama
from sparamx_onnx.models.llama import LlamaShape

BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
DENSE, NBITS, LLAMA_CPP = "dense", "nbits", "llama.cpp"
PACKED = ("bf16", "int8", "int4")
# Ours, what it is compared with, and how many times as fast it should decode.
PAIRS = {("bf16", DENSE): 3.0, ("int8", DENSE): 4.5, ("int4", NBITS): 1.2, ("int4", LLAMA_CPP): 1.5}
# What a process may take beyond the file of its packed model.
MOST_BEYOND_FILE = 300e6
STEPS = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILD / "generation", help="where the models are made and stay")
    for field in dataclasses.fields(LlamaShape):
        default = getattr(genai_llama.LLAMA_3_2_1B, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--context", type=int, nargs="*", default=[512], help="decode after so many tokens")
    parser.add_argument("--prompt", type=int, nargs="*", default=[512], help="prompts of so many tokens")
    names = sorted({ours for ours, _ in PAIRS})
    parser.add_argument("--weights", nargs="+", choices=names, default=names)
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
    """The folder of one model, made if it is not there."""
    folder: Path = arguments.folder / name
    if (folder / genai_llama.MODEL_NAME).exists():
        return folder
    print(f"making {folder}", flush=True)
    dense = arguments.folder / DENSE
    if name == DENSE:
        sizes = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(LlamaShape)}
        genai_llama.export(dense, LlamaShape(**sizes), sparsity=arguments.sparsity)
    elif name == NBITS:
        folder.mkdir(parents=True, exist_ok=True)
        logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)  # it has something to say of every node
        models.quantize_int4(model(DENSE, arguments) / genai_llama.MODEL_NAME, folder / genai_llama.MODEL_NAME)
        shutil.copy(dense / CONFIG_NAME, folder)
    else:
        sparamx_onnx.convert(model(DENSE, arguments), folder, weights=name, attention="fast")
    return folder


def file_bytes(folder: Path) -> int:
    """Of the model and its data."""
    return load_model(folder).bytes_on_disk


# --- Speed ------------------------------------------------------------------------------------------------------------


def compare(ours: str, theirs: str, what: str, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One pair, either ``prompt`` or ``context`` of so many tokens."""
    if theirs == LLAMA_CPP:
        return compare_with_peer(ours, what, tokens, arguments)
    result = sparamx_onnx.bench_generation(
        model(ours, arguments),
        model(theirs, arguments),
        prompt=tokens if what == "prompt" else None,
        context=tokens if what == "context" else None,
        threads=arguments.threads,
        rounds=arguments.rounds,
    )
    if what == "prompt":
        rates, ratio = [timing.prefill_tokens_per_second for timing in result.timings], result.prefill_ratio
        spread = result.prefill_ratio_quartiles
    else:
        rates, ratio = [timing.decode_tokens_per_second for timing in result.timings], result.decode_ratio
        spread = result.decode_ratio_quartiles
    memory = {name: timing.pss for name, timing in zip((ours, theirs), result.timings, strict=True)}
    return {"tokens_per_second": rates, "faster": ratio, "faster_quartiles": spread, "pss": memory}


def compare_with_peer(ours: str, what: str, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours against llama.cpp: the same turns, in processes of the benchmark's own."""
    capacity = tokens + 2 * STEPS
    job = {"threads": arguments.threads, "capacity": capacity}
    packed = job | {"engine": "sparamx", "model": str(model(ours, arguments))}
    peer = job | {"engine": LLAMA_CPP, "model": str(arguments.gguf)}
    request = {"prompt": tokens} if what == "prompt" else {"context": tokens, "runs": STEPS}
    turns: list[list[list[float]]] = [[], []]
    with (
        rotation.Worker(packed, script="generation_engine.py") as one,
        rotation.Worker(peer, arguments.peer_python, script="generation_engine.py") as other,
    ):
        for worker in (one, other):
            worker.ask(request)
        for _ in range(arguments.rounds if what == "context" else min(arguments.rounds, 3)):
            for worker, samples in zip((one, other), turns, strict=True):
                samples.append(worker.ask(request))
    scale = tokens if what == "prompt" else 1
    faster, spread = rotation.ratio(turns[1], turns[0])
    rates = [scale / rotation.median(samples) for samples in turns]
    return {"tokens_per_second": rates, "faster": faster, "faster_quartiles": spread, "pss": {}}


def report_speed(cell: dict[str, Any]) -> None:
    first, second = cell["tokens_per_second"]
    low, high = cell["faster_quartiles"]
    text = f"{cell['what']} {cell['tokens']:>6}  {cell['ours']} {first:.1f} tokens/s, {cell['theirs']} {second:.1f}: "
    text += f"{cell['faster']:.2f}x ({low:.2f} to {high:.2f})"
    if cell["what"] == "context" and cell["tokens"] <= 512:
        text += f", at least {PAIRS[cell['ours'], cell['theirs']]}x wanted"
    pss = cell["pss"].get(cell["ours"])
    if pss is not None:
        beyond = pss - cell["file_bytes"]
        text += f"; PSS {pss / 1e6:.0f} MB, file {cell['file_bytes'] / 1e6:.0f} MB"
        text += f" ({beyond / 1e6:+.0f} MB, at most {MOST_BEYOND_FILE / 1e6:.0f} wanted)"
    print(text, flush=True)


# --- Sharing ----------------------------------------------------------------------------------------------------------


def share(weights: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory of several processes that have all decoded with one model, and are all alive."""
    folder, context = model(weights, arguments), 512
    job = decoder_job(load_model(folder), None, context, 1, 1)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(start_worker(job)) for _ in range(arguments.processes)]
        for _ in range(2):  # what the first one says, it says before the others share its pages
            for worker in workers:
                worker.turn({"context": context, "runs": STEPS})
        memory = [worker.memory or {} for worker in workers]
    return {"processes": memory, "file_bytes": file_bytes(folder)}


def report_sharing(cell: dict[str, Any]) -> None:
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
    pairs = [pair for pair in PAIRS if pair[0] in arguments.weights]
    if arguments.gguf is None:
        pairs = [pair for pair in pairs if pair[1] != LLAMA_CPP]
    if arguments.prepare:
        for name in sorted({name for pair in pairs for name in pair} - {LLAMA_CPP}):
            model(name, arguments)
        return
    keys = ("ours", "theirs", "what", "tokens", "threads", "hidden", "layers", "vocab", "sparsity")
    done = documents.Cells(arguments.json, about, keys)
    common = {name: getattr(arguments, name) for name in keys[4:]}

    def add(
        cell: dict[str, Any], measure: Callable[[], dict[str, Any]], report: Callable[[dict[str, Any]], None]
    ) -> None:
        if not done.has(cell):
            cell |= measure()
            done.add(cell)
            done.save()
            report(cell)

    for ours, theirs in pairs:
        for what in ("context", "prompt"):
            for tokens in getattr(arguments, what):
                cell = common | {"ours": ours, "theirs": theirs, "what": what, "tokens": tokens}
                cell["file_bytes"] = file_bytes(model(ours, arguments))
                add(cell, functools.partial(compare, ours, theirs, what, tokens, arguments), report_speed)
    for weights in arguments.weights if arguments.processes else []:
        cell = common | {"ours": weights, "theirs": None, "what": "processes", "tokens": arguments.processes}
        add(cell, functools.partial(share, weights, arguments), report_sharing)


if __name__ == "__main__":
    main()
