"""Options, the choice of layers, and the figures of the plan."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from sparamx_onnx.graph_passes import measure, pipeline
from sparamx_onnx.graph_passes.options import ConvertOptions, Method
from sparamx_onnx.graph_passes.pipeline import Reading, run
from sparamx_onnx.graph_passes.plan import Action, Reason
from sparamx_onnx.graph_passes.prune_magnitude import prune_magnitude
from sparamx_onnx.ops import library, packing
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packing import Form, PackOptions, ScaleType, WeightType

node = helper.make_node
EXACT = 1e-5


def _stack(make_model, weights: dict[str, np.ndarray]):
    """Layers in a row, each followed by a function that no epilogue knows."""
    nodes, value = [], "x"
    for index, name in enumerate(weights):
        nodes += [node("MatMul", [value, name], [f"m{index}"]), node("Softsign", [f"m{index}"], [f"s{index}"])]
        value = f"s{index}"
    k = next(iter(weights.values())).shape[0]
    return make_model(nodes, {"x": (3, k)}, [value], weights)


def _x(k: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((3, k)).astype(np.float32)


# --- options --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    options = ConvertOptions()
    assert (options.method, options.weight_type) == (Method.AUTO, WeightType.BF16)
    assert not options.prunes
    assert options.target_sparsity is None
    assert ConvertOptions(method="magnitude").target_sparsity == 0.5
    assert ConvertOptions(method="magnitude", sparsity=0.7, weights="fp32", include="a").to_json() == {
        "method": "magnitude",
        "sparsity": 0.7,
        "pattern": None,
        "allocation": None,
        "calibrated": False,
        "weights": "fp32",
        "group_size": None,
        "scale_type": None,
        "include": ["a"],
        "exclude": [],
        "fuse_siblings": "auto",
        "attention": "keep",
    }


def test_defaults_of_int4() -> None:
    options = ConvertOptions(weights="int4")
    assert (options.group_size, options.scale_type) == (32, "int8")
    assert options.to_json()["group_size"] == 32
    assert options.to_json()["scale_type"] == "int8"
    assert options.pack_options == PackOptions(WeightType.INT4, scale_type=ScaleType.INT8, group_size=32)
    assert ConvertOptions(weights="int8").pack_options == PackOptions(WeightType.INT8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "optimal"}, "method must be one of auto, keep, magnitude, wanda, sparsegpt, not 'optimal'"),
        ({"method": "wanda"}, "The method wanda needs calibration inputs"),
        ({"allocation": "fair"}, "allocation must be one of uniform, sensitivity, not 'fair'"),
        ({"method": "magnitude", "pattern": "4:2"}, "'4:2' is no pattern"),
        ({"group_size": 32}, "Only int4 weights take a group size, not bf16 weights"),
        ({"weights": "int8", "group_size": 32}, "Only int4 weights take a group size, not int8 weights"),
        ({"weights": "int8", "scale_type": "fp16"}, "Only int4 weights take a scale type, not int8 weights"),
        ({"weights": "int4", "group_size": 48}, "group size must be one of 16, 32, 64, 128, 256, not 48"),
        ({"weights": "int4", "group_size": 0}, "not 0"),
        ({"weights": "int4", "scale_type": "bf16"}, "scale type must be one of int8, fp16, fp32, not 'bf16'"),
        ({"weights": "int4", "scale_type": "none"}, "int4 weights need scales; there are int8, fp16 and fp32"),
        ({"weights": "fp64"}, "weights must be one of fp32, bf16, int8, int4, not 'fp64'"),
        ({"attention": "slow"}, "attention must be one of keep, fast, packed, not 'slow'"),
        ({"sparsity": 0.5}, "method auto keeps the weights as they are, so it takes no sparsity"),
        ({"sparsity": 1.0, "method": "magnitude"}, "at least 0 and below 1, not 1"),
        ({"sparsity": -0.5, "method": "magnitude"}, "at least 0 and below 1"),
        ({"include": ("(",)}, r"include pattern '\(' is no regular expression"),
        ({"exclude": ("a", "*")}, r"exclude pattern '\*' is no regular expression"),
    ],
)
def test_options_that_make_no_sense(options, sentence) -> None:
    with pytest.raises(SparamxError, match=sentence):
        ConvertOptions(**options)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["keep", "magnitude"])
def test_measured_figures_are_those_of_the_file(workbench, make_model, sparse, weights, method) -> None:
    # With fewer zeros than pruning wants: of others, the plan can only tell how many non-zeros there will be at most.
    matrices = {f"w{i}": sparse((128, 128), s) for i, s in enumerate((0.0, 0.02, 0.3, 0.4))}
    proto = _stack(make_model, matrices)
    planned = run(ir.from_proto(proto), ConvertOptions(method=method, weights=weights)).to_json()
    converted = workbench.convert(proto, method=method, weights=weights)
    written = converted.plan.to_json()
    if method == "magnitude":
        # Where pruning decides, the zeros that are there already are not counted before.
        for node in written["nodes"]:
            assert node.pop("sparsity_before") is not None
        for node in planned["nodes"]:
            assert node.pop("sparsity_before") is None
    assert written == planned
    assert json.loads(json.dumps(planned)) == planned
    for plan, matrix in zip(converted.plan, matrices.values(), strict=True):
        kept = np.count_nonzero(matrix)
        assert plan.nnz == (matrix.size // 2 if method == "magnitude" else kept)
        assert plan.sparsity == 1 - plan.nnz / matrix.size
        assert plan.bytes_before == matrix.nbytes
        assert plan.weight_type == weights
        assert plan.pruned == (method == "magnitude")
    dense = [plan.reason is Reason.PACKED_DENSE for plan in converted.plan]
    assert dense == ([True, True, False, False] if method == "keep" else [False] * 4)
    assert converted.plan.bytes_after == sum(plan.bytes_after for plan in converted.plan)


@pytest.mark.parametrize("method", ["keep", "magnitude"])
@pytest.mark.parametrize(
    "options",
    [{"weights": "int8"}, {"weights": "int4"}, {"weights": "int4", "group_size": 128, "scale_type": "fp32"}],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_quantized_weights(workbench, make_model, sparse, options, method) -> None:
    matrices = {f"w{i}": sparse((128, 128), s) for i, s in enumerate((0.0, 0.3, 0.9))}
    proto = _stack(make_model, matrices)
    planned = run(ir.from_proto(proto), ConvertOptions(method=method, **options)).to_json()
    converted = workbench.convert(proto, method=method, **options)
    assert converted.plan.to_json() == planned
    blobs = {i.name: numpy_helper.to_array(i) for i in onnx.load(converted.path).graph.initializer}
    for plan, matrix in zip(converted.plan, matrices.values(), strict=True):
        info = packing.describe(blobs[plan.packed])
        assert plan.weight_type == info.weight_type == options["weights"]
        assert plan.group_size == (info.group_size or None)
        assert (plan.nnz, plan.bytes_after) == (info.nnz, info.blob_bytes)
        assert (plan.reason is Reason.PACKED_DENSE) == (info.form is Form.DENSE)
        # Pruned first: what was zero, or became it, is zero still.
        wanted = prune_magnitude(matrix, 0.5) if method == "magnitude" else matrix
        assert not packing.unpack(blobs[plan.packed])[wanted == 0].any()
    if options["weights"] == "int4":
        expected = (options.get("group_size", 32), options.get("scale_type", "int8"))
        assert (info.group_size, info.scale_type) == expected
    again = run(ir.load(converted.path), ConvertOptions())
    assert [(n.weight_type, n.group_size) for n in again] == [(n.weight_type, n.group_size) for n in converted.plan]
    record = {p.key: p.value for p in converted.proto.metadata_props}
    assert json.loads(record[pipeline.OPTIONS_KEY])["group_size"] == converted.plan.nodes[0].group_size


def test_weights_that_cannot_be_quantized_are_named(workbench, make_model, sparse) -> None:
    w = sparse((128, 128), 0.0)
    w[3, 7] = np.nan
    with pytest.raises(SparamxError, match=r"^The weight 'w1' cannot be packed as int4: .*not finite"):
        workbench.convert(_stack(make_model, {"w0": sparse((128, 128), 0.0), "w1": w}), weights="int4")


def test_without_measuring_the_file_completes_the_plan(workbench, make_model, sparse) -> None:
    proto = _stack(make_model, {"w0": sparse((128, 128), 0.0), "w1": sparse((128, 128), 0.9)})
    model = ir.from_proto(proto)
    plan = run(model, ConvertOptions(), reading=Reading.NOTHING)
    assert [n.nnz for n in plan] == [None, None]
    assert plan.bytes_after is None
    assert plan.nodes[0].sparsity is None
    assert plan.nodes[0].action is Action.CONVERTED
    for value in model.graph.initializers.values():
        value.const_value.numpy()
    assert plan.to_json() == run(ir.from_proto(proto), ConvertOptions()).to_json()


def test_progress_counts_the_bytes_that_are_read(make_model, sparse) -> None:
    proto = _stack(make_model, {"w0": sparse((64, 96)), "w1": sparse((96, 64)), "w2": sparse((64, 64))})
    seen: list[tuple[int, int]] = []
    run(ir.from_proto(proto), ConvertOptions(), lambda done, total: seen.append((done, total)))
    total = 4 * (64 * 96 * 2 + 64 * 64)
    assert [t for _, t in seen] == [total] * 3
    assert [d for d, _ in seen] == [4 * 64 * 96, 8 * 64 * 96, total]


def test_pruning_by_magnitude_needs_no_reading(make_model, sparse, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the weight was read")

    monkeypatch.setattr(measure, "count_nonzero", fail)
    proto = _stack(make_model, {"w0": sparse((128, 128), 0.0)})
    (plan,) = run(ir.from_proto(proto), ConvertOptions(method="magnitude", sparsity=0.75))
    assert plan.nnz == 128 * 128 // 4


def test_zeros_beyond_what_pruning_wants_are_found_when_packing(workbench, make_model, sparse) -> None:
    w = sparse((128, 128), 0.95)
    proto = _stack(make_model, {"w": w})
    (planned,) = run(ir.from_proto(proto), ConvertOptions(method="magnitude"))
    (written,) = workbench.convert(proto, method="magnitude").plan
    assert planned.nnz == w.size // 2
    assert written.nnz == np.count_nonzero(w)


def test_the_summary(workbench, make_model, sparse) -> None:
    proto = _stack(make_model, {"w0": sparse((128, 128), 0.0), "w1": sparse((128, 128)), "w2": sparse((128, 128))})
    plan = workbench.convert(proto, exclude=["w2"]).plan
    assert plan.to_json()["summary"] == {
        "nodes": 3,
        "converted": 2,
        "left_alone": 1,
        "reasons": {"converted": 1, "packed_dense": 1, "excluded_by_user": 1},
        "bytes_before": 2 * 128 * 128 * 4,
        "bytes_after": plan.bytes_after,
        "attention_converted": 0,
    }
    assert [n.node for n in plan.left_alone] == ["m2"]
    assert len(plan) == 3


# --- the choice -----------------------------------------------------------------------------------------------------


def test_include_and_exclude(workbench, make_model, sparse) -> None:
    weights = {f"layer.{i}.weight": sparse((64, 64), seed=i) for i in range(4)}
    proto = _stack(make_model, weights)
    proto.graph.node[2].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'my.module', 'linear']")

    def taken(**options: list[str]) -> list[int]:
        plan = run(ir.from_proto(proto), ConvertOptions(**options))
        return [i for i, n in enumerate(plan) if n.action is not Action.LEFT_ALONE]

    assert taken() == [0, 1, 2, 3]
    assert taken(include=[r"layer\.[02]"]) == [0, 2]
    assert taken(include=["^m3$", "layer.0"]) == [0, 3]
    assert taken(exclude=["my.module"]) == [0, 2, 3]
    assert taken(include=["layer"], exclude=["m0", "weight$"]) == []
    plan = run(ir.from_proto(proto), ConvertOptions(include=["layer.0"], exclude=["layer.0"]))
    assert [n.reason for n in plan] == [Reason.EXCLUDED_BY_USER] + [Reason.NOT_INCLUDED_BY_USER] * 3
    assert "'" not in plan.nodes[1].detail
    assert plan.nodes[0].text == "An exclude pattern matches it. It is layer.0."


def test_nothing_to_convert_changes_nothing(make_model, sparse) -> None:
    proto = _stack(make_model, {"w": sparse((64, 64))})
    model = ir.from_proto(proto)
    run(model, ConvertOptions(exclude=["w"]))
    assert not model.metadata_props
    assert "com.sparamx" not in model.opset_imports
    assert [n.op_type for n in model.graph] == ["MatMul", "Softsign"]


def test_sparse_initializers_are_refused(make_model) -> None:
    proto = make_model([node("MatMul", ["x", "w"], ["y"])], {"x": (2, 4)}, ["y"], {})
    values = numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = numpy_helper.from_array(np.array([1, 6]), "w_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, (4, 4)))
    undefined = make_model([node("Neg", ["x"], ["y"])], {"x": (2, 4)}, ["z"], {})
    with pytest.raises(SparamxError, match=r"Nothing defines the output 'z' of the graph 'graph'"):
        pipeline.run(ir.from_proto(undefined), ConvertOptions())
    with pytest.raises(SparamxError, match=r"Nothing defines the value 'w' that the node 'y' reads"):
        run(ir.from_proto(proto), ConvertOptions())


def test_magnitude_spares_heads_unless_they_are_named(workbench, make_model, sparse) -> None:
    matrices = {"fc.weight": sparse((96, 128), 0.0), "lm_head.weight": sparse((128, 96), 0.0)}
    proto = _stack(make_model, matrices)
    spared = workbench.convert(proto, method="magnitude", sparsity=0.6)
    assert [n.pruned for n in spared.plan] == [True, False]
    assert spared.plan.nodes[1].prune_note == "It is the model's output head by its name."
    assert [n.nnz for n in spared.plan] == [96 * 128 - round(0.6 * 96 * 128), 96 * 128]
    named = workbench.convert(proto, method="magnitude", sparsity=0.6, include=["fc", "lm_head"])
    assert [n.pruned for n in named.plan] == [True, True]

    # The same numbers as ONNX Runtime computes with the weights pruned beforehand.
    for index, matrix in enumerate(matrices.values()):
        smallest = np.argsort(np.abs(matrix), axis=None)[: round(0.6 * matrix.size)]
        pruned = matrix.copy()
        pruned.reshape(-1)[smallest] = 0
        proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(pruned, list(matrices)[index]))
    named.original = proto
    assert named.error({"x": _x(96)}) <= EXACT


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_routers_stay_exact_unless_they_are_named(workbench, make_model, sparse, weights) -> None:
    nodes = [
        node("MatMul", ["x", "choice"], ["m"]),
        node("Softmax", ["m"], ["s"]),
        node("TopK", ["s", "two"], ["v", "i"]),
    ]
    initializers = {"choice": sparse((96, 8)), "two": np.array([2], np.int64)}
    proto = make_model(nodes, {"x": (3, 96)}, ["v"], initializers)
    converted = workbench.convert(proto, weights=weights)
    assert converted.plan.nodes[0].weight_type == "fp32"
    assert "experts" in converted.plan.nodes[0].text
    assert converted.error({"x": _x(96)}) <= EXACT
    named = workbench.convert(proto, name="named.onnx", weights=weights, include="choice")
    assert named.plan.nodes[0].weight_type == weights


@pytest.mark.parametrize("weights", [None, "int8"])
def test_angles_stay_exact_unless_they_are_named(workbench, make_model, sparse, weights) -> None:
    """Positions times frequencies: in bf16 the larger positions are others, and so are their angles."""
    nodes = [
        node("Unsqueeze", ["x", "axis"], ["p"]),
        node("MatMul", ["p", "frequencies"], ["a"]),
        node("Concat", ["a", "a"], ["twice"], axis=-1),
        node("Mul", ["twice", "turn"], ["angles"]),
        node("Cos", ["angles"], ["y"]),
    ]
    initializers = {
        "axis": np.array([1]),
        "frequencies": np.float32(100.0) ** -np.linspace(0, 1, 32, dtype=np.float32)[None],
        "turn": np.float32(0.5),
    }
    proto = make_model(nodes, {"x": ("positions",)}, ["y"], initializers)
    converted = workbench.convert(proto, weights=weights)
    assert converted.node("a").weight_type == "fp32"
    assert converted.node("a").text.endswith("It makes angles, so it stays fp32.")
    assert converted.error({"x": np.arange(1000, 1100, dtype=np.float32)}) <= EXACT
    named = workbench.convert(proto, name="named.onnx", weights=weights, include=["frequencies"])
    assert named.node("a").weight_type == (weights or "bf16")


def test_a_vocabulary_that_tokens_are_picked_from_is_no_router(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "head"], ["m"]), node("TopK", ["m", "two"], ["v", "i"])]
    initializers = {"head": sparse((32, 1025)), "two": np.array([2], np.int64)}
    converted = workbench.convert(make_model(nodes, {"x": (3, 32)}, ["v"], initializers), weights="bf16")
    assert converted.plan.nodes[0].weight_type == "bf16"


def test_the_same_weight_pruned_and_not(workbench, make_model, sparse) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["hidden"]),
        node("Softsign", ["hidden"], ["s"]),
        node("MatMul", ["s", "w"], ["out"], name="lm_head"),
    ]
    proto = make_model(nodes, {"x": (3, 64)}, ["out"], {"w": sparse((64, 64), 0.0)})
    converted = workbench.convert(proto, method="magnitude")
    assert [n.packed for n in converted.plan] == ["w.sparamx", "w.sparamx.2"]
    assert [n.nnz for n in converted.plan] == [2048, 4096]


def test_bf16_weights(workbench, make_model, sparse) -> None:
    converted = workbench.convert(_stack(make_model, {"w": sparse((256, 128)) / 16}), weights="bf16")
    assert 1e-6 < converted.error({"x": _x(256)}) <= 1e-2


@pytest.mark.parametrize("method", ["keep", "magnitude"])
def test_a_converted_model_can_be_serialized_in_memory(make_model, sparse, open_session, workbench, method) -> None:
    proto = _stack(make_model, {"w": sparse((64, 64), 0.2)})
    model = ir.from_proto(proto)
    run(model, ConvertOptions(method=method), reading=Reading.NOTHING)
    inline = open_session(ir.to_proto(model).SerializeToString()).run(None, {"x": _x(64)})[0]
    saved = open_session(workbench.convert(proto, method=method, weights="bf16").path).run(None, {"x": _x(64)})[0]
    np.testing.assert_array_equal(inline, saved)


def test_the_record_in_the_model(workbench, make_model, sparse) -> None:
    proto = _stack(make_model, {"w": sparse((64, 64))})
    converted = workbench.convert(proto, method="magnitude", weights="bf16", include=["w"])
    record = {p.key: p.value for p in converted.proto.metadata_props}
    assert record[pipeline.VERSION_KEY] == library.version()
    assert json.loads(record[pipeline.OPTIONS_KEY]) == {
        "method": "magnitude",
        "sparsity": 0.5,
        "pattern": None,
        "allocation": None,
        "calibrated": False,
        "weights": "bf16",
        "group_size": None,
        "scale_type": None,
        "include": ["w"],
        "exclude": [],
        "fuse_siblings": "auto",
        "attention": "keep",
    }
