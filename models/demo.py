"""Converts two models on this machine and prints what was gained and what it cost.

    python -m sparamx_onnx.models.demo [--folder build/demo]

First all-MiniLM-L6-v2 with its trained weights: converted as it is, and pruned to 50 % by magnitude. Both run on
sentences from Python's documentation and are compared with the original: file, memory, time, and whether the
embeddings still say the same. Then one decode step of a Llama-shaped decoder with random weights, where reading the
weights is all the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import sparamx_onnx
from sparamx_onnx.benchmark import Benchmark
from sparamx_onnx.models import caches, llama, minilm, sentences
from sparamx_onnx.ops import library
from sparamx_onnx.tables import Column, duration, percent, render, size

_SENTENCES = 256
_EMBEDDING_BATCH = 32
_NEIGHBOURS = 10
# One request of a search box, and a batch of documents to index.
_TIMED_BATCHES = (1, 32)
_PAST = 128

Embeddings = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class _Variant:
    """A converted model: what the table calls it, where it lies, and how many layers were converted."""

    title: str
    path: Path
    layers: int


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` without the program's name."""
    parser = argparse.ArgumentParser(description="Converts two models and prints what was gained and what it cost.")
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="where the models are written")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each model when they are timed")
    parser.add_argument("--sentences", type=int, default=_SENTENCES, help="sentences to compare embeddings on")
    for field in dataclasses.fields(llama.LlamaShape):
        parser.add_argument(f"--llama-{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = parser.parse_args(argv)
    sizes = {field.name: getattr(arguments, f"llama_{field.name}") for field in dataclasses.fields(llama.LlamaShape)}
    try:
        shape = llama.LlamaShape(**sizes)
    except ValueError as error:
        parser.error(str(error))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    cpu = library.cpu_info()
    print(f"{cpu['cpu']}, {os.cpu_count()} cores, {cpu['level']}; onnxruntime {onnxruntime.__version__}")
    _show_minilm(arguments.folder, arguments.sentences, arguments.rounds)
    _show_llama(arguments.folder, shape, arguments.rounds)
    _show_commands()


def _show_minilm(folder: Path, sentence_count: int, rounds: int) -> None:
    original = folder / "minilm.onnx"
    print("\nall-MiniLM-L6-v2, a sentence encoder with its trained weights")
    _step(f"python -m sparamx_onnx.models.minilm {original}", lambda: minilm.export(original))
    variants = [
        _convert(original, "bf16, not pruned", "keep"),
        _convert(original, "bf16, 50 % zeros*", "magnitude"),
    ]
    texts = sentences.collect(sentence_count)
    timings: dict[str, list[Benchmark]] = {}
    for count in _TIMED_BATCHES:
        tokens = minilm.tokenize(texts[:count])
        inputs = folder / "inputs.npz"
        np.savez(inputs, **tokens)  # type: ignore[arg-type, unused-ignore]
        name = f"time of a batch, {count} x {tokens['input_ids'].shape[1]} tokens"
        _say(f"measuring the {name}")
        timings[name] = [
            sparamx_onnx.bench(variant.path, original, inputs=inputs, rounds=rounds) for variant in variants
        ]
    _say(f"comparing the embeddings of {sentence_count} sentences")
    reference = _embed(original, texts)
    agreements = [_Agreement.of(_embed(variant.path, texts), reference) for variant in variants]
    rows = _rows_of(original, variants, f"of {minilm.LINEAR_LAYERS}", timings)
    rows += [
        ["cosine of the embeddings, mean", "", *(f"{agreement.mean_cosine:.5f}" for agreement in agreements)],
        ["  lowest", "", *(f"{agreement.lowest_cosine:.5f}" for agreement in agreements)],
        ["same nearest neighbour", "", *(percent(agreement.nearest) for agreement in agreements)],
        [f"same among the {_NEIGHBOURS} nearest", "", *(percent(agreement.among_nearest) for agreement in agreements)],
    ]
    _print_table(["original, fp32", *(variant.title for variant in variants)], rows)
    print("* by magnitude, without calibration: fast to make, and it costs quality, as the last four lines show")


def _show_llama(folder: Path, shape: llama.LlamaShape, rounds: int) -> None:
    original = folder / "llama.onnx"
    print(f"\nA Llama-shaped decoder, {shape.decoder_weights / 1e6:.0f} million weights in its layers (random)")
    flags = "".join(
        f" --{field.name.replace('_', '-')} {getattr(shape, field.name)}" for field in dataclasses.fields(shape)
    )
    command = f"python -m sparamx_onnx.models.llama {original}{flags}"
    _step(command, lambda: llama.export(original, shape))
    variant = _convert(original, "bf16, 50 % zeros", "magnitude")
    _say("timing one decode step")
    timing = sparamx_onnx.bench(variant.path, original, batch=1, length=_PAST, rounds=rounds)
    rows = _rows_of(original, [variant], f"of {shape.linear_layers}", {f"one token after {_PAST}": [timing]})
    tokens_per_second = [f"{1 / taken.median:.1f}" for taken in reversed(timing.timings)]
    _print_table(["original, fp32", variant.title], [*rows, ["tokens per second", *tokens_per_second]])
    cache = caches.largest_cache_bytes()
    if cache > _data_bytes(variant.path):
        print(f"The converted weights fit the cache of this CPU ({size(cache)}), the original ones may not.")


def _show_commands() -> None:
    print("""
On your own model:
  sparamx-onnx inspect model.onnx                                  what could be converted, and how many zeros it has
  sparamx-onnx convert model.onnx                                  keeps the zeros there are; writes model.sparse.onnx
  sparamx-onnx convert model.onnx --method magnitude --sparsity 0.5    prunes first, uncalibrated
  sparamx-onnx verify model.onnx model.sparse.onnx                 how far apart the outputs are
  sparamx-onnx bench model.sparse.onnx --against model.onnx        how much faster it is here
In Python: session = sparamx_onnx.InferenceSession("model.sparse.onnx")""")


@dataclasses.dataclass(frozen=True)
class _Agreement:
    """How much a model's embeddings say the same as the original's."""

    mean_cosine: float
    lowest_cosine: float
    nearest: float
    among_nearest: float

    @classmethod
    def of(cls, embeddings: Embeddings, reference: Embeddings) -> _Agreement:
        """Compares embeddings [sentences, 384], both of length 1; neighbours are other sentences of the same model."""
        cosine = (embeddings * reference).sum(axis=1)
        ours, theirs = _neighbours(embeddings), _neighbours(reference)
        shared = [len(set(a) & set(b)) / len(b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
        return cls(
            mean_cosine=float(cosine.mean()),
            lowest_cosine=float(cosine.min()),
            nearest=float((ours[:, 0] == theirs[:, 0]).mean()),
            among_nearest=float(np.mean(shared)),
        )


def _neighbours(embeddings: Embeddings) -> NDArray[np.int64]:
    """For each sentence the indices of its nearest ones, the nearest first: int64 [sentences, _NEIGHBOURS]."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :_NEIGHBOURS]


def _embed(model: Path, texts: Sequence[str]) -> Embeddings:
    """Embeddings [len(texts), 384] in batches."""
    session = sparamx_onnx.InferenceSession(model)
    batches = [texts[start : start + _EMBEDDING_BATCH] for start in range(0, len(texts), _EMBEDDING_BATCH)]
    return np.concatenate([session.run([minilm.OUTPUT_NAME], minilm.tokenize(batch))[0] for batch in batches])


def _convert(original: Path, title: str, method: str) -> _Variant:
    output = original.with_name(f"{original.stem}.{method}.onnx")
    layers = 0

    def convert() -> None:
        nonlocal layers
        layers = len(sparamx_onnx.convert(original, output, method=method, weights="bf16", force=True).plan.converted)

    _step(f"sparamx-onnx convert {original} -o {output} --weights bf16 --method {method} --force", convert)
    return _Variant(title, output, layers)


def _rows_of(
    original: Path, variants: Sequence[_Variant], layers: str, timings: dict[str, list[Benchmark]]
) -> list[list[str]]:
    """The rows that both tables have; `timings` holds for each row of times one benchmark per variant."""
    last = next(reversed(timings.values()))
    paths = [original, *(variant.path for variant in variants)]
    # In every benchmark the first timing is the variant's, the second the original's.
    memory = [last[0].timings[1], *(benchmark.timings[0] for benchmark in last)]
    rows = [
        ["linear layers converted", layers, *(str(variant.layers) for variant in variants)],
        ["file", *(size(_file_bytes(path)) for path in paths)],
        ["memory of a process that runs it (PSS)", *(size(timing.pss) for timing in memory)],
        ["  of it since before loading", *(size(timing.model_pss) for timing in memory)],
    ]
    for name, benchmarks in timings.items():
        # Only times of one run, in which both models took turns, can be compared: each cell has both of its own.
        cells = []
        for benchmark in benchmarks:
            converted, dense = (duration(timing.median) for timing in benchmark.timings)
            cells.append(f"{dense} -> {converted}, {benchmark.ratio:.2f}x")
        rows.append([name, "", *cells])
    return rows


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print()
    print(render([Column(""), *(Column(title, right=True) for title in titles)], rows))


def _file_bytes(model: Path) -> int:
    data = _data_file(model)
    return model.stat().st_size + (data.stat().st_size if data.exists() else 0)


def _data_bytes(model: Path) -> int:
    return _data_file(model).stat().st_size


def _data_file(model: Path) -> Path:
    return model.with_name(model.name + ".data")


def _step(command: str, work: Callable[[], None]) -> None:
    """Says which command does the same as `work`, and how long it took."""
    print(f"$ {command}", end="", flush=True)
    start = time.monotonic()
    work()
    print(f"    # {time.monotonic() - start:.1f} s", flush=True)


def _say(what: str) -> None:
    print(f"... {what}", flush=True)


if __name__ == "__main__":
    main()
