"""Calibration: every layer group sees what enters it in the model as it is by then, and nothing is held for long."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sparamx_onnx.graph_passes import calibration as module
from sparamx_onnx.graph_passes import pipeline, write
from sparamx_onnx.graph_passes.calibration import calibrate, layer_groups
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.prune_sparsegpt import SparseGpt
from sparamx_onnx.graph_passes.prune_wanda import Wanda
from sparamx_onnx.graph_passes.taken_branches import with_taken_branches
from sparamx_onnx.ops import packing
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.session import InferenceSession

node = helper.make_node
K = 64  # smaller layers count as heads, which pruning spares


def _weight(k: int = K, n: int = K, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, k, n]).standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)


def _runs(count: int = 3, k: int = K, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2, 3 + index, k)).astype(np.float32)} for index in range(count)]


def _chain(make_model, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Layers in a row, each followed by a function that no epilogue knows."""
    nodes, value = [], "x"
    for index, name in enumerate(weights):
        nodes += [node("MatMul", [value, name], [f"m{index}"]), node("Softsign", [f"m{index}"], [f"s{index}"])]
        value = f"s{index}"
    return make_model(nodes, {"x": ("b", "s", K)}, [value], weights)


def _rewritten(proto: onnx.ModelProto, **options: object) -> tuple[ir.Model, pipeline.Plan, ConvertOptions]:
    model = ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    chosen = ConvertOptions(**{"weights": "fp32", "calibrated": True, **options})  # type: ignore[arg-type]
    return model, pipeline.run(model, chosen, reading=pipeline.Reading.NOTHING), chosen


def _seen(proto: onnx.ModelProto, runs: list[dict[str, np.ndarray]], folder: Path) -> dict[str, list[np.ndarray]]:
    """What calibration shows of each group's input, run by run, while nothing is pruned."""
    model, _, _ = _rewritten(proto)
    seen: dict[str, list[np.ndarray]] = {}

    def visit(group, activations) -> None:
        seen[group.x.name] = [activations.of_run(index) for index in range(len(runs))]

    calibrate(model, layer_groups(model, lambda _: True), runs, folder, visit)
    assert not [path for path in folder.iterdir() if path.suffix == ".npy"]
    return seen


