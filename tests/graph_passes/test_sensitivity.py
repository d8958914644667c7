"""Sparsity by sensitivity: what is measured, and that the zeros go where they harm least."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from sparamx_onnx.graph_passes import pipeline
from sparamx_onnx.graph_passes.allocate_sparsity import allocate, cost_curve
from sparamx_onnx.graph_passes.calibration import calibrate, layer_groups
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.sensitivity import OutputProbe
from sparamx_onnx.ops.errors import SparamxError

node = helper.make_node
K = 64


def _weight(k: int = K, n: int = K, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, k, n]).standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)


def _runs(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 40, K)).astype(np.float32)} for _ in range(count)]


def _rewritten(proto: onnx.ModelProto, **options: object) -> tuple[ir.Model, pipeline.Plan, ConvertOptions]:
    model = ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    chosen = ConvertOptions(**{"weights": "fp32", "calibrated": True, **options})  # type: ignore[arg-type]
    return model, pipeline.run(model, chosen, reading=pipeline.Reading.NOTHING), chosen


def test_curves() -> None:
    scores = np.random.default_rng(0).random((30, 50)).astype(np.float32)
    ordered = np.sort(scores, axis=None).astype(np.float64)
    curve = cost_curve(scores.copy())
    assert curve.shape == (51,)
    np.testing.assert_allclose(curve[[0, 1, 25, 50]], [0, ordered[:30].sum(), ordered[:750].sum(), ordered.sum()])
    assert (np.diff(curve, 2) >= -1e-9).all()


def test_allocation_is_the_best_of_all() -> None:
    """Against a search over all allocations in steps."""
    rng = np.random.default_rng(0)
    sizes = [100, 300, 200]
    curves = [cost_curve(np.square(rng.standard_normal(size)).astype(np.float32)) for size in sizes]
    damages = [1.0, 0.5, 4.0]
    found = allocate(curves, damages, sizes, 0.5)
    assert np.average(found, weights=sizes) == pytest.approx(0.5)
    assert found[2] < found[0] < found[1]
    grid = np.arange(51) / 50

    def damage(sparsities) -> float:
        return sum(
            d * np.interp(s, grid, curve) / np.interp(0.5, grid, curve)
            for d, s, curve in zip(damages, sparsities, curves, strict=True)
        )

    steps = np.arange(0.36, 0.641, 0.02)
    candidates = [(a, b, (0.5 * 600 - 100 * a - 300 * b) / 200) for a, b in itertools.product(steps, steps)]
    best = min(damage(c) for c in candidates if 0.35 <= c[2] <= 0.65)
    assert damage(found) <= best + 1e-9


def test_allocation_without_differences_is_uniform() -> None:
    curve = cost_curve(np.ones(1000, np.float32))
    assert np.mean(allocate([curve] * 4, [0.0] * 4, [1000] * 4, 0.3)) == pytest.approx(0.3)
    same = cost_curve(np.arange(1000, dtype=np.float32))
    np.testing.assert_allclose(allocate([same] * 4, [2.0] * 4, [1000] * 4, 0.3), 0.3, atol=0.02)


def _two_branches(make_model, outputs=("y",), dtype=np.float32) -> onnx.ModelProto:
    """One layer whose result is the model's, and one of which a hundredth is added."""
    nodes = [
        node("MatMul", ["x", "loud"], ["m0"]),
        node("Add", ["m0", "bias"], ["b0"]),
        node("Relu", ["b0"], ["r0"]),
        node("MatMul", ["x", "quiet"], ["m1"]),
        node("Mul", ["m1", "hundredth"], ["small"]),
        node("Add", ["r0", "small"], ["y"]),
    ]
    constants = {
        "loud": _weight(),
        "quiet": _weight(seed=1),
        "bias": np.full(K, 0.1, np.float32),
        "hundredth": np.array(0.01, np.float32),
    }
    constants = {name: array.astype(dtype) for name, array in constants.items()}
    element_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return make_model(nodes, {"x": ("b", "s", K)}, list(outputs), constants, element_type=element_type)


@pytest.mark.parametrize("outputs", [("y",), ("r0", "y", "m1")])
def test_damage_is_what_the_outputs_change_by(make_model, tmp_path, outputs) -> None:
    """The output that all layers lead to counts, with bias and activation function; results may be outputs too."""
    model, _, _ = _rewritten(_two_branches(make_model, outputs))
    groups, runs = layer_groups(model, lambda _: True), _runs(2)
    probe = OutputProbe(model, groups, dict(enumerate(runs)), tmp_path)
    measured = {}

    def visit(group, activations) -> None:
        for packed in group.weights:
            pruned = np.where(np.abs(packed.source()) < 0.1, 0, packed.source())
            measured[packed.weight.name] = probe.damage(group, packed, pruned, activations)

    calibrate(model, groups, runs, tmp_path, visit)
    for name, value in measured.items():
        expected = []
        for run in runs:
            weights = {"loud": _weight(), "quiet": _weight(seed=1)}
            y = np.maximum(run["x"] @ weights["loud"] + 0.1, 0) + 0.01 * (run["x"] @ weights["quiet"])
            weights[name] = np.where(np.abs(weights[name]) < 0.1, 0, weights[name])
            z = np.maximum(run["x"] @ weights["loud"] + 0.1, 0) + 0.01 * (run["x"] @ weights["quiet"])
            expected.append(np.square(z - y).sum() / np.square(y).sum())
        assert value == pytest.approx(np.mean(expected), rel=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_zeros_go_where_they_harm_least(make_model, tmp_path, method, dtype) -> None:
    proto = _two_branches(make_model, dtype=dtype)
    model, plan, options = _rewritten(proto, method=method, sparsity=0.5, allocation="sensitivity")
    runs = [{name: x.astype(dtype) for name, x in run.items()} for run in _runs()]
    pipeline.prune(model, plan, options, runs, tmp_path)
    for packed in [value.const_value for value in model.graph.initializers.values()]:
        if hasattr(packed, "pack"):
            packed.pack()
    by_name = {layer.weight: layer.sparsity for layer in plan}
    assert by_name["quiet"] > 0.6
    assert by_name["loud"] < 0.4
    assert np.mean(list(by_name.values())) == pytest.approx(0.5, abs=0.01)


def test_models_without_outputs_of_numbers(make_model, tmp_path) -> None:
    proto = make_model(
        [node("MatMul", ["x", "w"], ["m"]), node("ArgMax", ["m"], ["y"])], {"x": ("b", "s", K)}, [], {"w": _weight()}
    )
    proto.graph.output.append(helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None))
    model, plan, options = _rewritten(proto, allocation="sensitivity")
    with pytest.raises(SparamxError, match="no output of numbers"):
        pipeline.prune(model, plan, options, _runs(), tmp_path)
