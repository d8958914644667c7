#!/usr/bin/env python3
"""What pruned weights and pruned caches do to a decoder with trained weights: held-out perplexity, logits, attention.

The decoder is tinylm; the texts to judge by and to calibrate with are documents of Python's, none of them in both.
Every model is made by `sparamx_onnx.convert`. Perplexities of weights are of all tokens of the windows; figures of
caches are of the last quarter of the first 256 to 2048 tokens. With --json, what is there is not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from documents import Cells
from onnx import TensorProto, helper

import sparamx_onnx
from sparamx_onnx.models import tinylm

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
METHODS = ("magnitude", "wanda", "sparsegpt")
WEIGHT_TYPES = ("bf16", "int8", "int4")
# Other scales of int4 weights than those of the default; also pruned by half.
INT4_SCALES: tuple[dict[str, Any], ...] = ({"scale_type": "fp16"}, {"group_size": 64}, {"group_size": 128})
PATTERN = "2:4"
# Kept whole: the first and the last tokens.
GUARDED = {"sink": 64, "recent": 64}
# As many tokens as a block of a packed cache: the cache is then pruned after a call as it would be token after token.
STEP = 64
CALIBRATION_BATCH = 8
# What makes a result another one.
KEYS = (
    "part",
    "weights",
    "scale_type",
    "group_size",
    "method",
    "sparsity",
    "pattern",
    "k_sparsity",
    "v_sparsity",
    "sink",
    "recent",
)

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=MEASURED, default=[*MEASURED])
    parser.add_argument("--weights", nargs="+", choices=WEIGHT_TYPES, default=WEIGHT_TYPES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES, help="of weights")
    parser.add_argument("--cache-sparsities", nargs="+", type=float, default=SPARSITIES, help="of keys and values")
    parser.add_argument("--windows", type=int, default=16, help="texts to judge weights by")
    parser.add_argument("--window", type=int, default=1024, help="tokens of each")
    parser.add_argument("--calibration", type=int, default=32, help="texts of 512 tokens to prune with")
    parser.add_argument("--rows", type=int, default=8, help="texts to judge caches by, as long as the longest length")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    arguments = parser.parse_args()
    about = machine.describe()
    print(machine.headline(about))
    cells = Cells(arguments.json, about, KEYS)
    remember_texts(cells, arguments)
    todo = {
        part: [case for case in MEASURED[part][0](arguments) if not cells.has({"part": part, **case})]
        for part in arguments.parts
    }
    if not any(todo.values()):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = tinylm.export(folder / "dense")
        for part, cases in todo.items():
            if cases:
                for row in MEASURED[part][1](dense, folder, arguments, cases):
                    cells.add({"part": part, **row})
                    cells.save()


def remember_texts(cells: Cells, arguments: argparse.Namespace) -> None:
    """What all results of a document have in common: a run with other texts must not add to it."""
    common = {
        "part": "texts",
        "training": tinylm.training(),
        "held_out_tokens": len(tinylm.held_out()),
        **{name: getattr(arguments, name) for name in ("windows", "window", "calibration", "rows", "lengths")},
    }
    if cells.has(common) and common not in cells:
        raise SystemExit(f"{arguments.json} was measured with other texts or another tinylm; name another file")
    cells.add(common)


def windows(count: int, length: int) -> Tokens:
    """Held-out text [count, 1 + length], spread evenly over all of it."""
    tokens = tinylm.held_out()
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    return np.stack([tokens[start : start + length + 1] for start in starts])


def losses(logits: Floats, targets: Tokens) -> npt.NDArray[np.float64]:
    """Cross entropy in nats of each token: logits [..., vocab], targets [...]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    likely = np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    result: npt.NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=-1)) - likely
    return result


def convert(dense: Path, folder: Path, **options: Any) -> tuple[Path, sparamx_onnx.ConversionResult]:
    output = folder / "converted.onnx"
    return output, sparamx_onnx.convert(dense, output, force=True, **options)


