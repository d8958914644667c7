"""The speed that a dry run predicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import sparamx_onnx
from sparamx_onnx import cli, prediction

Save = Callable[..., Path]
DONE = 0


@pytest.fixture
def _a_gigabyte_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "bytes_per_second", lambda wanted, threads: 1e9)


@pytest.mark.usefixtures("_a_gigabyte_per_second")
def test_it_is_the_time_to_read_all_weights(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"layer0": 48 * 64, "layer1": 64 * 40}
    assert cli.run(["convert", str(dense), "--dry-run", "--exclude", "layer1", "--json"]) == DONE
    answer = json.loads(capsys.readouterr().out)
    (converted,) = [node for node in answer["nodes"] if node["action"] == "converted"]
    predicted = answer["prediction"]
    assert predicted["bytes_before"] == 4 * sum(layers.values())
    assert predicted["bytes_after"] == converted["bytes_after"] + 4 * layers["layer1"]
    assert predicted["seconds_after"] == pytest.approx(predicted["bytes_after"] / 1e9)
    assert cli.run(["convert", str(dense), "--dry-run", "--exclude", "layer1"]) == DONE
    assert "at 1.0 GB/s, as measured here" in capsys.readouterr().out
    # What is written is measured, not predicted.
    assert sparamx_onnx.convert(dense).prediction is None


@pytest.mark.usefixtures("_a_gigabyte_per_second")
def test_of_two_branches_one_runs_and_halves_are_read_as_floats(tmp_path: Path, save: Save) -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)

    def branch(name: str) -> onnx.GraphProto:
        nodes = [helper.make_node("Cast", ["w"], [f"{name}_w"], to=onnx.TensorProto.FLOAT)]
        nodes.append(helper.make_node("MatMul", ["x", f"{name}_w"], [name], name))
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, 1, None)])

    chooses = helper.make_node("If", ["c"], ["y"], "if", then_branch=branch("a"), else_branch=branch("b"))
    graph = helper.make_graph(
        [chooses],
        "g",
        [helper.make_tensor_value_info("x", 1, ["m", 64]), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info("y", 1, ["m", 64])],
        [numpy_helper.from_array(w, "w")],
    )
    model = save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "m.onnx"
    )
    result = sparamx_onnx.convert(model, dry_run=True)
    assert len(result.plan.converted) == 2
    assert result.prediction is not None
    assert result.prediction.bytes_before == 4 * 64 * 64
    assert result.prediction.bytes_after == result.plan.bytes_after


def test_this_machine_reads_memory_at_a_believable_speed() -> None:
    assert 1e8 < prediction.bytes_per_second(0, 1) < 1e13


@pytest.mark.usefixtures("_a_gigabyte_per_second")
def test_nothing_is_predicted_where_nothing_is_converted(tmp_path: Path, plain: onnx.ModelProto, save: Save) -> None:
    result = sparamx_onnx.convert(save(plain, tmp_path / "plain.onnx"), dry_run=True)
    assert result.prediction is None
    assert result.to_dict()["prediction"] is None
