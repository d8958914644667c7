"""``convert`` from the outside: what it writes, what it refuses, and that it never harms what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import sparamx_onnx
from sparamx_onnx import cli

Save = Callable[..., Path]
Mlp = Callable[..., onnx.ModelProto]
Tree = Callable[[Path], dict[str, bytes]]
Command = Callable[..., object]

DONE, UNUSABLE = 0, 2


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs a command line that must be refused with one sentence and no change; returns the sentence."""
    monkeypatch.delenv("SPARAMX_DEBUG", raising=False)

    def run(*arguments: str | Path) -> str:
        before, names = tree(tmp_path), sorted(tmp_path.rglob("*"))
        assert cli.run([*map(str, arguments)]) == UNUSABLE
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(r"error: [^\n]+\.\n", captured.err)
        assert "Traceback" not in captured.err
        assert "bug" not in captured.err
        assert tree(tmp_path) == before
        assert sorted(tmp_path.rglob("*")) == names
        return captured.err

    return run


def _outputs(path: Path, x: np.ndarray) -> np.ndarray:
    return sparamx_onnx.InferenceSession(path).run(None, {"x": x})[0]


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((5, 48), np.float32)


# --- What it writes ---------------------------------------------------------------------------------------------------


def test_the_default_output_lies_beside_the_model_and_computes_the_same(
    dense: Path, x: np.ndarray, command: Command
) -> None:
    original = dense.read_bytes()
    result = command("convert", dense, "--weights", "fp32")
    assert (result.returncode, result.stderr) == (DONE, "")
    output = dense.with_name("dense.sparse.onnx")
    assert sorted(path.name for path in dense.parent.iterdir()) == [
        "dense.onnx", "dense.sparse.onnx", "dense.sparse.onnx.data",
    ]  # fmt: skip
    assert dense.read_bytes() == original
    assert "2 linear layers converted" in result.stdout
    assert str(output) in result.stdout
    expected = onnxruntime.InferenceSession(dense, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.abs(_outputs(output, x) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("options", "shown", "tolerance"),
    [
        (["--weights", "int8"], "int8", 0.15),
        (["--weights", "int4"], "int4/32", 0.6),
        (["--weights", "int4", "--group-size", "16", "--scale-type", "fp32"], "int4/16", 0.6),
    ],
)
def test_quantized_weights(
    dense: Path, options: list[str], shown: str, tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["convert", str(dense), *options, "--dry-run"]) == DONE
    planned = capsys.readouterr().out.split("\n\n")[0]
    assert cli.run(["convert", str(dense), *options]) == DONE
    assert capsys.readouterr().out.split("\n\n")[0] == planned
    assert [line.split("  ")[-1].strip() for line in planned.splitlines()[1:]] == [shown] * 2
    output = dense.with_name("dense.sparse.onnx")
    assert cli.run(["inspect", str(output)]) == DONE
    inspected = capsys.readouterr().out
    assert inspected.count(f"  {shown}\n") == 2
    assert f"weights {options[1]}" in inspected
    assert cli.run(["verify", str(dense), str(output), "--json"]) == DONE
    document = json.loads(capsys.readouterr().out)
    assert document["tolerance"] == tolerance
    assert 1e-4 < document["outputs"][0]["relative_error"] < tolerance / 3  # there are only two layers


def test_a_chosen_output_gets_its_data_beside_it(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    result = sparamx_onnx.convert(dense, tmp_path / "elsewhere" / "c.onnx")
    assert result.written
    assert result.output == str(tmp_path / "elsewhere" / "c.onnx")
    assert result.data == result.output + ".data"
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["c.onnx", "c.onnx.data"]
    assert result.bytes_before == dense.stat().st_size
    assert result.bytes_after == sum(path.stat().st_size for path in (tmp_path / "elsewhere").iterdir())
    model = onnx.load(result.output, load_external_data=False)
    locations = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert locations == {"c.onnx.data"}


def test_the_same_input_and_options_give_the_same_bytes(dense: Path, tmp_path: Path, tree: Tree) -> None:
    trees = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sparamx_onnx.convert(dense, tmp_path / name / "c.onnx", method="magnitude", sparsity=0.7)
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1]
    assert len(trees[0]) == 2


def test_external_data_and_a_relative_path(
    tmp_path: Path, mlp: Mlp, save: Save, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").mkdir()
    save(mlp(), tmp_path / "m.onnx", external="weights/all.bin")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["convert", "m.onnx", "--weights", "fp32"]) == DONE
    expected = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    actual = _outputs(Path("m.sparse.onnx"), x)
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    (tmp_path / "weights" / "all.bin").unlink()
    assert np.array_equal(_outputs(Path("m.sparse.onnx"), x), actual)  # the output needs nothing of the input


@pytest.mark.parametrize("sparsity", [None, 0.25, 0.9])
def test_pruning_by_magnitude_leaves_the_sparsity_that_was_asked_for_and_warns(
    tmp_path: Path, mlp: Mlp, save: Save, capsys: pytest.CaptureFixture[str], sparsity: float | None
) -> None:
    path = save(mlp(sizes=(100, 80, 60), sparsity=0.0), tmp_path / "m.onnx")
    option = [] if sparsity is None else ["--sparsity", str(sparsity)]
    assert cli.run(["convert", str(path), "--method", "magnitude", *option, "--include", ".", "--json"]) == DONE
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: ")
    assert "ruins" in captured.err
    for node in json.loads(captured.out)["nodes"]:
        assert node["sparsity"] == pytest.approx(0.5 if sparsity is None else sparsity, abs=0.01)


@pytest.mark.parametrize("method", ["auto", "keep"])
def test_without_magnitude_nothing_is_pruned_and_nobody_is_warned(
    dense: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert cli.run(["convert", str(dense), "--method", method, "--weights", "fp32", "--json"]) == DONE
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [node["sparsity"] for node in json.loads(captured.out)["nodes"]] == pytest.approx([0.5, 0.5], abs=1e-3)


def test_include_and_exclude(dense: Path, tmp_path: Path) -> None:
    for kind in ("include", "exclude"):
        plan = sparamx_onnx.convert(dense, tmp_path / f"{kind}.onnx", **{kind: ["^layer0"]}).plan
        reasons = {node.node: node.reason.value for node in plan}
        first, second = reasons["layer0/MatMul"], reasons["layer1/MatMul"]
        if kind == "include":
            assert (first, second) == ("converted", "not_included_by_user")
        else:
            assert (first, second) == ("excluded_by_user", "converted")


def test_a_second_conversion_can_take_what_the_first_one_left(dense: Path, tmp_path: Path, x: np.ndarray) -> None:
    sparamx_onnx.convert(dense, tmp_path / "first.onnx", include="^layer0", weights="fp32")
    result = sparamx_onnx.convert(tmp_path / "first.onnx", tmp_path / "second.onnx", weights="fp32")
    assert [node.reason.value for node in result.plan] == ["already_converted", "converted"]
    assert np.array_equal(
        _outputs(tmp_path / "second.onnx", x),
        _outputs(Path(str(sparamx_onnx.convert(dense, tmp_path / "both.onnx", weights="fp32").output)), x),
    )


def test_a_dry_run_says_what_would_happen_and_writes_nothing(
    dense: Path, tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    assert cli.run(["convert", str(dense), "--dry-run", "--json"]) == DONE
    planned = json.loads(capsys.readouterr().out)
    assert cli.run(["convert", str(dense), "--dry-run"]) == DONE
    assert "2 linear layers would be converted" in capsys.readouterr().out
    assert tree(tmp_path) == before
    assert (planned["written"], planned["dry_run"], planned["bytes_after"]) == (False, True, None)
    done = sparamx_onnx.convert(dense).to_dict()
    # The plan of a dry run is what happens, sizes included.
    assert planned["nodes"] == done["nodes"]
    assert planned["summary"] == done["summary"]


def test_force_replaces_both_files(dense: Path, x: np.ndarray) -> None:
    sparamx_onnx.convert(dense, weights="bf16")
    output = dense.with_name("dense.sparse.onnx")
    bf16 = _outputs(output, x)
    assert cli.run(["convert", str(dense), "--weights", "fp32", "--force"]) == DONE
    assert not np.array_equal(_outputs(output, x), bf16)
    assert len(list(dense.parent.iterdir())) == 3


# --- What it has nothing to do with -----------------------------------------------------------------------------------


@pytest.fixture
def nothing_written(tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a conversion that must end well and write nothing; returns what it printed."""

    def run(*arguments: str | Path) -> str:
        before = tree(tmp_path)
        assert cli.run(["convert", *map(str, arguments)]) == DONE
        assert tree(tmp_path) == before
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def test_a_model_without_linear_layers(
    tmp_path: Path, plain: onnx.ModelProto, save: Save, nothing_written: Callable[..., str]
) -> None:
    path = save(plain, tmp_path / "plain.onnx")
    assert "has no linear layer to convert; nothing was written" in nothing_written(path)
    document = json.loads(nothing_written(path, "--json"))
    assert (document["written"], document["output"], document["already_converted"]) == (False, None, False)


def test_a_model_that_is_converted_already(dense: Path, nothing_written: Callable[..., str]) -> None:
    sparamx_onnx.convert(dense)
    output = dense.with_name("dense.sparse.onnx")
    assert "is converted already; nothing was written" in nothing_written(output)
    document = json.loads(nothing_written(output, "--json"))
    assert (document["written"], document["output"], document["already_converted"]) == (False, None, True)


def test_a_model_of_which_everything_is_excluded(dense: Path, nothing_written: Callable[..., str]) -> None:
    printed = nothing_written(dense, "--exclude", ".")
    assert "excluded by user" in printed
    assert "nothing was written" in printed


# --- What it refuses --------------------------------------------------------------------------------------------------


def test_a_text_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "notes.onnx").write_text("just some notes\n")
    assert f"{tmp_path / 'notes.onnx'}: is a text file" in refused("convert", tmp_path / "notes.onnx")


def test_a_damaged_file(dense: Path, refused: Callable[..., str]) -> None:
    dense.write_bytes(dense.read_bytes()[:-100])
    assert f"{dense}: damaged" in refused("convert", dense)


def test_missing_external_data(tmp_path: Path, mlp: Mlp, save: Save, refused: Callable[..., str]) -> None:
    path = save(mlp(), tmp_path / "m.onnx", external="m.bin")
    (tmp_path / "m.bin").unlink()
    assert f"{tmp_path / 'm.bin'} is missing" in refused("convert", path)


def test_a_missing_model_and_a_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "missing.onnx: cannot be read: No such file" in refused("convert", tmp_path / "missing.onnx")
    assert "is a folder" in refused("convert", tmp_path)


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_an_output_that_is_a_folder(dense: Path, tmp_path: Path, refused: Callable[..., str], options: tuple) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "data.onnx.data").mkdir()
    assert f"{tmp_path / 'out'}: is a folder" in refused("convert", dense, "-o", tmp_path / "out", *options)
    assert "data.onnx.data: is a folder" in refused("convert", dense, "-o", tmp_path / "data.onnx", *options)


def test_folders_that_cannot_be_written_to(dense: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    # /proc takes no new files from anyone; nor does a file that stands where a folder should.
    assert "/proc/c.onnx: cannot be written" in refused("convert", dense, "-o", "/proc/c.onnx")
    assert "is not a folder" in refused("convert", dense, "-o", dense / "c.onnx")
    assert "does not exist" in refused("convert", dense, "-o", tmp_path / "missing" / "c.onnx")


@pytest.mark.parametrize("suffix", ["", ".data"])
def test_an_output_that_exists(dense: Path, refused: Callable[..., str], suffix: str) -> None:
    existing = dense.with_name("dense.sparse.onnx" + suffix)
    existing.write_bytes(b"precious")
    message = refused("convert", dense)
    assert f"{existing}: exists already" in message
    assert "--force" in message


def test_an_output_that_is_the_input(tmp_path: Path, mlp: Mlp, save: Save, refused: Callable[..., str]) -> None:
    path = save(mlp(), tmp_path / "m.onnx", external="c.onnx.data")
    (tmp_path / "link.onnx").symlink_to(path)
    for output in ("m.onnx", "link.onnx", "./m.onnx", "c.onnx"):
        assert "is a file of the input model" in refused("convert", path, "--force", "-o", f"{tmp_path}/{output}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "0.6"], "sparsity"),
        (["--sparsity", "0.6", "--method", "keep"], "sparsity"),
        (["--method", "magnitude", "--sparsity", "1"], "0<=x<1"),
        (["--method", "magnitude", "--sparsity", "-0.1"], "0<=x<1"),
        (["--method", "magnitude", "--sparsity", "nan"], "sparsity"),
        (["--method", "optimal"], "optimal"),
        (["--weights", "int2"], "int2"),
        (["--weights", "int8", "--group-size", "32"], "Only int4 weights take a group size"),
        (["--weights", "int4", "--group-size", "48"], "48"),
        (["--weights", "int4", "--scale-type", "bf16"], "bf16"),
        (["--scale-type", "fp16"], "Only int4 weights take a scale type"),
        (["--include", "("], "'('"),
        (["--exclude", "[a"], "'[a'"),
        (["second.onnx"], "second.onnx"),
    ],
)
def test_wrong_usage(dense: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", str(dense), *options]) == UNUSABLE
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not dense.with_name("dense.sparse.onnx").exists()


def test_a_library_that_is_missing(dense: Path, command: Command, tmp_path: Path, tree: Tree) -> None:
    before = tree(tmp_path)
    result = command("convert", dense, SPARAMX_LIBRARY="/nonexistent.so")
    assert result.returncode == UNUSABLE
    assert re.fullmatch(r"error: [^\n]*/nonexistent\.so[^\n]*\n", result.stderr)
    assert tree(tmp_path) == before


def test_a_full_disk(dense: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    # A limit on the size of files fails like a full disk does: in the middle of a write.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        message = refused("convert", dense)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "dense.sparse.onnx" in message