# --- Weights ----------------------------------------------------------------------------------------------------------


def weight_cases(arguments: argparse.Namespace) -> Iterator[Row]:
    """The dense model, packed ones as they are, and pruned ones."""
    yield {"weights": "fp32", "method": "dense"}
    for kind in arguments.weights:
        yield {"weights": kind, "method": "keep"}
        for method in arguments.methods:
            for sparsity in arguments.sparsities:
                yield {"weights": kind, "method": method, "sparsity": sparsity}
            yield {"weights": kind, "method": method, "pattern": PATTERN}
    for scales in INT4_SCALES if "int4" in arguments.weights else ():
        yield {"weights": "int4", **scales, "method": "keep"}
        for method in arguments.methods:
            yield {"weights": "int4", **scales, "method": method, "sparsity": 0.5}


def weights(dense: Path, folder: Path, arguments: argparse.Namespace, cases: Sequence[Row]) -> Iterator[Row]:
    """Held-out perplexity and bytes of every way to convert the weights, and the CPU time that the conversion took."""
    inputs = folder / "calibration"
    write_calibration(inputs, arguments.calibration)
    text = windows(arguments.windows, arguments.window)
    print(f"{'weights':<9}{'method':<12}{'zeros':>8}{'perplexity':>12}{'MB':>7}{'CPU seconds':>13}")
    for case in cases:
        path, row = dense, {**case, "zeros": 0.0, "bytes": (dense.parent / "model.onnx.data").stat().st_size}
        start = time.process_time()
        if case["method"] != "dense":
            options = {"calibration": inputs} if case["method"] in ("wanda", "sparsegpt") else {}
            path, result = convert(dense, folder, attention="fast", **case, **options)
            row |= {"zeros": result.plan.sparsity, "bytes": result.bytes_after}
        row["convert_cpu_seconds"] = time.process_time() - start
        logits = sparamx_onnx.DecoderSession(path, capacity=arguments.window).append(text[:, :-1])
        row["perplexity"] = float(np.exp(losses(logits, text[:, 1:]).mean()))
        print(
            f"{case['weights']:<9}{case['method']:<12}{case.get('pattern') or format(row['zeros'], '.1%'):>8}"
            f"{row['perplexity']:>12.2f}{row['bytes'] / 1e6:>7.1f}{row['convert_cpu_seconds']:>13.1f}",
            flush=True,
        )
        yield row


def write_calibration(folder: Path, count: int, length: int = 512) -> None:
    """Windows of text that the model has learned from, as a user would write them: eight in a file."""
    folder.mkdir()
    tokens = tinylm.calibration()
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    names = [f"past_key_values.{layer}.{kind}" for layer in range(tinylm.LAYERS) for kind in ("key", "value")]
    for index in range(0, count, CALIBRATION_BATCH):
        ids = np.stack([tokens[start : start + length] for start in starts[index : index + CALIBRATION_BATCH]])
        empty = np.zeros((len(ids), tinylm.KV_HEADS, 0, tinylm.HEAD_SIZE), np.float32)
        arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids), **dict.fromkeys(names, empty)}
        np.savez(folder / f"{index:03}.npz", **arrays)


# --- Caches -----------------------------------------------------------------------------------------------------------


def cache_cases(arguments: argparse.Namespace) -> Iterator[Row]:
    """The float cache, and packed ones."""
    yield {}
    yield from packed_cases(arguments)


def packed_cases(arguments: argparse.Namespace) -> Iterator[Row]:
    """Sparsity of keys and of values; then what `convert` takes by default, and other caches with whole ends."""
    whole = {"sink": 0, "recent": 0}
    yield {"k_sparsity": 0.0, "v_sparsity": 0.0, **whole}
    for sparsity in arguments.cache_sparsities:
        yield {"k_sparsity": sparsity, "v_sparsity": 0.0, **whole}
        yield {"k_sparsity": 0.0, "v_sparsity": sparsity, **whole}
        yield {"k_sparsity": sparsity, "v_sparsity": sparsity, **whole}
    yield {"k_sparsity": 0.3, "v_sparsity": 0.5, **whole}
    for k_sparsity, v_sparsity in ((0.3, 0.5), (0.5, 0.5), (0.7, 0.7)):
        yield {"k_sparsity": k_sparsity, "v_sparsity": v_sparsity, **GUARDED}


