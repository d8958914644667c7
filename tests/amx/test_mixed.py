"""Packed layers beside ONNX Runtime's own int8 products, which use AMX too and share the threads.

Nobody may disturb the other's tile configuration.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx.models import llama
from sparamx_onnx.ops import library, packing
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_MATMUL
from sparamx_onnx.ops.packing import PackOptions, WeightType

K, N = 256, 160
RUNS = 10_000 if os.environ.get("SPARAMX_TEST_FULL") else 1000
TYPES = (WeightType.INT8, WeightType.BF16, WeightType.INT4)
DIGEST = str(Path(__file__).with_name("inference_digest.py"))
Feeds = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A packed layer, an integer product of ONNX Runtime (u8 x s8), a packed layer of another type, and so on."""

    model: onnx.ModelProto
    blobs: list[np.ndarray]
    dense: np.ndarray

    def feeds(self, rows: int) -> Feeds:
        rng = np.random.default_rng(rows)
        return {
            "x": rng.standard_normal((rows, K), np.float32),
            "codes": rng.integers(0, 256, (rows, K)).astype(np.uint8),
        }

    def expected(self, feeds: Feeds) -> list[np.ndarray]:
        integer = feeds["codes"].astype(np.int32) @ self.dense.astype(np.int32)
        return [y for blob in self.blobs for y in (packing.matmul(blob, feeds["x"])[0], integer)]


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    rng = np.random.default_rng(11)
    blobs = [
        packing.pack(rng.standard_normal((K, N), np.float32) * (rng.random((K, N)) < 0.5), PackOptions(weight_type))
        for weight_type in TYPES
    ]
    dense = rng.integers(-128, 128, (K, N)).astype(np.int8)
    nodes, outputs, initializers = [], [], [numpy_helper.from_array(dense, "dense")]
    for index, blob in enumerate(blobs):
        initializers.append(numpy_helper.from_array(blob, f"w{index}"))
        attributes = {"domain": DOMAIN, "K": K, "N": N}
        nodes += [
            helper.make_node(SPARSE_AMX_MATMUL.name, ["x", f"w{index}"], [f"packed{index}"], **attributes),
            helper.make_node("MatMulInteger", ["codes", "dense"], [f"integer{index}"]),
        ]
        outputs += [
            helper.make_tensor_value_info(f"packed{index}", TensorProto.FLOAT, None),
            helper.make_tensor_value_info(f"integer{index}", TensorProto.INT32, None),
        ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", K]),
        helper.make_tensor_value_info("codes", TensorProto.UINT8, ["m", K]),
    ]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return Mixture(helper.make_model(graph, ir_version=10, opset_imports=imports), blobs, dense)


@pytest.fixture(scope="module")
def folder(mixture: Mixture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with their inputs: a small decoder with weights of each type, and mixtures of several heights."""
    folder = tmp_path_factory.mktemp("models")
    original = folder / "dense" / "llama.onnx"
    original.parent.mkdir()
    llama.export(original, llama.TINY)
    feeds = llama.feeds(llama.TINY, batch=2, sequence=20, past=3)
    for weight_type in TYPES:
        name = f"llama-{weight_type.value}"
        sparamx_onnx.convert(original, folder / f"{name}.onnx", method="magnitude", weights=weight_type.value)
        np.savez(folder / f"{name}.npz", **feeds)
    for rows in (1, 16, 40):
        onnx.save(mixture.model, folder / f"mixed-{rows}.onnx")
        np.savez(folder / f"mixed-{rows}.npz", **mixture.feeds(rows))
    return folder


@pytest.mark.parametrize("threads", [1, 2])
def test_a_thousand_runs_beside_integer_products_of_onnxruntime(mixture: Mixture, threads: int) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    library.register(options)
    model = mixture.model.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = [mixture.feeds(rows) for rows in (1, 5, 16, 33, 40)]  # each with tiles of its own shape
    expected = [mixture.expected(one) for one in feeds]
    for run in range(RUNS):
        outputs = session.run(None, feeds[run % len(feeds)])
        for output, right in zip(outputs, expected[run % len(feeds)], strict=True):
            assert output.tobytes() == right.tobytes(), f"run {run}"


# Runs a program and tells how many TDPBUSD the emulator executed: ONNX Runtime's product, and no kernel of ours has it.
_COUNTING = """
import ctypes, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
counts = (ctypes.c_uint64 * 96)()
ctypes.CDLL(None).amx_emulator_read_counts(counts)
print(sum(counts[10 * 8 : 11 * 8]), file=sys.stderr)
"""


def test_a_session_computes_the_same_bits_emulated(run_python, folder: Path, cpu_flags: set[str]) -> None:
    arguments = (DIGEST, library.get_library_path(), str(folder))
    emulated, by_everyone = (run_python(pretend, "-c", _COUNTING, *arguments) for pretend in ("full", "everyone"))
    assert emulated.returncode == 0, emulated.stderr
    names = [line.split()[0] for line in emulated.stdout.splitlines()]
    assert names == ["llama-bf16", "llama-int4", "llama-int8", "mixed-1", "mixed-16", "mixed-40"]
    assert by_everyone.stdout == emulated.stdout
    # ONNX Runtime asks CPUID for AMX, which the emulator cannot change.
    assert int(emulated.stderr) == 0
    assert (int(by_everyone.stderr) > 0) is ("amx_int8" in cpu_flags)
    if {"amx_tile", "amx_bf16", "amx_int8"} <= cpu_flags:
        assert run_python(None, *arguments).stdout == emulated.stdout
