#!/usr/bin/env python3
"""What pruned weights and pruned caches do to a decoder with trained weights: held-out perplexity, logits, attention.

The decoder is tinylm; the texts to judge by and to calibrate with are documents of Python's, none of them in both.
Every model is made by `sparamx_onnx.convert`. Perplexities are of all tokens of 16 windows of 1024 for weights, and of
the last quarter of 256 to 2048 tokens for caches.
"""

from __future__ import annotations

import argparse
import json
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
import plots
from onnx import TensorProto, helper

import sparamx_onnx
from sparamx_onnx.models import tinylm

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
METHODS = ("magnitude", "wanda", "sparsegpt")
WEIGHT_TYPES = ("bf16", "int8", "int4")
WINDOW = 1024
LENGTHS = (256, 512, 1024, 2048)
CACHE_SPARSITIES = (0.3, 0.5, 0.6, 0.7)
# Kept whole: the first and the last tokens.
GUARDED = {"sink": 64, "recent": 64}
# As many tokens as a block of a packed cache: the cache is then pruned after a call as it would be token after token.
STEP = 64
ROWS = 8

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--parts", nargs="+", choices=["weights", "caches", "attention"], default=["weights", "caches", "attention"]
    )
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where to write charts of weights and caches")
    arguments = parser.parse_args()
    about = machine.describe()
    print(machine.headline(about))
    document: dict[str, Any] = {"machine": about, "training": tinylm.training()}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = tinylm.export(folder / "dense")
        if "weights" in arguments.parts:
            document["weights"] = list(weights(dense, folder))
        if "caches" in arguments.parts:
            document["caches"] = list(caches(dense, folder))
        if "attention" in arguments.parts:
            document["attention"] = list(attention(dense, folder))
    document["seconds"] = time.perf_counter() - start
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for name, chart in charts(document).items():
            (arguments.plots / f"{name}.svg").write_text(chart.svg())


def charts(document: Mapping[str, Any]) -> dict[str, plots.Chart]:
    """Perplexity against zeros, of the parts that were measured."""
    found = {}
    if "weights" in document:
        dense = next(row["perplexity"] for row in document["weights"] if row["method"] == "dense")
        chart = plots.Chart(
            "Held-out perplexity of tinylm, bf16 weights",
            plots.Axis("zeros in every pruned layer", 0.3, 0.7, SPARSITIES, label="{:.0%}".format),
            plots.Axis("perplexity", 20, 80, (20, 30, 40, 60, 80), logarithmic=True),
        )
        for method, colour in zip(METHODS, plots.COLOURS, strict=False):
            rows = [row for row in document["weights"] if row["method"] == method and row["weights"] == "bf16"]
            points = [(row["sparsity"], row["perplexity"]) for row in rows if "sparsity" in row]
            chart.line(method, points, colour)
        chart.rule(dense, "dense, fp32")
        found["decoder_weights"] = chart
    if "caches" in document:
        length = str(max(LENGTHS))
        by_sparsity = {
            (row["k_sparsity"], row["v_sparsity"]): row for row in document["caches"] if row.get("recent") == 0
        }
        chart = plots.Chart(
            f"Perplexity after {length} tokens with a packed cache",
            plots.Axis("pruned", 0.3, 0.7, CACHE_SPARSITIES, label="{:.0%}".format),
            plots.Axis("perplexity", 26, 30, (26, 27, 28, 29, 30)),
        )
        kinds = {"keys": (1, 0), "values": (0, 1), "both": (1, 1)}
        for (name, (k, v)), colour in zip(kinds.items(), plots.COLOURS, strict=False):
            line = [(s, by_sparsity[k * s, v * s]["perplexity"][length]) for s in CACHE_SPARSITIES]
            chart.line(name, line, colour)
        chart.rule(document["caches"][0]["perplexity"][length], "fp32 cache")
        found["decoder_caches"] = chart
    return found


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