def caches(dense: Path, folder: Path, arguments: argparse.Namespace, cases: Sequence[Row]) -> Iterator[Row]:
    """Held-out perplexity at several lengths, and how far the logits move, with float and with packed caches."""
    lengths: list[int] = sorted(arguments.lengths)
    text = windows(arguments.rows, lengths[-1])
    path, _ = convert(dense, folder, method="keep", weights="fp32", attention="fast")
    expected, float_bytes = read(path, text)
    print(
        f"{'keys':>6}{'values':>8}{'ends':>6}{'MB':>7}{'logits':>9}{'top 1':>8}" + "".join(f"{n:>9}" for n in lengths)
    )
    for case in cases:
        logits, cache_bytes = expected, float_bytes
        if case:
            path, _ = convert(dense, folder, method="keep", weights="fp32", attention="packed", **case)
            logits, cache_bytes = read(path, text)
        last = last_quarter(lengths[-1])
        row: Row = {
            **case,
            "cache_bytes": cache_bytes,
            "top1_agreement": float((logits[:, last].argmax(2) == expected[:, last].argmax(2)).mean()),
            "logits_error": {str(n): error(logits[:, last_quarter(n)], expected[:, last_quarter(n)]) for n in lengths},
            "perplexity": {str(n): perplexity_at(logits, text, n) for n in lengths},
        }
        print(
            f"{case.get('k_sparsity', 'fp32'):>6}{case.get('v_sparsity', 'fp32'):>8}{case.get('sink', ''):>6}"
            f"{cache_bytes / 1e6:>7.1f}{row['logits_error'][str(lengths[-1])]:>9.4f}{row['top1_agreement']:>8.3f}"
            + "".join(f"{value:>9.2f}" for value in row["perplexity"].values()),
            flush=True,
        )
        yield row


def read(model: Path, text: Tokens) -> tuple[Floats, int]:
    """The logits after each token [batch, tokens, vocab], and the bytes of a cache of that capacity."""
    session = sparamx_onnx.DecoderSession(model, capacity=text.shape[1] - 1)
    parts = [
        session.append(text[:, start : min(start + STEP, text.shape[1] - 1)])
        for start in range(0, text.shape[1] - 1, STEP)
    ]
    return np.concatenate(parts, axis=1), session.cache_bytes