def _check_seen(proto: onnx.ModelProto, runs: list[dict[str, np.ndarray]], folder: Path, names: set[str]) -> None:
    """Compares what is seen with the values in the original model, which are made its outputs."""
    seen = _seen(proto, runs, folder)
    assert set(seen) == names
    inputs = {value.name for value in proto.graph.input}
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names - inputs)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    for index, run in enumerate(runs):
        expected = dict(zip(sorted(names - inputs), session.run(sorted(names - inputs), run), strict=True)) | run
        for name in names:
            np.testing.assert_allclose(seen[name][index], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_branches_and_values_that_are_needed_much_later(make_model, tmp_path) -> None:
    """As in a transformer: three layers share an input, two results meet, and the input comes back at the end."""
    nodes = [
        node("Mul", ["x", "x"], ["scaled"]),
        node("MatMul", ["scaled", "q"], ["mq"]),
        node("Softsign", ["mq"], ["sq"]),
        node("MatMul", ["scaled", "k"], ["mk"]),
        node("MatMul", ["scaled", "v"], ["mv"]),
        node("Mul", ["sq", "mk"], ["qk"]),
        node("Add", ["qk", "mv"], ["mixed"]),
        node("MatMul", ["mixed", "o"], ["mo"]),
        node("Add", ["mo", "x"], ["residual"]),
        node("MatMul", ["residual", "up"], ["mu"]),
        node("Add", ["mu", "bias"], ["biased"]),
        node("Relu", ["biased"], ["hidden"]),
        node("MatMul", ["hidden", "down"], ["md"]),
        node("Add", ["md", "residual"], ["last"]),
        node("Add", ["last", "scaled"], ["y"]),
    ]
    weights = {name: _weight(seed=seed) for seed, name in enumerate("qkvo")}
    weights |= {"up": _weight(K, 2 * K), "bias": np.ones(2 * K, np.float32), "down": _weight(2 * K, K)}
    proto = make_model(nodes, {"x": ("b", "s", K)}, ["y"], weights)
    _check_seen(proto, _runs(), tmp_path, {"scaled", "mixed", "residual", "hidden"})


def test_constants_bodies_and_functions(make_model, tmp_path) -> None:
    """Values computed from constants, bodies that read values and constants from outside, and model-local functions."""
    then = helper.make_graph(
        [node("Add", ["first", "shift"], ["a"]), node("Mul", ["a", "x"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph([node("Identity", ["first"], ["e"])], "else", [], [then.output[0]])
    other.output[0].CopyFrom(helper.make_tensor_value_info("e", TensorProto.FLOAT, None))
    double = helper.make_function(
        "local", "Double", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    nodes = [
        node("Constant", [], ["half"], value_float=0.5),
        node("Cast", ["narrow"], ["wide"], to=TensorProto.FLOAT),
        node("Mul", ["wide", "half"], ["shift"]),
        node("Add", ["x", "shift"], ["start"]),
        node("MatMul", ["start", "w0"], ["m0"]),
        node("Softsign", ["m0"], ["first"]),
        node("ReduceSum", ["first"], ["sum"], keepdims=0),
        node("Greater", ["sum", "half"], ["condition"]),
        node("If", ["condition"], ["chosen"], then_branch=then, else_branch=other),
        node("MatMul", ["chosen", "w1"], ["m1"]),
        node("Double", ["m1"], ["doubled"], domain="local"),
        node("Mul", ["doubled", "half"], ["second"]),
        node("MatMul", ["second", "w2"], ["y"]),
    ]
    constants = {"narrow": np.full(K, 0.25, np.float16), **{f"w{i}": _weight(seed=i) for i in range(3)}}
    proto = make_model(nodes, {"x": ("b", "s", K)}, ["y"], constants, functions=[double])
    runs = [*_runs(), {"x": -_runs(1)[0]["x"]}]
    _check_seen(proto, runs, tmp_path, {"start", "chosen", "second"})


def test_old_models_and_external_weights(make_model, workbench, tmp_path) -> None:
    proto = _chain(make_model, {f"w{index}": _weight(seed=index) for index in range(3)})
    folder = tmp_path / "cut"
    folder.mkdir()
    old = onnx.ModelProto.FromString(proto.SerializeToString())
    old.ir_version = 3
    old.graph.input.extend(
        helper.make_tensor_value_info(value.name, value.data_type, value.dims) for value in old.graph.initializer
    )
    assert set(_seen(old, _runs(), folder)) == {"x", "s0", "s1"}
    model = ir.load(workbench.save_external(proto))
    pipeline.run(model, ConvertOptions(weights="fp32", calibrated=True), reading=pipeline.Reading.NOTHING)
    shapes = []
    calibrate(
        model,
        layer_groups(model, lambda _: True),
        _runs(),
        folder,
        lambda group, activations: shapes.append(activations.of_run(2).shape),
    )
    assert shapes == [(2, 5, K)] * 3


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_later_layers_see_earlier_ones_pruned(make_model, tmp_path, method) -> None:
    """The pruned weights are those that NumPy gets layer by layer, and not those from the unpruned model's values."""
    weights = {f"w{index}": _weight(seed=index) for index in range(3)}
    proto, runs = _chain(make_model, weights), _runs(4)
    model, plan, options = _rewritten(proto, method=method, sparsity=0.6)
    pipeline.prune(model, plan, options, runs, tmp_path)
    write.save(model, tmp_path / "out.onnx")
    saved = ir.load(tmp_path / "out.onnx")
    kind = Wanda if method == "wanda" else SparseGpt
    by_pruned, by_dense = ([run["x"].reshape(-1, K) for run in runs] for _ in range(2))
    for name, w in weights.items():
        blob = saved.graph.initializers[f"{name}.sparamx"].const_value.numpy()
        actual = packing.unpack(blob)
        expected = np.asarray(kind(by_pruned, K).prune(w, 0.6, None))
        # Products of single precision: a few choices between nearly equal costs may differ.
        assert np.mean((actual == 0) == (expected == 0)) > 0.995
        other = np.asarray(kind(by_dense, K).prune(w, 0.6, None))
        if name != "w0":
            assert np.mean((actual == 0) == (other == 0)) < 0.99
        by_pruned = [_softsign(x @ actual) for x in by_pruned]
        by_dense = [_softsign(x @ w) for x in by_dense]
    for done in plan:
        assert done.error is not None
        assert 0 < done.error < 1
        assert done.sparsity == pytest.approx(0.6, abs=0.01)


def _softsign(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.abs(x))


def test_layers_with_one_input_are_visited_together_and_shared_weights_once(make_model, tmp_path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "v"], ["b"]),
        node("Mul", ["a", "b"], ["ab"]),
        node("MatMul", ["ab", "w"], ["c"]),
        node("MatMul", ["c", "v"], ["y"]),
    ]
    model, _, _ = _rewritten(make_model(nodes, {"x": ("b", "s", K)}, ["y"], {"w": _weight(), "v": _weight(seed=1)}))
    groups = layer_groups(model, lambda _: True)
    assert [(group.x.name, [weight.weight.name for weight in group.weights]) for group in groups] == [("x", ["w", "v"])]


def test_padding_is_left_out(make_model, tmp_path) -> None:
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["b", "s"])
    nodes = [
        node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["kept", "last"], ["column"]),
        node("Add", ["x", "column"], ["marked"]),
        node("MatMul", ["marked", "w"], ["m"]),
        node("Reshape", ["m", "flat"], ["rows"]),
        node("MatMul", ["rows", "v"], ["y"]),
    ]
    constants = {"last": np.array([2]), "flat": np.array([-1, K]), "w": _weight(), "v": _weight(seed=1)}
    proto = make_model(nodes, {"x": ("b", "s", K)}, ["y"], constants, extra_inputs=[mask])
    model, _, _ = _rewritten(proto)
    rows = np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32)
    rows[1, 2] = np.nan  # what padding makes of a row is nobody's business
    runs = [{"x": rows, "attention_mask": np.array([[1, 1, 1], [1, 1, 0]])}]
    seen = []
    calibrate(
        model, layer_groups(model, lambda _: True), runs, tmp_path, lambda _, rows: seen.append(np.concatenate([*rows]))
    )
    np.testing.assert_allclose(seen[0], rows.reshape(-1, K)[:5] + 1)
    assert seen[1].shape == (5, K)


def test_the_mask_of_a_model_with_a_cache_ends_with_the_new_tokens() -> None:
    mask = np.array([[1, 1, 0, 1], [0, 0, 1, 1]], np.bool_)
    kept = module._kept_rows(np.zeros((2, 2, K)), mask)
    np.testing.assert_array_equal(kept, [False, True, True, True])
    assert module._kept_rows(np.zeros((3, 2, K)), mask) is None
    assert module._kept_rows(np.zeros((2, 9, K)), mask) is None
    assert module._kept_rows(np.zeros((7, K)), mask) is None


def test_unusable_inputs(make_model, tmp_path) -> None:
    proto = _chain(make_model, {"w0": _weight(), "w1": _weight(seed=1)})

    def prune(runs) -> None:
        model, plan, options = _rewritten(proto, method="sparsegpt")
        pipeline.prune(model, plan, options, runs, tmp_path)

    with pytest.raises(SparamxError, match="There are no calibration inputs"):
        prune([])
    with pytest.raises(SparamxError, match="make 'x' infinite or undefined"):
        prune([{"x": np.full((1, 2, K), np.inf, np.float32)}])
    with pytest.raises(SparamxError, match="give 'x' the shape \\[1, 2, 65\\]; it must end in 64"):
        prune([{"x": np.zeros((1, 2, K + 1), np.float32)}])
    proto = make_model(
        [node("Add", ["x", "one"], ["a"]), node("MatMul", ["a", "w"], ["y"])],
        {"x": ("b", "s", K)},
        ["y"],
        {"one": np.ones(K, np.float32), "w": _weight()},
    )
    with pytest.raises(SparamxError, match="ONNX Runtime fails on the calibration inputs"):
        prune([{"x": np.zeros((1, 2, K + 1), np.float32)}])


def _merged(make_model) -> onnx.ModelProto:
    """A decoder with two branches, as optimum merges them: some weights are shared, each branch has one of its own.

    Both branches call their values alike, and a branch within a branch depends on the same input.
    """
    value = helper.make_tensor_value_info

    def branch(name: str, result: str) -> onnx.GraphProto:
        inner = [
            helper.make_graph(
                [node("Mul", ["r", which], ["deep"], f"{name}_{which}")], which, [], [value("deep", 1, None)]
            )
            for which in ("two", "one")
        ]
        nodes = [
            node("MatMul", ["start", "shared"], ["p"], f"{name}_shared"),
            node("Softsign", ["p"], ["q"], f"{name}_softsign"),
            node("MatMul", ["q", "own"], ["r"], f"{name}_own"),
            node("If", ["condition"], [result], f"{name}_if", then_branch=inner[0], else_branch=inner[1]),
            node("Identity", ["start"], ["t"], f"{name}_identity"),
        ]
        own = onnx.numpy_helper.from_array(_weight(seed=len(name)), "own")
        return helper.make_graph(nodes, name, [], [value(result, 1, None), value("t", 1, None)], [own])

    nodes = [
        node("Softsign", ["x"], ["start"]),
        node("If", ["condition"], ["chosen", "same"], then_branch=branch("then", "s"), else_branch=branch("else", "s")),
        node("Add", ["chosen", "same"], ["sum"]),
        node("MatMul", ["sum", "last"], ["m"]),
        node("Softsign", ["m"], ["y"]),
    ]
    constants = {"shared": _weight(seed=1), "last": _weight(seed=2), "one": np.float32(1), "two": np.float32(2)}
    inputs = [value("condition", TensorProto.BOOL, [])]
    return make_model(nodes, {"x": ("b", "s", K)}, ["y"], constants, extra_inputs=inputs)


@pytest.mark.parametrize("taken", [True, False])
def test_the_branch_that_is_taken_is_pruned(make_model, tmp_path, taken) -> None:
    model, plan, options = _rewritten(_merged(make_model))
    runs = [{**run, "condition": np.array(taken)} for run in _runs(4)]
    pipeline.prune(model, plan, options, runs, tmp_path)
    by_name = {layer.node: layer for layer in plan}
    mine, other = ("then", "else") if taken else ("else", "then")
    for name in (f"{mine}_shared", f"{mine}_own", f"{other}_shared", "m"):
        assert by_name[name].pruned, name
        assert 0 < by_name[name].error < 1
    assert not by_name[f"{other}_own"].pruned
    assert "branch" in by_name[f"{other}_own"].prune_note
    saved = write.save(model, tmp_path / "out.onnx")
    assert {layer.node: layer.sparsity for layer in plan} == {
        f"{mine}_shared": 0.5, f"{other}_shared": 0.5, f"{mine}_own": 0.5, "m": 0.5, f"{other}_own": 0.0,
    }  # fmt: skip
    # What calibration saw is what the model computes: the pruned weights fit its inputs better than magnitude's do.
    sessions = [InferenceSession(each) for each in (_merged(make_model).SerializeToString(), saved.model_path)]
    wanted, got = (each.run(None, runs[0])[0] for each in sessions)
    assert 0 < np.abs(wanted - got).max() < 0.5 * np.abs(wanted).max()


def _without_branches(choice: onnx.NodeProto) -> None:
    del choice.attribute[:]


def _with_numbers_for_branches(choice: onnx.NodeProto) -> None:
    for attribute in choice.attribute:
        attribute.CopyFrom(helper.make_attribute(attribute.name, 3))


def _with_a_result_too_few(choice: onnx.NodeProto) -> None:
    for attribute in choice.attribute:
        del attribute.g.output[1:]


@pytest.mark.parametrize("damage", [_without_branches, _with_numbers_for_branches, _with_a_result_too_few])
def test_a_choice_without_its_branches_is_left_to_onnxruntime(make_model, tmp_path, damage) -> None:
    proto = _merged(make_model)
    damage(proto.graph.node[1])
    model, plan, options = _rewritten(proto)
    runs = [{**run, "condition": np.array(True)} for run in _runs()]
    with pytest.raises(SparamxError, match="ONNX Runtime cannot run the model to calibrate"):
        pipeline.prune(model, plan, options, runs, tmp_path)


def test_a_condition_that_callers_need_not_give_is_not_looked_at(make_model, tmp_path) -> None:
    proto = _merged(make_model)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "condition"))
    model, plan, options = _rewritten(proto)
    pipeline.prune(model, plan, options, _runs(), tmp_path)
    assert {layer.node: layer.pruned for layer in plan if layer.node in ("m", "then_own")} == {
        "m": True,
        "then_own": False,
    }


