"""What the README says under "Use" works as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx.models import genai_llama
from sparamx_onnx.models.llama import LlamaShape

ROOT = Path(__file__).resolve().parents[2]
SHAPE = LlamaShape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=96, vocab=304, positions=128)


def blocks(heading: str, language: str) -> list[str]:
    """The code blocks of a language below a bold heading, up to the next heading."""
    readme = (ROOT / "README.md").read_text()
    text = re.split(r"^(?:\*\*|## )", readme.partition(f"\n**{heading}**")[2], flags=re.MULTILINE)[0]
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert found, heading
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader of the README might stand: in the checkout, with an environment in which the package is."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in (("python", ""), ("sparamx-onnx", "-m sparamx_onnx")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    for name in ("examples", "cmake"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def decoder(folder: Path) -> Path:
    """decoder.sparse.onnx"""
    genai_llama.export(folder / "dense", SHAPE, sparsity=0.5)
    converted = sparamx_onnx.convert(folder / "dense" / "model.onnx", folder / "decoder.sparse.onnx", attention="fast")
    return Path(converted.output or "")


def shell(folder: Path, script: str, **variables: str) -> str:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    done = subprocess.run(
        ["sh", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def model(folder: Path) -> Path:
    """model.onnx"""
    weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_commands(folder: Path, model: Path) -> None:
    inputs = folder / "inputs"
    inputs.mkdir()
    np.savez(inputs / "typical.npz", x=np.random.default_rng(1).standard_normal((80, 64), np.float32))
    section = (ROOT / "README.md").read_text().partition("\n## Use\n")[2]
    script = section.partition("```sh\n")[2].partition("```")[0]
    commands = [line.partition("#")[0].strip() for line in script.splitlines()]
    assert {command.split()[1] for command in commands} == {"inspect", "convert", "verify", "bench", "info"}
    for command in commands:
        assert shell(folder, command), command
    assert {path.name for path in folder.glob("*.onnx")} == {"model.onnx", "model.sparse.onnx", "pruned.onnx"}
    assert (folder / "r.html").exists()


def test_python(folder: Path, model: Path, decoder: Path) -> None:
    check = 'import numpy as np; print(session.run(None, {"x": np.ones((1, 64), np.float32)})[0].shape, len(answer))'
    convert_and_register, generate = blocks("Python", "python")
    program = f"{convert_and_register}\nkept = session\n{generate}\nsession = kept\n{check}"
    (folder / "program.py").write_text(program)
    assert shell(folder, "python program.py") == "(1, 64) 20\n"


def test_onnxruntime_genai(folder: Path, built: Path) -> None:
    shutil.copytree(built, folder / "llama")
    (script,) = blocks("onnxruntime-genai", "sh")
    assert "\nOnce upon a time" in shell(folder, script)


def test_onnxruntime_extensions(folder: Path) -> None:
    (script,) = blocks("onnxruntime-extensions", "sh")
    assert float(shell(folder, script).splitlines()[-1]) > 0.4


def test_cpp(folder: Path, decoder: Path) -> None:
    # What the build of the package has found, if it is there; otherwise the examples look for it themselves.
    headers = [ROOT / "build" / "onnxruntime-headers" / way for way in ("archive/include", "debian/usr/include")]
    name = "ONNXRUNTIME_INCLUDE_DIR"
    found = [str(path) for path in headers if path.is_dir()]
    variables = {} if name in os.environ or not found else {name: found[0]}
    (script,) = blocks("C++", "sh")
    printed = shell(folder, script, **variables)
    [expected] = sparamx_onnx.DecoderSession(decoder).generate([[1, 15, 27]], 20)
    assert printed.splitlines()[-1] == " ".join(map(str, expected))