def last_quarter(length: int) -> slice:
    """Of the first `length` tokens."""
    return slice(length * 3 // 4, length)


def perplexity_at(logits: Floats, text: Tokens, length: int) -> float:
    """Of the last quarter of the first `length` tokens."""
    tail = last_quarter(length)
    return float(np.exp(losses(logits[:, tail], text[:, 1:][:, tail]).mean()))


def error(actual: Floats, expected: Floats) -> float:
    """Root of the mean square of the difference, relative to that of what is expected."""
    difference = np.square((actual - expected).astype(np.float64)).mean()
    return float(np.sqrt(difference / np.square(expected.astype(np.float64)).mean()))


# --- Attention alone --------------------------------------------------------------------------------------------------


def attention(dense: Path, folder: Path, arguments: argparse.Namespace, cases: Sequence[Row]) -> Iterator[Row]:
    """How far the output of each layer's attention moves when only its own cache is pruned, on real activations."""
    length = max(arguments.lengths)
    tail = slice(length // 2, None)
    activations = queries_keys_values(dense, windows(2, length)[:, :-1])
    layers = [one_layer(dense, layer, folder / f"layer{layer}.onnx") for layer in range(tinylm.LAYERS)]
    expected = [
        run_layer(convert(layer, folder, attention="fast")[0], rows)[:, tail]
        for layer, rows in zip(layers, activations, strict=True)
    ]
    print(f"{'keys':>6}{'values':>8}{'ends':>6}  relative error of the attention's output, layer by layer")
    for case in cases:
        errors = []
        for layer, rows, wanted in zip(layers, activations, expected, strict=True):
            converted, _ = convert(layer, folder, attention="packed", **case)
            errors.append(error(run_layer(converted, rows)[:, tail], wanted))
        print(
            f"{case['k_sparsity']:>6}{case['v_sparsity']:>8}{case['sink']:>6}  "
            f"{' '.join(f'{value:.4f}' for value in errors)}",
            flush=True,
        )
        yield {**case, "errors": errors}


def queries_keys_values(dense: Path, text: Tokens) -> list[Floats]:
    """What goes into each layer's attention [batch, tokens, query, key and value side by side], of the dense model."""
    model = onnx.load(dense)
    names = [node.input[0] for node in attention_nodes(model)]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    empty = np.zeros((len(text), tinylm.KV_HEADS, 0, tinylm.HEAD_SIZE), np.float32)
    feeds: dict[str, npt.NDArray[Any]] = {value.name: empty for value in session.get_inputs()}
    feeds |= {"input_ids": text, "attention_mask": np.ones_like(text)}
    found: list[Floats] = session.run(names, feeds)
    return found


def attention_nodes(model: onnx.ModelProto) -> Sequence[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def one_layer(dense: Path, layer: int, path: Path) -> Path:
    """Writes the attention of one layer as a model of its own: `x` is its query, key and value."""
    model = onnx.load(dense)
    [node] = attention_nodes(model)[layer : layer + 1]
    tables = [tensor for tensor in model.graph.initializer if tensor.name in node.input]
    names = [*node.input]
    names[0], names[3:7] = "x", ["past.key", "past.value", "seqlens_k", "total_sequence_length"]
    del node.input[:], node.output[:]
    node.input.extend(names)
    node.output.extend(["y", "present.key", "present.value"])
    width = (tinylm.HEADS + 2 * tinylm.KV_HEADS) * tinylm.HEAD_SIZE
    cache = [["batch", tinylm.KV_HEADS, length, tinylm.HEAD_SIZE] for length in ("past", "total")]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", width]),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, cache[0]) for name in ("past.key", "past.value")),
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", tinylm.HEADS * tinylm.HEAD_SIZE]),
        *(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, cache[1])
            for name in ("present.key", "present.value")
        ),
    ]
    graph = helper.make_graph([node], "layer", inputs, outputs, tables)
    onnx.save(helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version), path)
    return path


def run_layer(model: Path, rows: Floats) -> Floats:
    """The attention's output, a block of tokens at a time, each run's cache given to the next one."""
    session = sparamx_onnx.InferenceSession(model)
    batch, length = rows.shape[:2]
    kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
    cache: dict[str, npt.NDArray[Any]] = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            shape = [batch, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
            cache[value.name] = np.zeros(shape, kinds[value.type])
    names = [value.name for value in session.get_outputs()]
    outputs = []
    for start in range(0, length, STEP):
        total = min(start + STEP, length)
        feeds: Mapping[str, npt.NDArray[Any]] = {
            "x": np.ascontiguousarray(rows[:, start:total]),
            "seqlens_k": np.full(batch, total - 1, np.int32),
            "total_sequence_length": np.array([total], np.int32),
        }
        found = dict(zip(names, session.run(names, {**feeds, **cache}), strict=True))
        outputs.append(found.pop("y"))
        cache = {name.replace("present", "past"): value for name, value in found.items()}
    return np.concatenate(outputs, axis=1)


# How each part's cases are made, and how they are measured.
MEASURED = {
    "weights": (weight_cases, weights),
    "cache": (cache_cases, caches),
    "attention": (packed_cases, attention),
}


if __name__ == "__main__":
    main()