def test_what_branches_see_is_what_runs(make_model, tmp_path) -> None:
    model, _, _ = _rewritten(_merged(make_model))
    runs = [{**run, "condition": np.array([True])} for run in _runs()]
    seen = {}

    def visit(group, activations) -> None:
        seen[tuple(weight.weight.name for weight in group.weights)] = activations.of_run(1)

    flat = with_taken_branches(model, runs)
    calibrate(flat, layer_groups(flat, lambda _: True), runs, tmp_path, visit)
    start = runs[1]["x"] / (1 + np.abs(runs[1]["x"]))
    product = start @ _weight(seed=1)
    hidden = product / (1 + np.abs(product))
    expected = {("shared",): start, ("own",): hidden, ("last",): 2 * (hidden @ _weight(seed=4)) + start}
    assert seen.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(seen[key], value, rtol=1e-4, atol=1e-5)
    # The model itself is as it was.
    assert [each.op_type for each in model.graph].count("If") == 1


def test_bodies_that_calibration_cannot_see_are_not_pruned(make_model, tmp_path) -> None:
    model, plan, options = _rewritten(_merged(make_model))
    runs = [{**run, "condition": np.array(index == 1)} for index, run in enumerate(_runs())]
    pipeline.prune(model, plan, options, runs, tmp_path)
    by_name = {layer.node: layer for layer in plan}
    assert by_name["m"].pruned
    assert by_name["m"].error is not None
    for name in ("then_shared", "then_own", "else_shared", "else_own"):
        assert not by_name[name].pruned
        assert "branch" in by_name[name].prune_note


