"""The command line itself: help, usage, JSON, exit codes, and the commands that only look."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx import cli

Save = Callable[..., Path]
Mlp = Callable[..., onnx.ModelProto]
Command = Callable[..., subprocess.CompletedProcess[str]]

DONE, FAILED, UNUSABLE = 0, 1, 2
COMMANDS = ("convert", "inspect", "verify", "bench", "info")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, mlp: Mlp, save: Save) -> tuple[Path, Path]:
    """A dense model and its converted form, bf16."""
    path = save(mlp(sizes=(96, 128, 64)), tmp_path_factory.mktemp("pair") / "m.onnx")
    return path, Path(str(sparamx_onnx.convert(path).output))


def test_help_lists_the_commands_and_each_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == DONE
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name}\s+[A-Z].*\.$", overview, re.MULTILINE)
        assert cli.run([name, "--help"]) == DONE
        text = capsys.readouterr().out
        assert "Examples:" in text
        assert f"sparamx-onnx {name}" in text.split("Examples:")[1]
        assert max(map(len, text.splitlines())) <= 100


def test_the_examples_of_the_help_are_command_lines_that_exist() -> None:
    for name, command in cli.commands.commands.items():
        for line, _ in command._examples:
            words = line.split()
            arguments = words[words.index(name) + 1 :]
            command.make_context(name, arguments)  # parses them, and refuses what is no option


def test_version_and_nothing_at_all(command: Command) -> None:
    version = command("--version")
    assert (version.returncode, version.stderr) == (DONE, "")
    assert version.stdout == f"sparamx-onnx {sparamx_onnx.__version__}\n"
    nothing = command()
    assert (nothing.returncode, nothing.stdout) == (UNUSABLE, "")
    assert nothing.stderr.startswith("Usage: sparamx-onnx")
    assert "Commands:" in nothing.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["convert"],
        ["inspect"],
        ["inspect", "a.onnx", "b.onnx"],
        ["inspect", "missing.onnx"],
        ["verify", "one.onnx"],
        ["verify", "missing.onnx", "missing.onnx"],
        ["bench", "missing.onnx"],
        ["bench", "m.onnx", "--batch", "0"],
        ["bench", "m.onnx", "--threads", "many"],
        ["bench", "m.onnx", "--length", "8", "--prompt", "8"],
        ["bench", "m.onnx", "--report", "page.html"],
        ["info", "--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_sentence_and_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == UNUSABLE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\.\n", captured.err)


def test_a_bug_is_one_sentence_too_and_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("sparamx_onnx.environment.environment", broken)
    monkeypatch.delenv("SPARAMX_DEBUG", raising=False)
    assert cli.run(["info"]) == UNUSABLE
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "RuntimeError: two lines" in captured.err
    assert "SPARAMX_DEBUG=1" in captured.err
    monkeypatch.setenv("SPARAMX_DEBUG", "1")
    assert cli.run(["info"]) == UNUSABLE
    assert "Traceback" in capsys.readouterr().err


def test_too_little_memory_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def hungry() -> None:
        raise MemoryError

    monkeypatch.setattr("sparamx_onnx.environment.environment", hungry)
    assert cli.run(["info"]) == UNUSABLE
    assert capsys.readouterr().err == "error: out of memory.\n"


def test_a_bar_is_shown_where_work_takes_long_and_somebody_watches(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparamx_onnx.progress.PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert cli.run(["inspect", str(pair[0])]) == DONE
    captured = capsys.readouterr()
    assert "reading weights" in captured.err
    assert "reading weights" not in captured.out


def test_json_is_one_document_and_nothing_else(pair: tuple[Path, Path], tmp_path: Path, command: Command) -> None:
    dense, sparse = pair
    for arguments in (
        ["convert", dense, "-o", tmp_path / "c.onnx"],
        ["convert", sparse, "-o", tmp_path / "d.onnx"],
        ["inspect", dense],
        ["verify", dense, sparse],
        ["bench", sparse, "--against", dense, "--threads", "1"],
        ["info"],
    ):
        result = command(*arguments, "--json")
        assert (result.returncode, result.stderr) == (DONE, ""), arguments
        assert result.stdout.startswith("{\n")
        assert result.stdout.endswith("}\n")
        assert isinstance(json.loads(result.stdout), dict)


def test_a_reader_that_goes_away_is_no_bug(pair: tuple[Path, Path]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "sparamx_onnx", "inspect", pair[0]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert "bug" not in errors
    assert "Traceback" not in errors
    assert process.returncode != DONE


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_a_dense_model(pair: tuple[Path, Path]) -> None:
    dense, sparse = pair
    result = sparamx_onnx.inspect(dense)
    assert result.converted == 0
    assert result.record == {}
    assert result.bytes_on_disk == dense.stat().st_size
    nodes = result.to_dict()["nodes"]
    assert [(node["k"], node["n"], node["action"]) for node in nodes] == [
        (96, 128, "converted"),
        (128, 64, "converted"),
    ]
    for node, packed in zip(nodes, sparamx_onnx.inspect(sparse).plan, strict=True):
        assert node["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert node["bytes_before"] == 4 * node["k"] * node["n"]
        assert node["bytes_after"] == packed.bytes_after  # the prediction is what it becomes


def test_inspect_a_converted_model(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    sparse = pair[1]
    result = sparamx_onnx.inspect(sparse)
    assert result.converted == 2
    assert result.record["version"]
    assert (result.record["method"], result.record["weights"]) == ("keep", "bf16")
    assert result.bytes_on_disk == sum(p.stat().st_size for p in (sparse, sparse.with_name(sparse.name + ".data")))
    for node in result.plan:
        assert node.reason.value == "already_converted"
        assert node.sparsity == pytest.approx(0.5, abs=1e-3)
        assert node.weight_type == "bf16"
        assert node.bytes_before == 4 * (node.k or 0) * (node.n or 0)
        assert 0 < (node.bytes_after or 0) < node.bytes_before // 2
    assert cli.run(["inspect", str(sparse)]) == DONE
    text = capsys.readouterr().out
    assert "2 converted" in text
    assert "96 x 128" in text
    assert "weights bf16" in text


def test_inspect_says_which_weights_are_packed_dense(
    tmp_path: Path, mlp: Mlp, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mlp(sizes=(96, 128, 64))
    model.graph.initializer[0].CopyFrom(mlp(sizes=(96, 128, 64), sparsity=0).graph.initializer[0])
    path = save(model, tmp_path / "m.onnx")
    for inspected in (path, Path(str(sparamx_onnx.convert(path).output))):
        nodes = sparamx_onnx.inspect(inspected).to_dict()["nodes"]
        assert [node["form"] for node in nodes] == ["dense", "sparse"]
        assert cli.run(["inspect", str(inspected)]) == DONE
        first, second = capsys.readouterr().out.splitlines()[1:3]
        assert first.endswith("  dense bf16")
        assert second.endswith("B  bf16")


@pytest.mark.parametrize("width", [80, 100, 120])
def test_tables_fit(tmp_path: Path, mlp: Mlp, save: Save, command: Command, width: int) -> None:
    model = mlp(sizes=(96, 128, 64))
    for node in model.graph.node:
        node.name = f"/model/decoder/layers.11/self_attention_block/projection/{'very_' * 12}long/{node.name}"
    result = command("inspect", save(model, tmp_path / "m.onnx"), COLUMNS=str(width))
    assert result.returncode == DONE
    table = result.stdout.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= width
    assert "…" in table


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_passes_a_faithful_conversion(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", *map(str, pair), "--json"]) == DONE
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] is True
    assert document["tolerance"] == 2e-2  # from the bf16 in the model's metadata
    (output,) = document["outputs"]
    assert 0 < output["relative_error"] < 2e-2
    assert output["cosine"] > 0.999
    assert output["argmax_agreement"] is not None
    assert cli.run(["verify", *map(str, pair)]) == DONE
    assert "All outputs within" in capsys.readouterr().out


def test_verify_fails_past_the_tolerance(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", *map(str, pair), "--tolerance", "1e-7"]) == FAILED
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "past the tolerance" in captured.out
    assert cli.run(["verify", *map(str, pair), "--tolerance", "1e-7", "--json"]) == FAILED
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_verify_says_that_a_pruned_model_was_pruned(
    tmp_path: Path, mlp: Mlp, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = save(mlp(sparsity=0.0), tmp_path / "m.onnx")
    sparse = sparamx_onnx.convert(dense, method="magnitude", include=["."]).output
    assert cli.run(["verify", str(dense), str(sparse)]) == FAILED
    assert "was pruned when it was converted (method magnitude)" in capsys.readouterr().out


def test_verify_uses_the_inputs_it_is_given(pair: tuple[Path, Path], tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((7, 96), np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    result = sparamx_onnx.verify(*pair, inputs=tmp_path / "in.npz")
    assert (result.runs, result.outputs[0].shape) == (1, (7, 64))
    outputs = [
        onnxruntime.InferenceSession(pair[0], providers=["CPUExecutionProvider"]).run(None, {"x": x})[0],
        sparamx_onnx.InferenceSession(pair[1]).run(None, {"x": x})[0],
    ]
    expected = np.abs(outputs[1] - outputs[0]).max() / np.abs(outputs[0]).max()
    assert result.outputs[0].relative_error == pytest.approx(float(expected), rel=1e-6)
    assert sparamx_onnx.verify(*pair, inputs={"x": x}).outputs == result.outputs


def _with_output(path: Path, value: str, folder: Path, op_type: str | None = None) -> Path:
    """The model with a further output: a value of it, or what an operator makes of that."""
    model = onnx.load(path)
    name = value
    if op_type is not None:
        name = "made"
        model.graph.node.append(helper.make_node(op_type, [value], [name]))
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(model, folder / f"{op_type}.onnx")
    return folder / f"{op_type}.onnx"


def _with_input(path: Path, folder: Path) -> Path:
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    model.graph.node.append(helper.make_node("Identity", ["more"], ["unused"]))
    onnx.save(model, folder / "more.onnx")
    return folder / "more.onnx"


def test_verify_refuses_what_does_not_fit(
    pair: tuple[Path, Path], tmp_path: Path, plain: onnx.ModelProto, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "wrong.npz", x=np.zeros((2, 95), np.float32))
    other = save(plain, tmp_path / "other.onnx")
    broken = onnx.load(pair[0])
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, tmp_path / "broken.onnx")
    for arguments, words in (
        ([*pair, "--inputs", tmp_path / "wrong.npz"], "input 'x' has the shape [2, 95], the model wants"),
        ([*pair, "--inputs", tmp_path / "missing.npz"], "missing.npz: cannot be read"),
        ([pair[0], other], "other.onnx"),
        ([tmp_path / "broken.onnx", pair[1]], "ONNX Runtime cannot run this model"),
        ([*pair, "--tolerance", "-1"], "tolerance"),
        ([pair[0], _with_output(pair[0], "m0", tmp_path)], "their outputs are y and y, m0"),
        ([_with_output(pair[0], "m0", tmp_path, "Shape"), pair[1]], "cannot be compared"),
        ([other, _with_input(other, tmp_path)], "an input 'more' that the other model lacks"),
        ([_with_output(pair[0], "m0", tmp_path, "SequenceConstruct")] * 2, "output 'made' is no tensor of numbers"),
    ):
        assert cli.run(["verify", *map(str, arguments)]) == UNUSABLE
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(r"error: [^\n]+\.\n", captured.err), captured.err
        assert words in captured.err


def test_verify_finds_a_single_wrong_weight(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = onnx.load(pair[0])
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[3, 5] += 1.0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, model.graph.initializer[0].name))
    onnx.save(model, tmp_path / "wrong.onnx")
    assert not sparamx_onnx.verify(pair[0], tmp_path / "wrong.onnx").passed
    assert sparamx_onnx.verify(pair[0], pair[0]).outputs[0].relative_error == 0.0


# --- info -------------------------------------------------------------------------------------------------------------


def test_reports_say_which_kernels_run_here(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, converted = pair
    monkeypatch.setenv("SPARAMX_ISA", "scalar")
    for arguments in (["inspect", str(converted)], ["convert", str(dense), "--weights", "bf16", "--dry-run"]):
        assert cli.run(arguments) == DONE
        assert "Kernels on this CPU: scalar for bf16 weights." in capsys.readouterr().out
        assert cli.run([*arguments, "--json"]) == DONE
        assert json.loads(capsys.readouterr().out)["kernels"] == {"bf16": {"1": "scalar"}}


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARAMX_ISA", raising=False)
    assert cli.run(["info", "--json"]) == DONE
    document = json.loads(capsys.readouterr().out)
    assert document["library"] == sparamx_onnx.get_library_path()
    assert document["onnxruntime"] == onnxruntime.__version__
    assert document["version"] == sparamx_onnx.__version__
    levels = {level["name"]: level for level in document["cpu"]["levels"]}
    assert levels["scalar"]["supported"] is True
    assert levels[document["cpu"]["level"]]["supported"] is True
    assert all(level["reason"] for level in levels.values())
    assert document["cpu"]["forced"] is None
    assert cli.run(["info"]) == DONE
    text = capsys.readouterr().out
    for fact in (document["library"], document["cpu"]["cpu"], document["cpu"]["level"], *levels):
        assert fact in text


@pytest.mark.parametrize("level", ["scalar", "mmx"])
def test_info_with_a_forced_level(command: Command, level: str) -> None:
    result = command("info", "--json", SPARAMX_ISA=level)
    cpu = json.loads(result.stdout)["cpu"]
    assert cpu["forced"] == level
    assert cpu["level"] == ("scalar" if level == "scalar" else None)
    assert "SPARAMX_ISA" in cpu["reason"]
    text = command("info", SPARAMX_ISA=level)
    assert text.returncode == DONE
    assert cpu["reason"] in text.stdout


def test_info_without_the_library(command: Command) -> None:
    result = command("info", SPARAMX_LIBRARY="/nonexistent.so")
    assert (result.returncode, result.stdout) == (UNUSABLE, "")
    assert re.fullmatch(r"error: [^\n]*/nonexistent\.so[^\n]*\n", result.stderr)


def test_help_needs_neither_the_library_nor_onnxruntime(command: Command) -> None:
    assert command("--help", SPARAMX_LIBRARY="/nonexistent.so").returncode == DONE
    script = "import sys\nfrom sparamx_onnx import cli\ncli.run(['convert', '--help'])\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    assert not {"numpy", "onnx", "onnx_ir", "onnxruntime", "rich"} & set(result.stdout.split())
