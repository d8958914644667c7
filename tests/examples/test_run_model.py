"""The C++ example does what it says."""

import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "build" / "onnxruntime-headers"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A converted Gemm on x [batch, 96], half of its weights zero."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((96, 40), np.float32)
    weight[rng.random(weight.shape) < 0.5] = 0
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "linear")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 40])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(rng.standard_normal(40, np.float32), "b")],
    )
    path = tmp_path / "linear.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    output = tmp_path / "linear.sparse.onnx"
    assert sparamx_onnx.convert(path, output, method="keep").written
    return output


@pytest.fixture(scope="module")
def run_model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the C++ example, linked with the ONNX Runtime of this Python."""
    build = tmp_path_factory.mktemp("cpp")
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    # The Python package has no name for the linker.
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (build / name).symlink_to(library)
    options = [f"-DONNXRUNTIME_LIBRARY={build / 'libonnxruntime.so'}", f"-DSPARAMX_ORT_DOWNLOAD_DIR={HEADERS}"]
    subprocess.run(["cmake", "-S", ROOT / "examples" / "cpp", "-B", build, *options], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    return ["env", f"LD_LIBRARY_PATH={build}", str(build / "run_model")]


def test_the_cpp_example_gets_what_python_gets(run_model: list[str], converted: Path) -> None:
    command = [*run_model, str(converted), sparamx_onnx.get_library_path()]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = sparamx_onnx.InferenceSession(converted).run(None, {"x": np.full((4, 96), 0.5, np.float32)})[0]
    name, _, rest = printed.partition(" [ 4 40 ] sum ")
    assert name == "y"
    assert float(rest) == pytest.approx(float(expected.sum(dtype=np.float64)), abs=1e-5)


def test_the_cpp_example_passes_on_what_goes_wrong(run_model: list[str], converted: Path) -> None:
    done = subprocess.run([*run_model, str(converted), "/nonexistent.so"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("run_model: ")
