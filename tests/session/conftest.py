"""Models made of the sparse operator alone, written by hand: these tests judge the library, not the conversion."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import sparamx_onnx
from sparamx_onnx.ops.packing import Form, PackOptions, WeightType, pack

MakeModel = Callable[..., onnx.ModelProto]
_ROOT = Path(__file__).parents[2]
_ALIGNMENT = 4096


@dataclasses.dataclass(frozen=True)
class Layer:
    """One operator: its packed weight and what else it needs."""

    blob: np.ndarray
    k: int
    n: int
    bias: np.ndarray | None = None
    epilogue: str = "none"


def _weight(k: int, n: int, sparsity: float = 0.5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((k, n), np.float32)
    weight[rng.random((k, n), np.float32) < sparsity] = 0
    return weight


def _layer(
    k: int, n: int, weight_type: str = "bf16", form: str = "sparse", *, epilogue: str = "none", seed: int = 0
) -> Layer:
    """A layer with half of its weights zero, and a bias where there is an epilogue."""
    blob = pack(_weight(k, n, seed=seed), PackOptions(WeightType(weight_type), Form(form)))
    bias = np.linspace(-1, 1, n, dtype=np.float32) if epilogue != "none" else None
    return Layer(blob, k, n, bias, epilogue)


def _model(layers: Sequence[Layer]) -> onnx.ModelProto:
    """The layers in a row, weights inside the model: x [..., K of the first] to y [..., N of the last]."""
    nodes, initializers, value = [], [], "x"
    for index, layer in enumerate(layers):
        inputs = [value, f"w{index}"]
        tensor = TensorProto(name=f"w{index}", data_type=TensorProto.UINT8, dims=[layer.blob.size])
        tensor.raw_data = layer.blob.tobytes()
        initializers.append(tensor)
        if layer.bias is not None:
            inputs.append(f"b{index}")
            initializers.append(onnx.numpy_helper.from_array(layer.bias, f"b{index}"))
        value = "y" if index == len(layers) - 1 else f"h{index}"
        nodes.append(
            helper.make_node(
                "SparseAMXMatMul",
                inputs,
                [value],
                f"layer{index}",
                domain="com.sparamx",
                K=layer.k,
                N=layer.n,
                epilogue=layer.epilogue,
            )
        )
    graph = helper.make_graph(
        nodes,
        "sparse",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", layers[0].k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", layers[-1].n])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.sparamx", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def _save(model: onnx.ModelProto, path: Path) -> Path:
    """Writes the model and, beside it, its uint8 initializers at aligned offsets of one data file."""
    data = path.with_name(path.name + ".data")
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.UINT8:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                onnx.external_data_helper.set_external_data(tensor, data.name, file.tell(), len(tensor.raw_data))
                file.write(tensor.raw_data)
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    return _layer


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., np.ndarray]:
    return _weight


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    return _model


@pytest.fixture(scope="session")
def save_model() -> Callable[[onnx.ModelProto, Path], Path]:
    return _save


@pytest.fixture(scope="session")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the Python that has the oldest supported versions of everything.

    SPARAMX_OLDEST_PYTHON names it, this package installed. Without it, one is made below build/, which then imports the
    package that is being tested.
    """
    environment = {**os.environ}
    python = environment.get("SPARAMX_OLDEST_PYTHON")
    if not python:
        python = _make_oldest(_ROOT / "build" / "oldest-python")
        shim = tmp_path_factory.mktemp("shim")
        _link_package(shim / "sparamx_onnx")
        environment |= {"PYTHONPATH": str(shim), "SPARAMX_LIBRARY": sparamx_onnx.get_library_path()}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def _make_oldest(folder: Path) -> str:
    pins = _ROOT / "tests" / "requirements-oldest.txt"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists() or ready.read_text() != pins.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", pins]
        subprocess.run(install, check=True, timeout=600)
        ready.write_text(pins.read_text())
    return str(python)


def _link_package(folder: Path) -> None:
    """A folder with the modules of the package, wherever they lie, and nothing else of their neighbourhood."""
    folder.mkdir()
    for path in Path(str(sparamx_onnx.__file__)).parent.iterdir():
        if path.suffix == ".py":
            (folder / path.name).symlink_to(path)
    for name in ("ops", "graph_passes"):
        module = importlib.import_module(f"sparamx_onnx.{name}")
        (folder / name).symlink_to(Path(str(module.__file__)).parent)
