"""What a plan says of sizes before anything is packed, from whole weights and from samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from sparamx_onnx.graph_passes import mapped
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.pipeline import Reading, run
from sparamx_onnx.graph_passes.plan import NodePlan

K, N = 2304, 2048


@pytest.fixture(scope="module")
def uneven() -> np.ndarray:
    """[K, N] float32, with more zeros the further to the lower right."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((K, N), np.float32)
    share = 0.2 + 0.6 * (np.arange(K)[:, None] / K + np.arange(N) / N) / 2
    w[rng.random((K, N), np.float32) < share] = 0.0
    return w


def _plan(make_model, w: np.ndarray, transposed: bool, reading: Reading, **options: object) -> NodePlan:
    weight = np.ascontiguousarray(w.T) if transposed else w
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=int(transposed))
    proto = make_model([node], {"x": ("m", w.shape[0])}, ["y"], {"w": weight})
    (plan,) = run(ir.from_proto(proto), ConvertOptions(**options), reading=reading)
    return plan


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"weights": "fp32"},
        {},
        {"weights": "int8"},
        {"weights": "int4"},
        {"weights": "int4", "group_size": 256, "method": "magnitude", "sparsity": 0.7},
    ],
    ids=["fp32", "bf16", "int8", "int4", "pruned"],
)
def test_a_sample_tells_the_size(make_model, uneven, transposed, options) -> None:
    exact, sampled = (_plan(make_model, uneven, transposed, how, **options) for how in (Reading.ALL, Reading.SAMPLES))
    assert (exact.estimated, sampled.estimated) == (False, True)
    assert sampled.sparsity == pytest.approx(exact.sparsity, abs=0.02)
    assert sampled.sparsity_before == pytest.approx(exact.sparsity_before, abs=0.02)
    assert sampled.bytes_after == pytest.approx(exact.bytes_after, rel=0.03)
    assert sampled.action is exact.action


def test_what_is_small_or_pruned_to_a_sparsity_is_not_sampled(make_model, uneven) -> None:
    small = _plan(make_model, uneven[:1024], False, Reading.SAMPLES)
    assert not small.estimated
    assert small.nnz == np.count_nonzero(uneven[:1024])
    pruned = _plan(make_model, uneven, False, Reading.SAMPLES, method="magnitude", sparsity=0.9)
    assert (pruned.estimated, pruned.nnz) == (False, K * N - round(0.9 * K * N))


def test_a_sample_reads_little_of_the_file(make_model, tmp_path: Path, monkeypatch) -> None:
    proto = make_model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ("m", 8192)}, ["y"], {})
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[8192, 4096])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w")
    proto.graph.initializer.append(tensor)
    onnx.save(proto, tmp_path / "m.onnx")
    with (tmp_path / "w").open("wb") as file:
        file.truncate(8192 * 4096 * 4)
    views: list[np.ndarray] = []
    read = mapped.read_tensor

    def keep(tensor: ir.TensorProtocol) -> np.ndarray:
        views.append(read(tensor))
        return views[-1]

    monkeypatch.setattr("sparamx_onnx.graph_passes.fold_constants.read_tensor", keep)
    (plan,) = run(ir.load(tmp_path / "m.onnx"), ConvertOptions(), reading=Reading.SAMPLES)
    assert plan.nnz == 0
    assert plan.estimated
    (view,) = views
    address = view.__array_interface__["data"][0]
    smaps = Path("/proc/self/smaps").read_text().splitlines()
    (start,) = [i for i, line in enumerate(smaps) if line.startswith(f"{address & -4096:x}-")]
    resident = next(int(line.split()[1]) for line in smaps[start:] if line.startswith("Rss:"))
    # Pages around those that are read are mapped with them where they are in memory anyway.
    assert 1024 < resident < view.nbytes / 1024 * 0.6