def test_quantized_weights_are_quantized_anew_where_their_values_change(make_model, tmp_path) -> None:
    q = np.random.default_rng(0).integers(-127, 128, (K, K)).astype(np.int8)
    nodes = [node("DequantizeLinear", ["q", "scale"], ["w"], axis=1), node("MatMul", ["x", "w"], ["y"])]
    proto = make_model(nodes, {"x": ("b", "s", K)}, ["y"], {"q": q, "scale": np.full(K, 0.01, np.float32)})
    for method, keeps in (("wanda", True), ("sparsegpt", False)):
        model, plan, options = _rewritten(proto, method=method, weights=None)
        pipeline.prune(model, plan, options, _runs(4), tmp_path)
        write.save(model, tmp_path / "out.onnx")
        (layer,) = plan
        assert (layer.weight_type, layer.keeps_codes) == ("int8", keeps)
        assert layer.sparsity == pytest.approx(0.5, abs=0.03)
        (packed,) = [value.const_value for value in ir.load(tmp_path / "out.onnx").graph.initializers.values()]
        kept = packing.unpack(packed.numpy())
        mask = kept != 0
        changed = np.abs(kept - q * np.float32(0.01))[mask].max()
        assert (changed < 1e-5) == keeps


def test_nothing_to_prune_is_fine(make_model, tmp_path) -> None:
    proto = make_model([node("MatMul", ["x", "small"], ["y"])], {"x": ("b", K)}, ["y"], {"small": _weight(K, 8)})
    model, plan, options = _rewritten(proto)
    pipeline.prune(model, plan, options, _runs(), tmp_path)
    (layer,) = plan
    assert (layer.pruned, layer.error) == (False, None)


