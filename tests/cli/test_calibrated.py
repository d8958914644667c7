"""``convert --calibration`` from the outside: pruning by inputs, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import sparamx_onnx
from sparamx_onnx import cli
from sparamx_onnx.ops import packing

Save = Callable[..., Path]
Mlp = Callable[..., onnx.ModelProto]
Tree = Callable[[Path], dict[str, bytes]]

DONE, UNUSABLE = 0, 2
SIZES = (96, 128, 112)


@pytest.fixture
def model(tmp_path: Path, mlp: Mlp, save: Save) -> Path:
    """Two layers without zeros, large enough to be pruned."""
    folder = tmp_path / "models"
    folder.mkdir()
    return save(mlp(sizes=SIZES, sparsity=0.0), folder / "dense.onnx")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with three runs of different batch sizes."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for index in range(3):
        x = np.random.default_rng(index).standard_normal((100 + index, SIZES[0]), np.float32)
        # Inputs of different sizes that are not independent: what the methods differ in.
        mixing = np.random.default_rng(9).standard_normal((SIZES[0], SIZES[0])).astype(np.float32) / 10
        np.savez(folder / f"{index}.npz", x=x @ mixing * np.linspace(0.1, 3, SIZES[0], dtype=np.float32))
    return folder


def _weights(path: Path) -> list[np.ndarray]:
    """The weights of a converted model, unpacked."""
    values = ir.load(path).graph.initializers.values()
    return [packing.unpack(v.const_value.numpy()) for v in values if v.name.endswith(".sparamx")]  # type: ignore[union-attr]


def _error(path: Path, model: Path, inputs: Path) -> float:
    """How far the outputs are from the original's, relative, on the inputs."""
    sessions = [sparamx_onnx.InferenceSession(p) for p in (model, path)]
    total = []
    for file in sorted(inputs.glob("*.npz")):
        x = np.load(file)["x"]
        wanted, got = (session.run(None, {"x": x})[0] for session in sessions)
        total.append(np.linalg.norm(wanted - got) / np.linalg.norm(wanted))
    return float(np.mean(total))


def test_calibration_alone_means_sparsegpt(model: Path, inputs: Path, tmp_path: Path) -> None:
    assert cli.run(["convert", str(model), "--calibration", str(inputs)]) == DONE
    output = model.with_name("dense.sparse.onnx")
    assert [round(float(np.mean(w == 0)), 3) for w in _weights(output)] == [0.5, 0.5]
    again = tmp_path / "again.onnx"
    assert (
        cli.run(["convert", str(model), "-o", str(again), "--method", "sparsegpt", "--calibration", str(inputs)]) == 0
    )
    assert again.with_name("again.onnx.data").read_bytes() == output.with_name("dense.sparse.onnx.data").read_bytes()


def test_the_methods_are_ordered_by_what_they_know(model: Path, inputs: Path, tmp_path: Path) -> None:
    errors = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        output = tmp_path / f"{method}.onnx"
        calibration = inputs if method != "magnitude" else None
        sparamx_onnx.convert(model, output, method=method, sparsity=0.6, calibration=calibration, weights="fp32")
        errors.append(_error(output, model, inputs))
    assert errors[0] < 0.9 * errors[1]
    assert errors[1] < 0.9 * errors[2]


def test_the_same_options_give_the_same_bytes(model: Path, inputs: Path, tmp_path: Path) -> None:
    for options in ({"allocation": "sensitivity"}, {"pattern": "2:4", "weights": "int8"}, {"method": "wanda"}):
        results = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            output = tmp_path / name / "out.onnx"
            sparamx_onnx.convert(model, output, calibration=inputs, force=True, **options)
            results.append((output.read_bytes(), output.with_name("out.onnx.data").read_bytes()))
        assert results[0] == results[1]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns(model: Path, inputs: Path, tmp_path: Path, method: str, pattern: str) -> None:
    calibration = [] if method == "magnitude" else ["--calibration", str(inputs)]
    output = tmp_path / "out.onnx"
    arguments = ["convert", str(model), "-o", str(output), "--method", method, "--pattern", pattern, *calibration]
    assert cli.run(arguments) == DONE
    kept, of = map(int, pattern.split(":"))
    for w in _weights(output):
        np.testing.assert_array_equal((w.reshape(-1, of, w.shape[1]) != 0).sum(axis=1), kept)


