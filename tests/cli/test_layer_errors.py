"""``verify --layers``: which layer the errors come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import sparamx_onnx
from sparamx_onnx import cli

Save = Callable[..., Path]
Mlp = Callable[..., onnx.ModelProto]

DONE, FAILED = 0, 1
# More layers than are looked at together.
SIZES = (32, 48) * 11
WRONG = 18


def test_the_layer_that_is_wrong_is_found(
    tmp_path: Path, mlp: Mlp, save: Save, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    save(mlp(sizes=SIZES), tmp_path / "models" / "dense.onnx", external="dense.bin")
    wrong = mlp(sizes=SIZES)
    tensor = next(t for t in wrong.graph.initializer if t.name == f"layer{WRONG}.weight")
    weight = numpy_helper.to_array(tensor).copy()
    weight[:, 7] += 1.0
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    sparse = sparamx_onnx.convert(save(wrong, tmp_path / "wrong.onnx"), weights="fp32").output
    # Relative paths, from elsewhere.
    monkeypatch.chdir(tmp_path / "models")
    arguments = ["verify", "dense.onnx", "../wrong.sparse.onnx", "--layers"]
    assert cli.run([*arguments, "--json"]) == FAILED
    document = json.loads(capsys.readouterr().out)
    layers = document["layers"]
    assert [layer["node"] for layer in layers] == [f"layer{index}/MatMul" for index in range(len(SIZES) - 1)]
    assert document["worst_layer"] == f"layer{WRONG}/MatMul"
    for index, layer in enumerate(layers):
        assert (layer["alone"] > 1e-2) == (index == WRONG)
        assert (layer["so_far"] > 1e-4) == (index >= WRONG)
    # The last result is an output of the model.
    assert layers[-1]["so_far"] == pytest.approx(document["outputs"][0]["relative_error"], rel=1e-5)
    assert cli.run(arguments) == FAILED
    assert f"the largest error of its own is layer{WRONG}/MatMul" in " ".join(capsys.readouterr().out.split())
    assert cli.run(["verify", "dense.onnx", str(sparse)]) == FAILED
    assert "--layers shows" in capsys.readouterr().out


def test_siblings_are_told_apart_and_bodies_are_left_out(tmp_path: Path, save: Save) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((64, 32), np.float32) for name in ("q", "k", "inner")}
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["inside"], "inside")],
        "body",
        [],
        [helper.make_tensor_value_info("inside", 1, None)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "q"], ["query"], "query"),
            helper.make_node("MatMul", ["x", "k"], ["key"], "key"),
            helper.make_node("If", ["c"], ["chosen"], "if", then_branch=body, else_branch=body),
            helper.make_node("Sum", ["query", "key", "chosen"], ["y"], "sum"),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["m", 64]), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info("y", 1, ["m", 32])],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    dense = save(model, tmp_path / "m.onnx")
    sparse = sparamx_onnx.convert(dense, fuse_siblings="always", weights="int8").output
    result = sparamx_onnx.verify(dense, str(sparse), layers=True)
    assert result.layers is not None
    assert [layer.layer.partition(": ")[2] for layer in result.layers] == ["query", "key"]
    assert len({layer.node for layer in result.layers}) == 1
    assert all(layer.alone is not None and 1e-5 < layer.alone < 0.05 for layer in result.layers)


def test_without_sparse_operators_there_is_nothing_to_show(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(dense), str(dense), "--layers"]) == DONE
    assert "There is no sparse operator" in capsys.readouterr().out
    assert sparamx_onnx.verify(dense, dense).layers is None
