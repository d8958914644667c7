"""What conversion makes of models as others write them: exported, optimized, quantized, then converted and compared.

    python -m sparamx_onnx.models.compatibility [--only PATTERN] [--write PAGE.md]

Every architecture of the zoo, written in every way there is: how many linear layers its torch modules have, how many
of them became sparse operators, what was left alone and why, and the largest error of an output.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from numpy.typing import NDArray
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers import float16, optimizer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

import sparamx_onnx
from sparamx_onnx.graph_passes.plan import Reason
from sparamx_onnx.models import zoo
from sparamx_onnx.models.zoo import Architecture
from sparamx_onnx.verification import TOLERANCES

Feeds = Mapping[str, NDArray[np.generic]]

# Weights along K that share a scale in 4 and 8 bits.
_BLOCK = 32

# What ONNX Runtime's one scale for all activations and ours for every row differ by; it adds up over the layers.
_DYNAMIC = 0.05


@dataclasses.dataclass(frozen=True)
class Writer:
    """A way to write a model.

    Attributes:
        name: What it is called.
        write: Writes an architecture into a folder and returns the path.
        tolerances: What the model is converted to (a type of weights, or ``as it is`` where it is quantized already),
            and the largest relative error of an output that passes.
        only: Names of the architectures that it is tried on; None for all.
        absent: How many linear layers of an architecture it leaves out, because no output needs them.
        one_text: Whether its attention takes several tokens after a cache for one text at a time, without padding.
        needs: An environment variable without which it cannot be tried; empty where there is none.
    """

    name: str
    write: Callable[[Architecture, Path], Path]
    tolerances: Mapping[str, float]
    only: frozenset[str] | None = None
    absent: Mapping[str, int] = dataclasses.field(default_factory=dict)
    one_text: bool = False
    needs: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """An architecture and the way it is written."""

    architecture: Architecture
    writer: Writer

    def __str__(self) -> str:
        return f"{self.architecture.name} / {self.writer.name}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a model in one conversion.

    Attributes:
        converted: Products with a constant weight that became part of a sparse operator.
        left_alone: How many products stayed, for every reason.
        error: The largest error of an output, relative to the largest output.
    """

    converted: int
    left_alone: Mapping[Reason, int]
    error: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one model.

    Attributes:
        case: Which.
        layers: Products with a constant weight that the linear layers of the torch modules come to in this model.
        outcomes: By what it was converted to.
    """

    case: Case
    layers: int
    outcomes: Mapping[str, Outcome]

    @property
    def problems(self) -> list[str]:
        """What is wrong with it, in words."""
        found = []
        for weights, outcome in self.outcomes.items():
            if not outcome.error <= self.case.writer.tolerances[weights]:
                found.append(f"{self.case} ({weights}): an output has an error of {outcome.error:.1e}")
            seen = outcome.converted + sum(_layers_left_alone(outcome).values())
            if seen != self.layers:
                found.append(f"{self.case} ({weights}): {seen} of {self.layers} linear layers were found")
        return found


def _layers_left_alone(outcome: Outcome) -> dict[Reason, int]:
    return {reason: count for reason, count in outcome.left_alone.items() if reason is not Reason.TWO_ACTIVATIONS}


def run(case: Case, folder: Path) -> Result:
    """Writes, converts and compares one model. The folder keeps what cases have in common."""
    with _quiet():
        dense = case.writer.write(case.architecture, folder)
    graph = onnx.load(dense, load_external_data=False).graph
    feeds = _feeds(case, {value.name for value in graph.input})
    outcomes = {weights: _convert(case, dense, weights, feeds, folder) for weights in case.writer.tolerances}
    joined = sum(_takes_joined_projections(node) for node in graph.node)
    absent = case.writer.absent.get(case.architecture.name, 0)
    return Result(case, case.architecture.linear_layers - absent - 2 * joined, outcomes)


def _feeds(case: Case, names: set[str]) -> Feeds:
    """Inputs for the model of a case, which may have fewer than the architecture."""
    sizes = {**zoo.SIZES, "batch": 1} if case.writer.one_text else zoo.SIZES
    feeds = {name: values for name, values in case.architecture.feeds(sizes).items() if name in names}
    if case.writer.one_text:
        feeds = {name: np.ones_like(values) if name.endswith("mask") else values for name, values in feeds.items()}
    return feeds


def _takes_joined_projections(node: onnx.NodeProto) -> bool:
    """Whether an attention operator takes query, key and value as the result of one product."""
    return node.op_type == "Attention" or (node.op_type == "GroupQueryAttention" and not node.input[1])


def _convert(case: Case, dense: Path, weights: str, feeds: Feeds, folder: Path) -> Outcome:
    result = sparamx_onnx.convert(
        dense,
        folder / "converted.onnx",
        weights=None if weights == AS_IT_IS else weights,
        method="keep",
        force=True,
    )
    counts = Counter(node.reason for node in result.plan.left_alone)
    error = 0.0
    if result.written and result.output is not None:
        outputs = sparamx_onnx.verify(dense, result.output, inputs=feeds).outputs
        # An exporter may add outputs, such as CLIP's cosines: of random embeddings they are near zero.
        judged = [each.relative_error for each in outputs if each.name in case.architecture.outputs]
        error = max(np.inf if each is None else each for each in judged)
    return Outcome(
        len(result.plan.converted), {reason: counts[reason] for reason in Reason if counts[reason]}, float(error)
    )


# --- Ways to write a model --------------------------------------------------------------------------------------------


def _path(architecture: Architecture, folder: Path, writer: str) -> Path:
    name = re.sub(r"[^a-z0-9]+", "_", f"{architecture.name}.{writer}".lower())
    return folder / f"{name}.onnx"


def _dynamo(architecture: Architecture, folder: Path) -> Path:
    path = _path(architecture, folder, "dynamo")
    zoo.export_dynamo(architecture, path)
    return path


def _torchscript(architecture: Architecture, folder: Path) -> Path:
    path = _path(architecture, folder, "torchscript")
    if not path.exists():
        zoo.export_torchscript(architecture, path)
    return path


# What the optimizer knows each architecture as.
_OPTIMIZED = {
    "BERT": "bert",
    "DistilBERT": "bert",
    "RoBERTa": "bert",
    "GPT-2": "gpt2",
    "T5 encoder": "t5",
    "T5 decoder": "t5",
    "ViT": "vit",
    "CLIP": "clip",
}


def _optimized(architecture: Architecture, folder: Path) -> Path:
    path = _path(architecture, folder, "optimized")
    model = optimizer.optimize_model(
        str(_torchscript(architecture, folder)),
        _OPTIMIZED[architecture.name],
        num_heads=zoo.HEADS,
        hidden_size=zoo.HIDDEN,
    )
    model.save_model_to_file(str(path))
    return path


def _float16(architecture: Architecture, folder: Path) -> Path:
    path = _path(architecture, folder, "float16")
    model = onnx.load(_torchscript(architecture, folder))
    onnx.save(float16.convert_float_to_float16(model, keep_io_types=True), path)
    return path


def _quantized_dynamically(architecture: Architecture, folder: Path) -> Path:
    path = _path(architecture, folder, "dynamic")
    if not path.exists():
        quantization.quantize_dynamic(_torchscript(architecture, folder), path, per_channel=True)
    return path


def _fused_by_onnxruntime(architecture: Architecture, folder: Path) -> Path:
    """The dynamically quantized model as a session saves it after its own optimizations."""
    path = _path(architecture, folder, "fused")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(_quantized_dynamically(architecture, folder), options)
    return path


class _Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Feeds) -> None:
        self._feeds: Feeds | None = feeds

    def get_next(self) -> Feeds | None:
        feeds, self._feeds = self._feeds, None
        return feeds


def _quantized_statically(architecture: Architecture, folder: Path) -> Path:
    path = _path(architecture, folder, "static")
    quantization.quantize_static(
        _torchscript(architecture, folder),
        path,
        _Calibration(architecture.feeds()),
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )
    return path


def _blockwise(bits: int) -> Callable[[Architecture, Path], Path]:
    def write(architecture: Architecture, folder: Path) -> Path:
        path = _path(architecture, folder, f"nbits{bits}")
        model = onnx.load(_torchscript(architecture, folder))
        quantizer = MatMulNBitsQuantizer(model, bits=bits, block_size=_BLOCK, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))
        return path

    return write


def _checkpoint(architecture: Architecture, folder: Path) -> Path:
    """The architecture as transformers saves it, with a tokenizer of single bytes."""
    path = _path(architecture, folder, "checkpoint").with_suffix("")
    if not path.exists():
        model: Any = architecture.module().model
        with contextlib.redirect_stderr(io.StringIO()):  # its progress
            model.save_pretrained(path)
        letters = {letter: index + 3 for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(tokenizer_models.BPE(vocab={"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, merges=[]))
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        kind: Any = transformers.PreTrainedTokenizerFast
        kind(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


def _run_exporter(command: Iterable[str | Path]) -> None:
    """Runs a program that writes a model.

    Raises:
        RuntimeError: It fails; says how.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    words = [str(part) for part in command]
    done = subprocess.run(words, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{words[2]} failed: {done.stderr[-2000:]}")


def _genai(precision: str, *options: str) -> Callable[[Architecture, Path], Path]:
    def write(architecture: Architecture, folder: Path) -> Path:
        path = _path(architecture, folder, "_".join(("genai", precision, *options))).with_suffix("")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
        places: list[str | Path] = ["-i", _checkpoint(architecture, folder), "-o", path, "-c", folder / "cache"]
        extra = ("--extra_options", *options) if options else ()
        _run_exporter([*command, *places, *extra])
        return path / "model.onnx"

    return write


OPTIMUM = "SPARAMX_OPTIMUM_PYTHON"
"""Names a Python that has optimum-onnx, whose transformers are older than those that the models are built with."""

# What optimum calls what they do.
_OPTIMUM_TASKS = {
    **dict.fromkeys(("BERT", "DistilBERT"), "feature-extraction"),
    "RoBERTa": "text-classification",
    "ViT": "image-classification",
    "CLIP": "zero-shot-image-classification",
    **dict.fromkeys(
        ("GPT-2", "OPT", "Llama", "Qwen2", "Mistral", "Phi-3", "Gemma-2"),
        "text-generation-with-past",
    ),
}


def _optimum(architecture: Architecture, folder: Path) -> Path:
    path = _path(architecture, folder, "optimum").with_suffix("")
    command = [os.environ[OPTIMUM], "-m", "optimum.exporters.onnx", "--no-post-process"]
    checkpoint = _checkpoint(architecture, folder)
    if architecture.name in ("ViT", "CLIP"):
        size = {"height": zoo.IMAGE, "width": zoo.IMAGE}
        kind = f"{architecture.name}ImageProcessor"
        preprocessing = {"image_processor_type": kind, "size": size, "crop_size": size}
        (checkpoint / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    _run_exporter([*command, "-m", checkpoint, "--task", _OPTIMUM_TASKS[architecture.name], path])
    return path / "model.onnx"


AS_IT_IS = "as it is"
"""Conversion without --weights: bf16, and codes of quantized weights are kept."""

# Activations are rounded to 8 bits between the layers, where the smallest difference may exchange two codes.
_STATICALLY = {"fp32": TOLERANCES["bf16"], AS_IT_IS: TOLERANCES["bf16"]}
_FLOAT = {name: TOLERANCES[name] for name in ("fp32", "bf16")}
# fp32 weights come with exact activations, which the quantized model does not have.
_DYNAMICALLY = {"fp32": _DYNAMIC, AS_IT_IS: _DYNAMIC}

# ONNX Runtime quantizes weights of three dimensions per channel, but cannot run them.
_RUNNABLE = frozenset(each.name for each in zoo.ARCHITECTURES) - {"Mixtral, stacked experts"}

# Decoders that onnxruntime-genai's builder takes as the zoo configures them.
_BUILT = frozenset({"Llama", "Qwen2", "Mistral"})
_BUILT_INT4 = {"fp32": _DYNAMIC, AS_IT_IS: TOLERANCES["int8"]}

WRITERS: tuple[Writer, ...] = (
    Writer("torch, dynamo", _dynamo, _FLOAT),
    Writer("torch, TorchScript", _torchscript, _FLOAT),
    Writer("transformers optimizer", _optimized, _FLOAT, frozenset(_OPTIMIZED)),
    Writer("float16", _float16, {"fp32": TOLERANCES["bf16"]}),
    Writer("dynamic int8", _quantized_dynamically, _DYNAMICALLY, _RUNNABLE),
    Writer("dynamic int8, fused", _fused_by_onnxruntime, _DYNAMICALLY, _RUNNABLE),
    Writer("static int8 (QDQ)", _quantized_statically, _STATICALLY, _RUNNABLE),
    Writer("MatMulNBits, 4 bits", _blockwise(4), {"fp32": TOLERANCES["fp32"], AS_IT_IS: TOLERANCES["int8"]}),
    Writer("MatMulNBits, 8 bits", _blockwise(8), {"fp32": TOLERANCES["fp32"], AS_IT_IS: TOLERANCES["int8"]}),
    Writer("onnxruntime-genai, fp32", _genai("fp32"), _FLOAT, _BUILT, one_text=True),
    Writer("onnxruntime-genai, int4", _genai("int4"), _BUILT_INT4, _BUILT, one_text=True),
    Writer("onnxruntime-genai, int4 QDQ", _genai("int4", "use_qdq=1"), _BUILT_INT4, _BUILT, one_text=True),
    Writer("optimum", _optimum, _FLOAT, frozenset(_OPTIMUM_TASKS), absent={"BERT": 1}, needs=OPTIMUM),
)


def cases() -> list[Case]:
    """Every architecture in every way it can be written."""
    return [
        Case(architecture, writer)
        for architecture in zoo.ARCHITECTURES
        for writer in WRITERS
        if writer.only is None or architecture.name in writer.only
    ]


def can_be_tried(case: Case) -> bool:
    """Whether what writes the model is there."""
    return not case.writer.needs or bool(os.environ.get(case.writer.needs))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what exporters and quantizers remark off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# --- The page ---------------------------------------------------------------------------------------------------------

_INTRODUCTION = """# What converts

Small models with random weights, written as people write them, then converted and run. `convert` finds every linear
layer of the torch modules again, and converts it or leaves it alone with a [reason](conversion.md#reasons).
An error is the largest difference of an output to that of the model before conversion, relative to the largest output.
Nothing is pruned; `as it is` means no `--weights`, so that codes of quantized weights are kept.

`python -m sparamx_onnx.models.compatibility --write docs/compatibility.md` writes this page, and
`tests/models/test_compatibility.py` holds it to what the code does. Errors are those of one machine, rounded up, with
{versions}.
"""

# What stands above each table.
_REMARKS = {
    "torch, dynamo": "`torch.onnx.export(dynamo=True)`, opset 20.",
    "torch, TorchScript": "`torch.onnx.export(dynamo=False)`, opset 17, as optimum calls it. All below start with it.",
    "transformers optimizer": "`onnxruntime.transformers.optimizer`, which joins query, key and value of encoders.",
    "float16": "`onnxruntime.transformers.float16` with float32 inputs and outputs.",
    "dynamic int8": "`quantize_dynamic(per_channel=True)`. The error contains the difference between ONNX Runtime's "
    "scale for all activations and one for every row.",
    "dynamic int8, fused": "The same as a session with extended optimizations saves it.",
    "static int8 (QDQ)": "`quantize_static(per_channel=True)`.",
    "MatMulNBits, 4 bits": "`MatMulNBitsQuantizer(bits=4, block_size=32)`, whose activations are not quantized.",
    "MatMulNBits, 8 bits": "`MatMulNBitsQuantizer(bits=8, block_size=32)`.",
    "onnxruntime-genai, fp32": "`python -m onnxruntime_genai.models.builder -p fp32 -e cpu`, which joins query, key "
    "and value.",
    "onnxruntime-genai, int4": "The same with `-p int4`: MatMulNBits, whose activations are quantized.",
    "onnxruntime-genai, int4 QDQ": "The same with `--extra_options use_qdq=1`.",
    "optimum": "`python -m optimum.exporters.onnx`. Optimum needs older transformers than the other writers, so an "
    "environment of its own\n(`pip install optimum-onnx` beside torch), whose Python `SPARAMX_OPTIMUM_PYTHON` names. "
    "Without that variable, these rows stay\nas they are.",
}


def page(results: Sequence[Result], previous: str = "") -> str:
    """The page of the documentation: with the rows of the results, and the other rows of the previous page."""
    lines = _lines(previous)
    for result in results:
        lines[result.case.writer.name, result.case.architecture.name] = _row(_cells(result))
    parts = [_INTRODUCTION.format(versions=_versions())]
    for writer in WRITERS:
        chosen = [lines[key] for key in ((writer.name, each.name) for each in zoo.ARCHITECTURES) if key in lines]
        if chosen:
            columns = _columns(writer)
            table = [_row(columns), _row(["---"] * len(columns)), *chosen]
            parts.append("\n".join([f"## {writer.name}\n\n{_REMARKS[writer.name]}\n", *table, ""]))
    return "\n".join(parts)


def rows(document: str) -> dict[tuple[str, str], list[str]]:
    """The cells of every row of a page, but for the errors, by writer and architecture."""
    columns = {writer.name: _columns(writer) for writer in WRITERS}
    return {
        key: [
            cell.strip()
            for cell, column in zip(line[1:-1].split("|"), columns[key[0]], strict=True)
            if not column.startswith("error")
        ]
        for key, line in _lines(document).items()
    }


def _lines(document: str) -> dict[tuple[str, str], str]:
    """The lines of a page that are rows of a table, by writer and architecture."""
    architectures = {each.name for each in zoo.ARCHITECTURES}
    found = {}
    writer = ""
    for line in document.splitlines():
        if line.startswith("## "):
            writer = line[3:]
        name = line.split("|")[1].strip() if line.startswith("| ") else ""
        if name in architectures:
            found[writer, name] = line
    return found


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _columns(writer: Writer) -> list[str]:
    pairs = [(f"converted ({weights})", f"error ({weights})") for weights in writer.tolerances]
    return ["architecture", "linear layers", *(name for pair in pairs for name in pair), "left alone"]


def _cells(result: Result) -> list[str]:
    cells = [result.case.architecture.name, str(result.layers)]
    for outcome in result.outcomes.values():
        cells += [str(outcome.converted), _rounded_up(outcome.error) if outcome.converted else ""]
    return [*cells, _reasons(result)]


def _reasons(result: Result) -> str:
    texts = {
        weights: ", ".join(f"{count} `{reason.value}`" for reason, count in _layers_left_alone(outcome).items())
        for weights, outcome in result.outcomes.items()
    }
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{weights}: {text}" for weights, text in texts.items() if text)


def _rounded_up(error: float) -> str:
    """One digit; errors below 1e-7, which is less than a float32 can show, are called that."""
    if error <= 1e-7:
        return "1e-07"
    scale = 10.0 ** math.floor(math.log10(error))
    return f"{math.ceil(error / scale) * scale:.0e}"


def _versions() -> str:
    modules = (torch, transformers, onnx, onnxruntime)
    return ", ".join(f"{module.__name__} {module.__version__.partition('+')[0]}" for module in modules)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `argv` without the program's name. Returns 1 if a model does not convert as it should."""
    parser = argparse.ArgumentParser(description="Converts every architecture in every way it is written.")
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression of ARCHITECTURE / WRITER")
    parser.add_argument("--write", metavar="PAGE.md", type=Path, help="update the rows of the documentation's page")
    arguments = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if re.search(arguments.only, str(case)) and can_be_tried(case):
                results.append(run(case, Path(folder)))
                print(f"{case}: {_summary(results[-1])}", flush=True)
                if arguments.write:
                    previous = arguments.write.read_text() if arguments.write.exists() else ""
                    arguments.write.write_text(page(results[-1:], previous))
    problems = [problem for result in results for problem in result.problems]
    print("\n".join(problems) or f"{len(results)} models, all of them right")
    return 1 if problems else 0


def _summary(result: Result) -> str:
    outcomes = ", ".join(
        f"{weights} {outcome.converted} of {result.layers} ({outcome.error:.1e})"
        for weights, outcome in result.outcomes.items()
    )
    reasons = _reasons(result)
    return f"{outcomes}; left alone: {reasons}" if reasons else outcomes


if __name__ == "__main__":
    sys.exit(main())