def test_what_is_recorded_and_reported(
    model: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.onnx"
    arguments = ["convert", str(model), "-o", str(output), "--calibration", str(inputs), "--sparsity", "0.6", "--json"]
    assert cli.run([*arguments, "--allocation", "sensitivity"]) == DONE
    report = json.loads(capsys.readouterr().out)
    layers = report["nodes"]
    assert all(0 < layer["error"] < 0.5 and layer["pruned"] for layer in layers)
    assert len({layer["sparsity"] for layer in layers}) == len(layers)
    size = sum(layer["k"] * layer["n"] for layer in layers)
    assert sum(layer["nnz"] for layer in layers) == pytest.approx(0.4 * size, rel=0.01)
    options = {"method": "sparsegpt", "sparsity": 0.6, "pattern": None, "allocation": "sensitivity", "calibrated": True}
    assert options.items() <= report["options"].items()
    assert options.items() <= json.loads(ir.load(output).metadata_props["sparamx.options"]).items()


def test_runs_may_be_stacked_in_one_file(model: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 50, SIZES[0]), np.float32)
    folder = tmp_path / "apart"
    folder.mkdir()
    for index, run in enumerate(x):
        np.savez(folder / f"{index}.npz", x=run)
    np.savez(tmp_path / "stacked.npz", x=x)
    results = []
    for name, calibration in (("a", folder), ("b", tmp_path / "stacked.npz")):
        sparamx_onnx.convert(model, tmp_path / f"{name}.onnx", calibration=calibration)
        results.append((tmp_path / f"{name}.onnx.data").read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_a_dry_run_predicts_without_calibrating(
    model: Path, inputs: Path, tmp_path: Path, tree: Tree, weights: str
) -> None:
    before = tree(tmp_path)
    planned = sparamx_onnx.convert(model, calibration=inputs, weights=weights, dry_run=True)
    assert tree(tmp_path) == before
    done = sparamx_onnx.convert(model, calibration=inputs, weights=weights)
    for predicted, actual in zip(planned.plan, done.plan, strict=True):
        # The size of int4 weights depends on where the zeros are, most of all in matrices as small as these.
        assert predicted.bytes_after == pytest.approx(actual.bytes_after, rel=0.15 if weights == "int4" else 0.05)
        assert predicted.error is None


def test_zeros_that_are_there_are_kept(tmp_path: Path, mlp: Mlp, save: Save, inputs: Path) -> None:
    """A model with zeros enough stays as it is; without calibration inputs nothing is pruned at all."""
    model = save(mlp(sizes=SIZES, sparsity=0.6), tmp_path / "pruned.onnx")
    outputs = []
    for name, calibration in (("kept", None), ("calibrated", inputs)):
        sparamx_onnx.convert(model, tmp_path / f"{name}.onnx", calibration=calibration, weights="fp32")
        outputs.append(_weights(tmp_path / f"{name}.onnx"))
    for kept, calibrated in zip(*outputs, strict=True):
        assert np.mean(kept == 0) == pytest.approx(0.6, abs=0.001)
        assert (calibrated[kept == 0] == 0).all()
        assert np.mean(calibrated == 0) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "sparsegpt"], "needs calibration inputs"),
        (["--method", "wanda"], "needs calibration inputs"),
        (["--sparsity", "0.5"], "takes no sparsity; give calibration inputs"),
        (["--pattern", "2:4"], "takes no pattern"),
        (["--allocation", "sensitivity"], "needs calibration inputs"),
        (["--method", "magnitude", "--calibration", "INPUTS"], "takes no calibration inputs"),
        (["--method", "keep", "--calibration", "INPUTS"], "takes no calibration inputs"),
        (["--calibration", "INPUTS", "--pattern", "2:4", "--sparsity", "0.5"], "leave one of the two out"),
        (["--calibration", "INPUTS", "--pattern", "2:4", "--allocation", "sensitivity"], "the same sparsity"),
        (["--calibration", "missing.npz"], "cannot be read: No such file"),
        (["--calibration", "EMPTY"], "holds no .npz file"),
        (["--calibration", "OTHER"], "has no array for input 'x'"),
        (["--calibration", "DOUBLE"], "is float64, the model wants float32"),
        (["--calibration", "NARROW"], "NARROW.npz: input 'x' has the shape [2, 95], the model wants"),
        (["--calibration", "NOTHING"], "holds no run"),
    ],
)
def test_what_is_refused(
    model: Path,
    inputs: Path,
    tmp_path: Path,
    tree: Tree,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.delenv("SPARAMX_DEBUG", raising=False)
    files = {
        "OTHER": {"y": np.zeros(3)},
        "DOUBLE": {"x": np.zeros((2, SIZES[0]))},
        "NARROW": {"x": np.zeros((2, 95), np.float32)},
        "NOTHING": {"x": np.zeros((0, 2, SIZES[0]), np.float32)},
    }
    for name, arrays in files.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "EMPTY").mkdir()
    places = {"INPUTS": str(inputs), "EMPTY": str(tmp_path / "EMPTY")}
    places |= {name: str(tmp_path / f"{name}.npz") for name in files}
    before = tree(tmp_path)
    assert cli.run(["convert", str(model), *(places.get(option, option) for option in options)]) == UNUSABLE
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert re.fullmatch(r"error: [^\n]+\.", lines[0])
    assert sentence in lines[0]
    assert "bug" not in lines[0]
    assert tree(tmp_path) == before
    assert not list(model.parent.glob(".*"))


def test_an_interruption_leaves_nothing(tmp_path: Path, mlp: Mlp, save: Save, tree: Tree) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    model = save(mlp(sizes=[1024] * 5, sparsity=0.0), folder / "dense.onnx")
    np.savez(tmp_path / "inputs.npz", x=np.random.default_rng(0).standard_normal((1500, 1024), np.float32))
    before = tree(folder)
    command = [sys.executable, "-m", "sparamx_onnx", "convert", str(model), "--calibration", "inputs.npz"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(folder.glob(".*/pruned*.npy")):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 143
    assert tree(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["dense.onnx"]
