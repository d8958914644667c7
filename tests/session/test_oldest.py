"""The oldest supported ONNX Runtime, 1.21.1: the same library, the same models, the same bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx.ops.packed_cache import CacheOptions
from sparamx_onnx.ops.reference_attention import AttentionOptions
from sparamx_onnx.ops.reference_packed_cache import packed_attention

OLDEST = "1.21.1"
K, N = 200, 130
ROWS = (1, 2, 7, 40)
SPLITS = (64, 16, 50)
EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "silu")
WORKER = Path(__file__).with_name("oldest_worker.py")
FEEDS_WORKER = Path(__file__).with_name("feeds_worker.py")


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_layer: Callable[..., object],
    make_model: Callable[..., onnx.ModelProto],
    save_model: Callable[..., Path],
) -> Path:
    """Models of every type, form and epilogue, mapped and inline, one damaged, and inputs for them."""
    folder = tmp_path_factory.mktemp("models")
    for weight_type in ("fp32", "bf16"):
        for form in ("sparse", "dense"):
            for epilogue in EPILOGUES:
                layers = [make_layer(K, N, weight_type, form, epilogue=epilogue), make_layer(N, 50, weight_type, form)]
                save_model(make_model(layers), folder / f"{weight_type}-{form}-{epilogue}.onnx")
        siblings = make_model([make_layer(K, N, weight_type, epilogue="silu")])
        _cut(siblings)
        onnx.save(siblings, folder / f"{weight_type}-siblings.onnx")
        _halve(siblings)
        onnx.save(siblings, folder / f"{weight_type}-siblings-half.onnx")
    inline = make_model([make_layer(K, N)])
    onnx.save(inline, folder / "inline.onnx")
    blob = bytearray(inline.graph.initializer[0].raw_data)
    blob[0] ^= 1
    inline.graph.initializer[0].raw_data = bytes(blob)
    onnx.save(inline, folder / "damaged.onnx")
    rng = np.random.default_rng(0)
    np.savez(folder / "x.npz", **{f"rows{rows}": rng.standard_normal((rows, K), np.float32) for rows in ROWS})
    return folder


def _cut(model: onnx.ModelProto) -> None:
    """Has the only node of a model deliver its columns as several outputs, whose shapes are left to be inferred."""
    (node,) = model.graph.node
    del node.output[:], model.graph.output[:]
    for index in range(len(SPLITS)):
        node.output.append(f"y{index}")
        model.graph.output.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, None))
    node.attribute.append(helper.make_attribute("splits", SPLITS))


def _halve(model: onnx.ModelProto) -> None:
    """Makes inputs, outputs and biases float16."""
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))


def test_the_oldest_and_this_runtime_compute_the_same_bits(
    folder: Path, tmp_path: Path, oldest: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    library = sparamx_onnx.get_library_path()
    result = oldest("-P", WORKER, library, folder, tmp_path / "oldest.npz")
    assert result.returncode == 0, result.stderr
    subprocess.run([sys.executable, "-P", WORKER, library, folder, tmp_path / "here.npz"], check=True, timeout=300)
    then, now = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("oldest", "here"))
    assert str(then.pop("version")) == OLDEST
    assert str(now.pop("version")) == onnxruntime.__version__
    for outputs in (then, now):
        assert "'layer0'" in str(outputs["damaged"])
        assert "damaged" in str(outputs["damaged"])
    del then["damaged"], now["damaged"]
    assert set(then) == set(now)
    shapes = {name: list(then.pop(name)) for name in list(then) if name.endswith("/shapes")}
    assert shapes == {name: list(now.pop(name)) for name in shapes}
    for name in ("fp32-siblings", "bf16-siblings", "fp32-siblings-half", "bf16-siblings-half"):
        assert shapes[f"{name}/shapes"] == [f"['batch', {columns}]" for columns in SPLITS]
    assert len(then) == (2 * (2 * len(EPILOGUES) + 2) + 1) * len(ROWS)
    for name, y in then.items():
        assert y.dtype == (np.float16 if "half" in name else np.float32)
        assert y.shape == (int(name.partition("/rows")[2]), 50 if "-" in name and "siblings" not in name else N)
        assert np.isfinite(y).all()
        assert y.tobytes() == now[name].tobytes(), name


def _attention(folder: Path, name: str, tokens: int, packed: bool) -> None:
    """A SparseAMXAttention node with as many inputs as a decoder has, and inputs for it."""
    rng = np.random.default_rng(tokens)
    batch, heads, kv_heads, size, past = 2, 4, 2, 32, 50 if tokens == 1 else 0
    angles = rng.uniform(0, 6, (past + tokens, size // 2))
    feeds = {"query": rng.standard_normal((batch, tokens, (heads + 2 * kv_heads * packed) * size), np.float32)}
    if not packed:
        for part in ("key", "value"):
            feeds[part] = rng.standard_normal((batch, tokens, kv_heads * size), np.float32)
    feeds |= {
        "past_key": rng.standard_normal((batch, kv_heads, past, size), np.float32),
        "past_value": rng.standard_normal((batch, kv_heads, past, size), np.float32),
        "seqlens_k": np.array([past + tokens - 1, past], np.int32),
        "total_sequence_length": np.array(past + tokens, np.int32),
        "cos_cache": np.cos(angles).astype(np.float32),
        "sin_cache": np.sin(angles).astype(np.float32),
        "position_ids": np.broadcast_to(np.arange(past, past + tokens), (batch, tokens)).copy(),
        "head_sink": rng.standard_normal(heads, np.float32),
    }
    roles = ",".join(role for role in feeds if role != "query")
    outputs = ["output", "present_key", "present_value"]
    node = helper.make_node(
        "SparseAMXAttention", list(feeds), outputs, "attention", domain="com.sparamx", num_heads=heads,
        kv_num_heads=kv_heads, roles=roles,
    )  # fmt: skip
    types = {
        "seqlens_k": TensorProto.INT32,
        "total_sequence_length": TensorProto.INT32,
        "position_ids": TensorProto.INT64,
    }
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(
                name, types.get(name, TensorProto.FLOAT), [f"{name}{i}" for i in range(x.ndim)]
            )
            for name, x in feeds.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.sparamx", 1)]
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=imports), folder / f"{name}.onnx")
    np.savez(folder / f"{name}.npz", **feeds)


def _packed_attention(folder: Path) -> None:
    """A prompt into an empty packed cache, and a step over the cache that it leaves, of which a block is packed."""
    rng = np.random.default_rng(0)
    heads, kv_heads, size, past = 4, 2, 32, 70
    options, pruning = AttentionOptions(heads, kv_heads), CacheOptions(0.3, 0.5)
    cache = np.zeros((1, kv_heads, 0), np.uint8)
    for name, before, tokens in (("packed-prompt", 0, past), ("packed-step", past, 1)):
        feeds = {
            "query": rng.standard_normal((1, tokens, heads * size), np.float32),
            "key": rng.standard_normal((1, tokens, kv_heads * size), np.float32),
            "value": rng.standard_normal((1, tokens, kv_heads * size), np.float32),
            "past_cache": cache,
            "seqlens_k": np.array([before + tokens - 1], np.int32),
            "total_sequence_length": np.array(before + tokens, np.int32),
        }
        node = helper.make_node(
            "SparseAMXAttention", list(feeds), ["output", "", "", "present_cache"], "attention", domain="com.sparamx",
            num_heads=heads, kv_num_heads=kv_heads, cache="packed", roles=",".join(list(feeds)[1:]), **vars(pruning),
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "g",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(x.dtype), [f"{name}{i}" for i in range(x.ndim)]
                )
                for name, x in feeds.items()
            ],
            [
                helper.make_tensor_value_info("output", TensorProto.FLOAT, None),
                helper.make_tensor_value_info("present_cache", TensorProto.UINT8, None),
            ],
        )
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.sparamx", 1)]
        onnx.save(helper.make_model(graph, ir_version=10, opset_imports=imports), folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **feeds)
        lengths: dict[str, Any] = {"total_sequence_length": before + tokens}
        cache = packed_attention(options, pruning, **(feeds | lengths)).present_cache


def test_attention_gives_the_same_bits_with_the_oldest_runtime(
    tmp_path: Path, oldest: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for tokens in (1, 70):
        for packed in (False, True):
            _attention(folder, f"{tokens}-{'packed' if packed else 'apart'}", tokens, packed)
    _packed_attention(folder)
    library = sparamx_onnx.get_library_path()
    result = oldest("-P", FEEDS_WORKER, library, folder, tmp_path / "oldest.npz")
    assert result.returncode == 0, result.stderr
    subprocess.run(
        [sys.executable, "-P", FEEDS_WORKER, library, folder, tmp_path / "here.npz"], check=True, timeout=300
    )
    then, now = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("oldest", "here"))
    assert (str(then.pop("version")), str(now.pop("version"))) == (OLDEST, onnxruntime.__version__)
    assert len(then) == 4 * 3 + 2 * 2
    for name, value in then.items():
        assert value.size != 0
        assert np.isfinite(value).all()
        assert value.tobytes() == now[name].tobytes(), name


def _linear(path: Path) -> Path:
    """gelu(x W + b) V, as an exporter writes it, at an opset and IR version that the oldest runtime knows."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((K, N), np.float32)
    weight[rng.random((K, N)) < 0.6] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "up"),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("Gelu", ["s"], ["g"]),
        helper.make_node("Gemm", ["g", "v"], ["y"], "down", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 50])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(rng.standard_normal(N, np.float32), "b"),
            numpy_helper.from_array(rng.standard_normal((50, N), np.float32), "v"),
        ],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_the_command_line_works_with_the_oldest_of_everything(
    tmp_path: Path, oldest: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    model = _linear(tmp_path / "m.onnx")
    for arguments in (
        ["inspect", model],
        ["convert", model, "--weights", "fp32", "-o", tmp_path / "oldest.onnx"],
        ["verify", model, tmp_path / "oldest.onnx"],
        ["inspect", tmp_path / "oldest.onnx", "--json"],
        ["bench", tmp_path / "oldest.onnx", "--against", model, "--threads", "1"],
        ["info"],
    ):
        result = oldest("-m", "sparamx_onnx", *arguments)
        assert (result.returncode, result.stderr) == (0, ""), arguments
    assert OLDEST in result.stdout
    sparamx_onnx.convert(model, tmp_path / "here.onnx", weights="fp32")
    data = [(tmp_path / f"{name}.onnx.data").read_bytes() for name in ("oldest", "here")]
    assert data[0] == data[1]
    x = np.random.default_rng(1).standard_normal((3, K), np.float32)
    outputs = [
        sparamx_onnx.InferenceSession(tmp_path / f"{name}.onnx").run(None, {"x": x})[0] for name in ("oldest", "here")
    ]
    assert np.array_equal(*outputs)
