"""int8 and int4 weights against ONNX Runtime's own quantization, at the same size: the error may not be larger.

Both are given the same dense weights and the same inputs, and both are compared with the fp32 product: the trained
weights of MiniLM with the activations that reach them, and random matrices.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import sparamx_onnx
from sparamx_onnx.models import minilm, sentences
from sparamx_onnx.ops import library

# Of query, key, value, attention output, up and down, the first layer's and the last one's. All with SPARAMX_TEST_FULL.
LAYERS_PER_KIND = minilm.LINEAR_LAYERS // 6 if os.environ.get("SPARAMX_TEST_FULL") else 2


@dataclass(frozen=True)
class Product:
    """A matrix product: activations [M, K] and a weight [K, N]."""

    name: str
    x: np.ndarray
    w: np.ndarray


def _linear_model(w: np.ndarray) -> onnx.ModelProto:
    """y = x w."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", w.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", w.shape[1]])],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    library.register(options)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def _error(y: np.ndarray, product: Product) -> float:
    """Root mean square of the difference to the exact product, relative to that of the product."""
    exact = product.x.astype(np.float64) @ product.w.astype(np.float64)
    return float(np.sqrt(((y - exact) ** 2).mean() / (exact**2).mean()))


def _captured(minilm_path: Path) -> list[Product]:
    """Linear layers of MiniLM with the activations that reach them on 32 real sentences."""
    model = onnx.load(minilm_path)
    weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    layers = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert len(layers) == minilm.LINEAR_LAYERS
    kinds: dict[tuple[object, ...], list[onnx.NodeProto]] = {}
    for layer in layers:
        kinds.setdefault((weights[layer.input[1]].shape, layers.index(layer) % 6), []).append(layer)
    chosen = [kind[i] for kind in kinds.values() for i in np.linspace(0, len(kind) - 1, LAYERS_PER_KIND).astype(int)]
    del model.graph.output[:]
    for name in dict.fromkeys(layer.input[0] for layer in chosen):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = minilm.tokenize(sentences.collect(32))
    kept = inputs["attention_mask"].astype(bool)  # padding is nobody's activation
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(names, inputs), strict=True))
    return [Product(n.input[1], values[n.input[0]][kept], weights[n.input[1]]) for n in chosen]


def _random() -> list[Product]:
    """Matrices wide enough that chance does not decide who is better."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 384), np.float32), rng.standard_normal((384, 1024), np.float32)
    outliers = x * np.where(rng.random(384) < 0.01, 20, 1).astype(np.float32)
    heavy = rng.standard_t(4, w.shape).astype(np.float32)
    return [
        Product("normal", x, w),
        Product("outlying activations", outliers, w),
        Product("activations behind a Relu", np.maximum(x, 0), w),
        Product("outlying weights", x, heavy),
    ]


@pytest.fixture(scope="module")
def products(minilm_path: Path) -> list[Product]:
    return _captured(minilm_path) + _random()


@pytest.fixture
def check(products: list[Product], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fails where our error is larger than that of another way to quantize a model file."""

    def check(other: Callable[[Path, Path], None], **options: object) -> None:
        worse = []
        for product in products:
            dense, ours, theirs = (tmp_path / f"{name}.onnx" for name in ("dense", "ours", "theirs"))
            onnx.save(_linear_model(product.w), dense)
            sparamx_onnx.convert(dense, ours, force=True, **options)
            other(dense, theirs)
            limit = _error(_run(theirs, product.x), product)
            assert 0.001 < limit < 0.5, "it has run, and it is quantized"
            for isa in ISAS:
                monkeypatch.setenv("SPARAMX_ISA", isa)
                error = _error(_run(ours, product.x), product)
                assert error > 0.001
                if error > limit:
                    worse.append(f"{product.name} on {isa}: {error:.5f} > {limit:.5f}")
        assert not worse, "; ".join(worse)

    return check


@pytest.fixture
def quiet() -> Iterator[None]:
    """ONNX Runtime's quantizer advises through the root logger."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


# The levels whose arithmetic differs: integers, and, for int4 on AMX, bf16.
SUPPORTED = [level["name"] for level in library.cpu_info()["levels"] if level["supported"]]
ISAS = [name for name in ("avx2", "amx") if name in SUPPORTED] or ["scalar"]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("per_channel", [False, True])
def test_int8_is_as_accurate_as_dynamic_quantization(check: Callable[..., None], per_channel: bool) -> None:
    def dynamic(dense: Path, quantized: Path) -> None:
        quantize_dynamic(dense, quantized, per_channel=per_channel)

    check(dynamic, weights="int8")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_int4_is_as_accurate_as_matmul_nbits(check: Callable[..., None], group_size: int) -> None:
    def nbits(dense: Path, quantized: Path) -> None:
        model = onnx.load(dense)
        quantizer = MatMulNBitsQuantizer(model, block_size=group_size, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(quantized), False)

    check(nbits, weights="int4", group_size=group_size)