@pytest.mark.parametrize(
    ("factor", "weight", "why"),
    [(1e30, 1.0, "The squares of its inputs are beyond float32"), (1.0, np.inf, "It has infinite or undefined values")],
)
def test_numbers_that_cannot_be_used_are_refused(make_model, tmp_path, factor: float, weight: float, why: str) -> None:
    w0 = _weight()
    w0[3, 4] = weight
    model, plan, options = _rewritten(_chain(make_model, {"w0": w0}))
    runs = [{"x": run["x"] * np.float32(factor)} for run in _runs()]
    with pytest.raises(SparamxError, match=f"The weight 'w0' cannot be pruned: {why}"):
        pipeline.prune(model, plan, options, runs, tmp_path)


def test_a_sequence_between_two_layers_is_refused(make_model, tmp_path) -> None:
    nodes = [
        node("SequenceConstruct", ["x", "x"], ["sequence"]),
        node("MatMul", ["x", "w0"], ["m0"]),
        node("Softsign", ["m0"], ["s0"]),
        node("SequenceAt", ["sequence", "first"], ["x2"]),
        node("Add", ["s0", "x2"], ["a"]),
        node("MatMul", ["a", "w1"], ["y"]),
    ]
    constants = {"w0": _weight(), "w1": _weight(seed=1), "first": np.array(0)}
    model, plan, options = _rewritten(make_model(nodes, {"x": ("b", "s", K)}, ["y"], constants))
    with pytest.raises(SparamxError, match="'sequence' is no array of numbers"):
        pipeline.prune(model, plan, options, _runs(), tmp_path)


