"""Inputs made for models that nobody gave inputs for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.feeds import Feed, check_inputs, is_decoder, plan_feeds, read_calibration, read_npz
from sparamx_onnx.ops.errors import SparamxError

I64, F32 = TensorProto.INT64, TensorProto.FLOAT
Inputs = list[tuple[str, int, list[int | str | None]]]

BERT: Inputs = [(name, I64, ["batch", "sequence"]) for name in ("input_ids", "attention_mask", "token_type_ids")]
DECODER: Inputs = [
    ("input_ids", I64, ["batch_size", "sequence_length"]),
    ("attention_mask", I64, ["batch_size", "past_sequence_length + sequence_length"]),
    ("position_ids", I64, ["batch_size", "sequence_length"]),
    ("past_key_values.0.key", F32, ["batch_size", 2, "past_sequence_length", 8]),
    ("past_key_values.0.value", F32, ["batch_size", 2, "past_sequence_length", 8]),
]


def _model(inputs: Inputs, nodes: list[onnx.NodeProto] | None = None, vocabulary: int = 30) -> ir.Model:
    graph = helper.make_graph(
        nodes or [helper.make_node("Identity", [inputs[0][0]], ["y"])],
        "g",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info("y", inputs[0][1], None)],
        [numpy_helper.from_array(np.zeros((vocabulary, 4), np.float32), "table")],
    )
    return ir.from_proto(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]))


def test_an_encoder_gets_ids_ones_and_zeros() -> None:
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["cast"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "cast"], ["y"]),
    ]
    made = plan_feeds(_model(BERT, nodes), batch=3, length=50).make()
    assert {name: array.shape for name, array in made.items()} == {name: (3, 50) for name, _, _ in BERT}
    assert {array.dtype for array in made.values()} == {np.dtype(np.int64)}
    # Every id finds its row in the table, which the Cast between them must not hide.
    assert 0 <= made["input_ids"].min() < made["input_ids"].max() < 30
    assert made["input_ids"].max() > 20
    assert (made["attention_mask"] == 1).all()
    assert (made["token_type_ids"] == 0).all()


def test_a_cache_with_an_open_head_takes_its_size_from_the_attention_that_reads_it() -> None:
    inputs: Inputs = [
        ("input_ids", I64, ["batch", "sequence"]),
        ("query", F32, ["batch", "sequence", 24]),
        ("past_key_values.0.key", F32, ["batch", 2, "past_sequence_length", None]),
    ]
    attention = helper.make_node(
        "Attend", ["query", "past_key_values.0.key"], ["attended"], domain="com.example", num_heads=3
    )
    model = _model(inputs, [attention, helper.make_node("Identity", ["input_ids"], ["y"])])
    model.graph[0].outputs[0].shape = ir.Shape(["batch", "sequence", 24])
    assert plan_feeds(model, past=5).make()["past_key_values.0.key"].shape == (1, 2, 5, 8)


def test_an_attribute_of_a_wrong_type_is_named() -> None:
    model = _model(BERT, [helper.make_node("Gather", ["table", "input_ids"], ["y"], "lookup", axis=0.0)])
    with pytest.raises(SparamxError, match="'axis' of the Gather node 'lookup' is of type FLOAT"):
        plan_feeds(model)


def test_ids_of_an_unknown_table_stay_tiny() -> None:
    assert plan_feeds(_model(BERT), length=100).make()["input_ids"].max() == 1


def test_a_decode_step_has_one_token_after_its_past() -> None:
    model = _model(DECODER)
    assert is_decoder(model)
    plan = plan_feeds(model, batch=2, length=1, past=7)
    made = plan.make()
    assert (plan.batch, plan.length, plan.past) == (2, 1, 7)
    assert made["input_ids"].shape == (2, 1)
    assert made["attention_mask"].shape == (2, 8)
    assert made["position_ids"].tolist() == [[7], [7]]
    assert made["past_key_values.0.key"].shape == (2, 2, 7, 8)
    assert made["past_key_values.0.key"].dtype == np.float32
    assert not np.array_equal(made["past_key_values.0.key"], made["past_key_values.0.value"])


def test_axes_without_telling_names_are_told_by_their_place() -> None:
    inputs: Inputs = [
        ("input_ids", I64, ["s0", "s1"]),
        ("attention_mask", I64, ["s0", "s7"]),
        ("past_key_values_0_key", F32, ["s0", 2, "s9", 8]),
        ("past_key_values_0_value", F32, [None, 2, None, 8]),
    ]
    made = plan_feeds(_model(inputs), batch=2, length=3, past=5).make()
    assert [array.shape for array in made.values()] == [(2, 3), (2, 8), (2, 2, 5, 8), (2, 2, 5, 8)]


def test_what_the_model_fixes_wins_and_the_others_follow() -> None:
    inputs: Inputs = [
        ("attention_mask", I64, ["batch", "total"]),
        ("input_ids", I64, [4, 6]),
        ("past_key_values.0.key", F32, [4, 2, 10, 8]),
    ]
    plan = plan_feeds(_model(inputs), length=1, past=3)
    assert (plan.batch, plan.length, plan.past) == (4, 6, 10)
    assert plan.make()["attention_mask"].shape == (4, 16)
    with pytest.raises(SparamxError, match="'input_ids' has a fixed batch of 4, not 2"):
        plan_feeds(_model(inputs), batch=2)


def test_lengths_of_grouped_attention_and_flags() -> None:
    inputs: Inputs = [
        ("past_key_values.0.key", F32, ["b", 2, "p", 8]),
        ("input_ids", I64, ["b", "t"]),
        ("seqlens_k", TensorProto.INT32, ["b"]),
        ("total_sequence_length", TensorProto.INT32, []),
        ("use_cache_branch", TensorProto.BOOL, [1]),
    ]
    made = plan_feeds(_model(inputs), batch=2, length=3, past=4).make()
    assert made["seqlens_k"].tolist() == [6, 6]
    assert made["total_sequence_length"] == 7
    assert made["use_cache_branch"].tolist() == [True]


def test_plain_floats_and_images() -> None:
    inputs: Inputs = [
        ("x", F32, ["batch", 4096]),
        ("pixel_values", TensorProto.FLOAT16, ["batch", "num_channels", "height", "width"]),
        ("mask4", F32, ["batch", 1, "l", "l"]),
    ]
    plan = plan_feeds(_model(inputs), batch=2, length=5)
    made = plan.make()
    assert made["x"].shape == (2, 4096)
    assert abs(made["x"].std() - 1) < 0.1
    assert made["pixel_values"].shape == (2, 3, 224, 224)
    assert made["pixel_values"].dtype == np.float16
    assert made["mask4"].shape == (2, 1, 5, 5)
    assert not made["mask4"].any()
    assert plan.past is None


def test_the_same_seed_gives_the_same_arrays_also_from_json() -> None:
    plan = plan_feeds(_model(DECODER), length=4, past=4)
    first, again, other = plan.make(1), plan.make(1), plan.make(2)
    for feed in plan.feeds:
        copy = Feed(**{**json.loads(json.dumps(dataclasses.asdict(feed))), "shape": feed.shape})
        assert np.array_equal(first[feed.name], again[feed.name])
        assert np.array_equal(first[feed.name], copy.make(1))
    assert not np.array_equal(first["past_key_values.0.key"], other["past_key_values.0.key"])


def test_old_models_list_initializers_among_their_inputs() -> None:
    model = _model([("x", F32, ["n", 4]), ("table", F32, [30, 4])])
    assert [feed.name for feed in plan_feeds(model).feeds] == ["x"]


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (TensorProto.STRING, ["n"], "type string"),
        (TensorProto.BFLOAT16, ["n"], "type bfloat16"),
        (TensorProto.COMPLEX64, ["n"], "type complex64"),
        (TensorProto.UNDEFINED, ["n"], "no type"),
        (F32, None, "no declared shape"),
    ],
)
def test_what_cannot_be_made_up_is_named(kind: int, shape: list[int | str | None] | None, message: str) -> None:
    with pytest.raises(SparamxError, match=f"input 'text' has {message}"):
        plan_feeds(_model([("text", kind, shape)]))  # type: ignore[list-item]


def test_a_packed_cache_is_left_empty() -> None:
    inputs: Inputs = [
        ("input_ids", I64, ["batch", "tokens"]),
        ("past_key_values.0.cache", TensorProto.UINT8, ["batch", 2, "past_cache_bytes"]),
        ("mask", I64, ["batch", "tokens + 2"]),
    ]
    made = plan_feeds(_model(inputs), batch=3, length=4).make()
    assert made["past_key_values.0.cache"].shape == (3, 2, 0)
    assert made["mask"].shape == (3, 6)
    with pytest.raises(SparamxError, match=r"'past_key_values\.0\.cache' is a packed cache"):
        plan_feeds(_model(inputs), past=1)


def test_arrays_with_different_numbers_of_calibration_runs(tmp_path: Path) -> None:
    model = _model([("x", F32, ["n", 4]), ("z", F32, ["n", 4])])
    np.savez(tmp_path / "runs.npz", x=np.zeros((3, 2, 4), np.float32), z=np.zeros((2, 2, 4), np.float32))
    with pytest.raises(SparamxError, match="its arrays hold different numbers of runs"):
        read_calibration(tmp_path / "runs.npz", model)


def test_inputs_from_a_file(tmp_path: Path) -> None:
    model = _model(BERT)
    arrays = {name: np.ones((2, 3), np.int64) for name, _, _ in BERT}
    np.savez(tmp_path / "good.npz", extra=np.zeros(3), **arrays)
    assert {name: array.shape for name, array in read_npz(tmp_path / "good.npz", model).items()} == dict.fromkeys(
        arrays, (2, 3)
    )
    np.save(tmp_path / "bare.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:300])
    for name in ("bare.npy", "text.npz", "cut.npz"):
        with pytest.raises(SparamxError, match=f"{name}: not a file of arrays"):
            read_npz(tmp_path / name, model)
    with pytest.raises(SparamxError, match=r"missing\.npz: cannot be read: No such file"):
        read_npz(tmp_path / "missing.npz", model)


def test_inputs_that_do_not_fit_are_named() -> None:
    model = _model([("x", F32, ["n", 4])])
    with pytest.raises(SparamxError, match="given: has no array for input 'x'"):
        check_inputs({"y": np.zeros((1, 4), np.float32)}, model, "given")
    with pytest.raises(SparamxError, match="input 'x' is float64, the model wants float32"):
        check_inputs({"x": np.zeros((1, 4))}, model, "given")
    with pytest.raises(SparamxError, match="input 'x' has 1 axes, the model wants 2"):
        check_inputs({"x": np.zeros(4, np.float32)}, model, "given")
    with pytest.raises(SparamxError, match=r"input 'x' has the shape \[2, 3\], the model wants \[n, 4\]"):
        check_inputs({"x": np.zeros((2, 3), np.float32)}, model, "given")
