"""The source distribution, the wheel that is built from it, and that this wheel needs nothing but its dependencies."""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.ops import library

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Folders of Python sources, and what they are installed as.
ROOMS = {
    "src/sparamx_onnx": "sparamx_onnx",
    "ops": "sparamx_onnx/ops",
    "graph_passes": "sparamx_onnx/graph_passes",
    "models": "sparamx_onnx/models",
}
# With SPARAMX_TEST_FULL the wheel has the library, compiled anew, and is tried in fresh environments, which have its
# dependencies only; otherwise it is tried in this one, without what the extras bring.
FULL = bool(os.environ.get("SPARAMX_TEST_FULL"))
ENVIRONMENTS = ["newest", "onnxruntime==1.21.1"] if FULL else ["this"]
LARGEST_WHEEL = 2_000_000 if FULL else 400_000


def build(kind: str, source: Path, output: Path, **settings: str) -> Path:
    """Calls the build backend that pyproject.toml names, as pip does."""
    call = (
        "import json, sys; from scikit_build_core import build as backend;"
        "print(getattr(backend, f'build_{sys.argv[1]}')(sys.argv[2], json.loads(sys.argv[3])))"
    )
    command = [sys.executable, "-c", call, kind, str(output), json.dumps(settings)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


def files_below(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths}


def requirement_name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match
    return match[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"sparamx_onnx-{PROJECT['version']}"


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it becomes: the Python part alone or, with SPARAMX_TEST_FULL, all of it."""
    settings = {"wheel.cmake": "false"}
    if FULL:
        settings = {"cmake.define.SPARAMX_ORT_DOWNLOAD_DIR": str(ROOT / "build" / "onnxruntime-headers")}
    return build("wheel", source, tmp_path_factory.mktemp("wheel"), **settings)


def test_the_source_distribution_has_all_that_is_needed_to_build_and_test(source: Path) -> None:
    for folder in ("benchmarks", "cmake", "cpp", "docs", "examples", "tests", *ROOMS):
        assert files_below(ROOT / folder) == files_below(source / folder), folder
    for name in ("CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    assert not {".ci", "build", ".venv"} & {path.name for path in source.iterdir()}


def test_the_wheel_has_the_modules_and_nothing_of_tests_or_checkpoints(wheel: Path) -> None:
    modules = {
        f"{package}/{name}"
        for folder, package in ROOMS.items()
        for name in files_below(ROOT / folder)
        if name.endswith(".py") or name == "py.typed"
    }
    information = f"sparamx_onnx-{PROJECT['version']}.dist-info"
    written = {f"{information}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    binary = {"sparamx_onnx/lib/libsparamx_onnx.so"} if FULL else set()
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == modules | written | {f"{information}/licenses/LICENSE"} | binary
        assert archive.read(f"{information}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"sparamx-onnx = sparamx_onnx.cli:main" in archive.read(f"{information}/entry_points.txt")
    assert wheel.stat().st_size < LARGEST_WHEEL


def test_the_metadata_say_what_the_package_is_and_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("sparamx-onnx", PROJECT["version"])
    assert metadata["Summary"] == PROJECT["description"]
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {requirement_name(line) for line in always} == {requirement_name(line) for line in PROJECT["dependencies"]}
    here = f"Programming Language :: Python :: {sys.version_info.major}.{sys.version_info.minor}"
    assert here in metadata.get_all("Classifier", [])


def linear(path: Path) -> Path:
    """y = gelu(x W + b), two thirds of W zero."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((96, 80), np.float32)
    weight[rng.random(weight.shape) < 2 / 3] = 0
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["s"], "linear"),
            helper.make_node("Gelu", ["s"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 80])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(rng.standard_normal(80, np.float32), "b")],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_wheel_converts_a_model_without_torch_and_compiler(wheel: Path, tmp_path: Path, environment: str) -> None:
    extras = {requirement_name(line) for lines in PROJECT["optional-dependencies"].values() for line in lines}
    variables = {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "SPARAMX_TEST"))}
    if environment == "this":
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "package")
        variables |= {"PYTHONPATH": str(tmp_path / "package"), "SPARAMX_LIBRARY": library.get_library_path()}
        python, version = sys.executable, importlib.metadata.version("onnxruntime")
    else:
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
        python = str(tmp_path / "venv" / "bin" / "python")
        wanted = [] if environment == "newest" else [environment]
        subprocess.run([python, "-m", "pip", "install", "--quiet", wheel, *wanted], check=True)
        code = "import importlib.metadata as m; print(m.version('onnxruntime'))"
        version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        if wanted:
            assert environment.endswith(version)

    # Importing what is None in sys.modules fails, as if it were not there.
    missing = sorted({name.replace("-", "_") for name in extras})
    run = f"import sys; sys.modules.update(dict.fromkeys({missing})); from sparamx_onnx.cli import main; main()"
    (tmp_path / "empty").mkdir()
    model, converted = linear(tmp_path / "m.onnx"), tmp_path / "m.sparse.onnx"
    for arguments in (["convert", model], ["verify", model, converted, "--json"], ["info"]):
        done = subprocess.run(
            [python, "-c", run, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=variables | {"PATH": str(tmp_path / "empty")},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), arguments
    assert version in done.stdout
    (node,) = onnx.load(converted, load_external_data=False).graph.node
    assert node.op_type == "SparseAMXMatMul"
