"""Small models for the tests of the public face."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def _children_hear_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that; a handler they do not inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _prune(weight: np.ndarray, sparsity: float) -> np.ndarray:
    """The weight with its smallest elements set to zero."""
    smallest = np.argsort(np.abs(weight), axis=None)[: round(sparsity * weight.size)]
    pruned = weight.copy()
    pruned.reshape(-1)[smallest] = 0
    return pruned


def _mlp(sizes: Sequence[int] = (48, 64, 40), sparsity: float = 0.5, seed: int = 0) -> onnx.ModelProto:
    """MatMul + Add + Relu layers on x [batch, sizes[0]], each weight with the given share of zeros."""
    rng = np.random.default_rng(seed)
    nodes, initializers, value = [], [], "x"
    for index, (k, n) in enumerate(itertools.pairwise(sizes)):
        last = index == len(sizes) - 2
        weight = _prune(rng.standard_normal((k, n), np.float32) / np.sqrt(k).astype(np.float32), sparsity)
        initializers.append(numpy_helper.from_array(weight, f"layer{index}.weight"))
        initializers.append(numpy_helper.from_array(rng.standard_normal(n, np.float32), f"layer{index}.bias"))
        nodes.append(helper.make_node("MatMul", [value, f"layer{index}.weight"], [f"m{index}"], f"layer{index}/MatMul"))
        value = "y" if last else f"a{index}"
        nodes.append(helper.make_node("Add", [f"m{index}", f"layer{index}.bias"], [value], f"layer{index}/Add"))
        if not last:
            nodes.append(helper.make_node("Relu", [value], [f"r{index}"], f"layer{index}/Relu"))
            value = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", sizes[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", sizes[-1]])],
        initializers,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)], producer_name="test")


def _without_linear_layers() -> onnx.ModelProto:
    """y = relu(x + 1): nothing to convert."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["sum"], "add"), helper.make_node("Relu", ["sum"], ["y"], "relu")],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(np.ones(8, np.float32), "one")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def _save(model: onnx.ModelProto, path: Path, external: str | None = None) -> Path:
    """Writes a model, its initializers into the file ``external`` beside it if that is given."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    if external is not None:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def _tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content: what must not change, and what must not appear."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def mlp() -> Callable[..., onnx.ModelProto]:
    return _mlp


@pytest.fixture(scope="session")
def plain() -> onnx.ModelProto:
    return _without_linear_layers()


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    return _save


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    return _tree


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A two-layer model, half of its weights zero, in a folder of its own."""
    folder = tmp_path / "models"
    folder.mkdir()
    return _save(_mlp(), folder / "dense.onnx")


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs the command line in a process of its own, in a folder where nothing of the checkout can be imported."""

    def run(*arguments: str | Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sparamx_onnx", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
