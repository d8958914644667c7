"""The C++ examples do what they say."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx.models import llama
from sparamx_onnx.models.llama import TINY

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
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `cmake --install` makes of a build; the library in it is the tested one, not one that is compiled anew."""
    build, prefix = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("prefix")
    subprocess.run(["cmake", "-S", ROOT, "-B", build, f"-DSPARAMX_ORT_DOWNLOAD_DIR={HEADERS}"], check=True)
    shutil.copy(sparamx_onnx.get_library_path(), build)
    subprocess.run(["cmake", "--install", build, "--prefix", prefix], check=True)
    return prefix


@pytest.fixture(scope="module")
def library(installed: Path) -> Path:
    return installed / "lib" / "libsparamx_onnx.so"


@pytest.fixture(scope="module")
def examples(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the C++ examples, built outside of this checkout, linked with the ONNX Runtime of this Python."""
    build = tmp_path_factory.mktemp("cpp")
    shutil.copytree(installed / "share" / "doc" / "sparamx_onnx" / "examples" / "cpp", build / "source")
    (runtime,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    # The Python package has no name for the linker.
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (build / name).symlink_to(runtime)
    options = [
        f"-DCMAKE_PREFIX_PATH={installed}",
        f"-DONNXRUNTIME_LIBRARY={build / 'libonnxruntime.so'}",
        f"-DSPARAMX_ORT_DOWNLOAD_DIR={HEADERS}",
    ]
    subprocess.run(["cmake", "-S", build / "source", "-B", build, *options], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    return build


def run(examples: Path, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["env", f"LD_LIBRARY_PATH={examples}", examples / name, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_run_model_gets_what_python_gets(examples: Path, library: Path, converted: Path) -> None:
    done = run(examples, "run_model", converted, library)
    assert done.returncode == 0, done.stderr
    expected = sparamx_onnx.InferenceSession(converted).run(None, {"x": np.full((4, 96), 0.5, np.float32)})[0]
    name, _, rest = done.stdout.partition(" [ 4 40 ] sum ")
    assert name == "y"
    assert float(rest) == pytest.approx(float(expected.sum(dtype=np.float64)), abs=1e-5)


def test_run_model_passes_on_what_goes_wrong(examples: Path, converted: Path) -> None:
    done = run(examples, "run_model", converted, "/nonexistent.so")
    assert done.returncode == 1
    assert done.stderr.startswith("run_model: ")


def test_generate_continues_a_text_as_python_does(examples: Path, library: Path, tmp_path: Path) -> None:
    llama.export(tmp_path / "llama.onnx", TINY)
    model = Path(sparamx_onnx.convert(tmp_path / "llama.onnx", weights="bf16").output or "")
    prompt, count = [5, 9, 77, 30], 24
    done = run(examples, "generate", model, library, str(count), *map(str, prompt))
    assert done.returncode == 0, done.stderr
    tokens = [int(token) for token in done.stdout.split()]
    assert tokens == greedy(model, prompt, count)
    assert len(set(tokens)) > 2


def greedy(model: Path, prompt: list[int], count: int) -> list[int]:
    """Token by token with a cache, as the example does it."""
    session = sparamx_onnx.InferenceSession(model)
    names = [value.name for value in session.get_outputs()]
    inputs, new, tokens = llama.feeds(TINY, batch=1, sequence=1, past=0), prompt, list[int]()
    for _ in range(count):
        length = len(prompt) + len(tokens)
        inputs["input_ids"] = np.array([new], np.int64)
        inputs["attention_mask"] = np.ones((1, length), np.int64)
        inputs["position_ids"] = np.arange(length - len(new), length, dtype=np.int64)[None]
        outputs = dict(zip(names, session.run(names, inputs), strict=True))
        new = [int(outputs.pop("logits")[0, -1].argmax())]
        tokens += new
        inputs |= {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return tokens


def test_generate_says_what_it_cannot_run(examples: Path, library: Path, converted: Path) -> None:
    done = run(examples, "generate", converted, library, "3", "1")
    assert done.returncode == 1
    assert done.stderr == "generate: the model has an input that this program does not know: x\n"
    assert run(examples, "generate", converted).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["3", "1", "word"], "TOKEN 2 must be a whole number of 64 bits, not 'word'"),
        (["3", "15x"], "TOKEN 1 must be a whole number of 64 bits, not '15x'"),
        (["3", "1" * 30], f"TOKEN 1 must be a whole number of 64 bits, not '{'1' * 30}'"),
        (["", "1"], "NEW_TOKENS must be a whole number of 64 bits, not ''"),
    ],
)
def test_generate_says_which_argument_is_no_number(
    examples: Path, library: Path, converted: Path, arguments: list[str], sentence: str
) -> None:
    done = run(examples, "generate", converted, library, *arguments)
    assert done.returncode == 1
    assert done.stderr == f"generate: {sentence}\n"