def weights(dense: Path, folder: Path) -> Iterator[Row]:
    """Held-out perplexity and bytes of every way to convert the weights."""
    inputs = folder / "calibration"
    write_calibration(inputs)
    text = windows(16, WINDOW)
    print(f"{'method':<12}{'weights':<9}{'zeros':>8}{'perplexity':>12}{'MB':>7}{'seconds':>9}")
    cases: list[Row] = [{"weights": "fp32", "method": "dense"}]
    cases += [{"weights": kind, "method": "keep"} for kind in WEIGHT_TYPES]
    for method in METHODS:
        cases += [{"weights": "bf16", "method": method, "sparsity": sparsity} for sparsity in SPARSITIES]
        cases.append({"weights": "bf16", "method": method, "pattern": "2:4"})
    cases += [{"weights": kind, "method": "sparsegpt", "sparsity": 0.5} for kind in ("int8", "int4")]
    for case in cases:
        start = time.perf_counter()
        path, row = dense, {**case, "zeros": 0.0, "bytes": (dense.parent / "model.onnx.data").stat().st_size}
        if case["method"] != "dense":
            options = {"calibration": inputs} if case["method"] in ("wanda", "sparsegpt") else {}
            path, result = convert(dense, folder, attention="fast", **case, **options)
            row |= {"zeros": zeros(result), "bytes": result.bytes_after}
        logits = sparamx_onnx.DecoderSession(path, capacity=WINDOW).append(text[:, :-1])
        row |= {"perplexity": float(np.exp(losses(logits, text[:, 1:]).mean())), "seconds": time.perf_counter() - start}
        print(
            f"{case['method']:<12}{case['weights']:<9}{case.get('pattern') or format(row['zeros'], '.1%'):>8}"
            f"{row['perplexity']:>12.2f}{row['bytes'] / 1e6:>7.1f}{row['seconds']:>9.1f}",
            flush=True,
        )
        yield row


def zeros(result: sparamx_onnx.ConversionResult) -> float:
    """The share of zeros in the weights of all converted layers."""
    layers = result.plan.converted
    size = sum((layer.k or 0) * (layer.n or 0) for layer in layers)
    return 1 - sum(layer.nnz or 0 for layer in layers) / size


def write_calibration(folder: Path, count: int = 32, length: int = 512) -> None:
    """Windows of text that the model has learned from, as a user would write them: eight in a file."""
    folder.mkdir()
    tokens = tinylm.calibration()
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    empty = np.zeros((ROWS, tinylm.KV_HEADS, 0, tinylm.HEAD_SIZE), np.float32)
    names = [f"past_key_values.{layer}.{kind}" for layer in range(tinylm.LAYERS) for kind in ("key", "value")]
    for index in range(0, count, ROWS):
        ids = np.stack([tokens[start : start + length] for start in starts[index : index + ROWS]])
        arrays: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids), **dict.fromkeys(names, empty)}
        np.savez(folder / f"{index:02}.npz", **arrays)


# --- Caches -----------------------------------------------------------------------------------------------------------


def cache_cases() -> Iterator[Row]:
    """Sparsity of keys and of values, with and without whole first and last tokens."""
    yield {"k_sparsity": 0.0, "v_sparsity": 0.0, "sink": 0, "recent": 0}
    for sparsity in CACHE_SPARSITIES:
        yield {"k_sparsity": sparsity, "v_sparsity": 0.0, "sink": 0, "recent": 0}
        yield {"k_sparsity": 0.0, "v_sparsity": sparsity, "sink": 0, "recent": 0}
        yield {"k_sparsity": sparsity, "v_sparsity": sparsity, "sink": 0, "recent": 0}
    yield {"k_sparsity": 0.3, "v_sparsity": 0.5, "sink": 0, "recent": 0}
    for k_sparsity, v_sparsity in ((0.3, 0.5), (0.5, 0.5), (0.7, 0.7)):
        yield {"k_sparsity": k_sparsity, "v_sparsity": v_sparsity, **GUARDED}
    yield {"k_sparsity": 0.3, "v_sparsity": 0.5, "sink": 0, "recent": 0}


