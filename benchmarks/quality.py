#!/usr/bin/env python3
"""What pruning does to MiniLM's sentence embeddings: every method at several sparsities, judged on unseen sentences.

The model has its real weights; calibration and test sentences are docstrings of Python's standard library, none of them
in both. Cosine: between the embedding of a sentence before and after. Neighbours: of the 10 sentences nearest to a
sentence before, how many are among the 10 nearest after. With --json, what is there is not measured again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import numpy.typing as npt
import onnxruntime
from documents import Cells

import sparamx_onnx
from sparamx_onnx.models import minilm, sentences

BATCH = 64
NEIGHBOURS = 10
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
METHODS: dict[str, dict[str, str]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt by sensitivity": {"method": "sparsegpt", "allocation": "sensitivity"},
}

Embeddings = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--calibration", type=int, default=1024, help="calibration sentences")
    parser.add_argument("--test", type=int, default=1000, help="test sentences")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=SPARSITIES)
    parser.add_argument("--patterns", nargs="*", default=["2:4"])
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    arguments = parser.parse_args()
    about = machine.describe()
    print(machine.headline(about))
    cells = Cells(arguments.json, about, ("method", "sparsity", "pattern"))
    common = {"method": None, **{name: getattr(arguments, name) for name in ("calibration", "test", "weights")}}
    if cells.has(common) and common not in cells:
        raise SystemExit(f"{arguments.json} was measured with other sentences or weights; name another file")
    cells.add(common)
    todo = [case for case in cases(arguments) if not cells.has(case)]
    if todo:
        for row in measure(todo, arguments):
            cells.add(row)
            cells.save()


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The model packed as it is, and pruned by every method."""
    yield {"method": "keep"}
    for method in arguments.methods:
        for sparsity in arguments.sparsities:
            yield {"method": method, "sparsity": sparsity}
        if "allocation" not in METHODS[method]:
            for pattern in arguments.patterns:
                yield {"method": method, "pattern": pattern}


def measure(todo: Iterable[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How far the embeddings move in every case."""
    found = sentences.collect(arguments.test + arguments.calibration)
    test, calibration = found[: arguments.test], found[arguments.test :]
    print(f"{len(calibration)} calibration sentences, {len(test)} others to judge; {arguments.weights} weights")
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "minilm.onnx"
        minilm.export(dense)
        inputs = Path(folder) / "calibration"
        write_calibration(calibration, inputs)
        expected = embed(dense, test)
        print(f"{'method':<26}{'zeros':>8}{'cosine':>9}{'lowest':>9}{'neighbours':>12}{'seconds':>9}")
        for case in todo:
            options = {**case, **METHODS.get(case["method"], {})}
            if case["method"] not in ("keep", "magnitude"):
                options["calibration"] = inputs
            start = time.perf_counter()
            pruned = sparamx_onnx.convert(
                dense, Path(folder) / "pruned.onnx", weights=arguments.weights, force=True, **options
            )
            seconds = time.perf_counter() - start
            assert pruned.output is not None
            row = {
                **case,
                "zeros": pruned.plan.sparsity,
                **judge(expected, embed(Path(pruned.output), test)),
                "seconds": seconds,
            }
            print(
                f"{case['method']:<26}{case.get('pattern') or format(row['zeros'], '.1%'):>8}{row['cosine']:>9.4f}"
                f"{row['lowest_cosine']:>9.4f}{row['neighbours']:>12.4f}{seconds:>9.1f}",
                flush=True,
            )
            yield row


def write_calibration(texts: Iterable[str], folder: Path) -> None:
    """One file per batch, sentences of like length together, as a user would write them."""
    folder.mkdir()
    ordered = sorted(texts, key=len)
    for start in range(0, len(ordered), BATCH):
        np.savez(folder / f"{start:06}.npz", **minilm.tokenize(ordered[start : start + BATCH]))  # type: ignore[arg-type]


def embed(model: Path, texts: Sequence[str]) -> Embeddings:
    """The embeddings of sentences, float32 [sentences, 384]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = sparamx_onnx.InferenceSession(model, options)
    parts = [
        session.run(None, minilm.tokenize(texts[start : start + BATCH]))[0] for start in range(0, len(texts), BATCH)
    ]
    return np.concatenate(parts)


def judge(expected: Embeddings, actual: Embeddings) -> dict[str, float]:
    """How near embeddings, rows of length 1, are to those of the original model."""
    cosines = np.einsum("ij,ij->i", expected, actual)
    agreement = [
        len(set(before) & set(after)) / NEIGHBOURS
        for before, after in zip(nearest(expected), nearest(actual), strict=True)
    ]
    return {
        "cosine": float(cosines.mean()),
        "lowest_cosine": float(cosines.min()),
        "neighbours": float(np.mean(agreement)),
    }


def nearest(embeddings: Embeddings) -> npt.NDArray[np.int64]:
    """For each embedding, the indices of those nearest to it, [sentences, 10]."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]


if __name__ == "__main__":
    main()