def test_activations_are_streamed(make_model, tmp_path) -> None:
    """Python holds the activations of one run, not of all runs or layers."""
    proto = _chain(make_model, {f"w{index}": _weight(seed=index) for index in range(4)})
    rng = np.random.default_rng(0)
    size, count = 1 << 20, 24  # bytes of one run's activations, and runs

    def runs():
        for _ in range(count):
            yield {"x": rng.standard_normal((1, size // (4 * K), K), np.float32)}

    model, plan, options = _rewritten(proto, method="wanda")
    tracemalloc.start()
    try:
        pipeline.prune(model, plan, options, runs(), tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * size


def test_memory_of_sparsegpt() -> None:
    """8 K^2 bytes for the second moments, and the weight with its changes: no inverse beside them."""
    k, n = 1024, 64
    x = np.random.default_rng(0).standard_normal((2048, k)).astype(np.float32)
    w = _weight(k, n)
    tracemalloc.start()
    try:
        SparseGpt([x], k).prune(w, 0.5, None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * k * k


def test_progress_counts_to_the_end(make_model, tmp_path) -> None:
    proto = _chain(make_model, {"w0": _weight(), "w1": _weight(seed=1)})
    for options, passes in (({}, 1), ({"allocation": "sensitivity"}, 2)):
        model, plan, chosen = _rewritten(proto, **options)
        reports: list[tuple[int, int]] = []
        pipeline.prune(model, plan, chosen, _runs(), tmp_path, lambda *report, to=reports: to.append(report))
        total = passes * 2 * (3 + 1)
        assert reports == [(done, total) for done in range(1, total + 1)]