def caches(dense: Path, folder: Path) -> Iterator[Row]:
    """Held-out perplexity at several lengths, and how far the logits move, with float and with packed caches."""
    text = windows(ROWS, max(LENGTHS))
    path, _ = convert(dense, folder, method="keep", weights="fp32", attention="fast")
    expected, cache_bytes = read(path, text)
    print(
        f"{'K':>6}{'V':>6}{'sink':>6}{'recent':>8}{'MB':>7}{'logits':>9}{'top 1':>8}"
        + "".join(f"{n:>9}" for n in LENGTHS)
    )
    for case in [None, *cache_cases()]:
        logits = expected
        if case is not None:
            path, _ = convert(dense, folder, method="keep", weights="fp32", attention="packed", **case)
            logits, cache_bytes = read(path, text)
        tail = slice(max(LENGTHS) // 2, None)
        row: Row = {
            **(case or {}),
            "cache_bytes": cache_bytes,
            "logits_error": error(logits[:, tail], expected[:, tail]),
            "top1_agreement": float((logits[:, tail].argmax(2) == expected[:, tail].argmax(2)).mean()),
            "perplexity": {str(length): perplexity_at(logits, text, length) for length in LENGTHS},
        }
        kind = (
            [f"{case['k_sparsity']:.0%}", f"{case['v_sparsity']:.0%}", case["sink"], case["recent"]]
            if case
            else ["fp32", "", "", ""]
        )
        print(
            f"{kind[0]:>6}{kind[1]:>6}{kind[2]:>6}{kind[3]:>8}{cache_bytes / 1e6:>7.1f}{row['logits_error']:>9.4f}"
            f"{row['top1_agreement']:>8.3f}" + "".join(f"{value:>9.2f}" for value in row["perplexity"].values()),
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


def perplexity_at(logits: Floats, text: Tokens, length: int) -> float:
    """Of the last quarter of the first `length` tokens."""
    tail = slice(length * 3 // 4, length)
    return float(np.exp(losses(logits[:, tail], text[:, 1:][:, tail]).mean()))


def error(actual: Floats, expected: Floats) -> float:
    """Root of the mean square of the difference, relative to that of what is expected."""
    difference = np.square((actual - expected).astype(np.float64)).mean()
    return float(np.sqrt(difference / np.square(expected.astype(np.float64)).mean()))


# --- Attention alone --------------------------------------------------------------------------------------------------


def attention(dense: Path, folder: Path) -> Iterator[Row]:
    """How far the output of each layer's attention moves when only its own cache is pruned, on real activations."""
    length = max(LENGTHS)
    activations = queries_keys_values(dense, windows(2, length)[:, :-1])
    print(f"{'K':>6}{'V':>6}  relative error of the attention's output, layer by layer")
    for case in cache_cases():
        errors = []
        for layer, rows in enumerate(activations):
            outputs = {}
            for kind in ("fast", "packed"):
                path = folder / "layer.onnx"
                one_layer(dense, layer, path)
                options = case if kind == "packed" else {}
                converted, _ = convert(path, folder, attention=kind, **options)
                outputs[kind] = run_layer(converted, rows)
            tail = slice(length // 2, None)
            errors.append(error(outputs["packed"][:, tail], outputs["fast"][:, tail]))
        print(
            f"{case['k_sparsity']:>6.0%}{case['v_sparsity']:>6.0%}  {' '.join(f'{value:.4f}' for value in errors)}",
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


def one_layer(dense: Path, layer: int, path: Path) -> None:
    """The attention of one layer as a model of its own: `x` is its query, key and value."""
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


if __name__ == "__main__":
    main()
