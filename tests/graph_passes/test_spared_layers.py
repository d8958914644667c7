"""Which layers pruning spares."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from sparamx_onnx.graph_passes.linear_layers import LinearLayerFinder
from sparamx_onnx.graph_passes.spared_layers import spared_because

node = helper.make_node


def _spared(proto, name: str = "m") -> str:
    found = {f.plan.node: f.layer for f in LinearLayerFinder(ir.from_proto(proto)).find()}
    return spared_because(found[name])


def _layer(make_model, sparse, *, k=128, n=128, weight="w", scope=None, after=(), outputs=("y",), extra=None):
    product = node("MatMul", ["x", weight], ["m"])
    if scope is not None:
        product.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{scope}', 'linear']")
    nodes = [product, *after]
    return make_model(nodes, {"x": (2, k)}, list(outputs), {weight: sparse((k, n)), **(extra or {})})


def test_a_layer_whose_largest_outputs_are_picked_is_spared(make_model, sparse) -> None:
    top = [node("TopK", ["m", "five"], ["y", "indices"])]
    proto = _layer(make_model, sparse, n=1100, after=top, extra={"five": np.array([5])})
    assert _spared(proto) == "Its largest outputs are picked."


def test_hidden_layers_are_not_spared(make_model, sparse) -> None:
    hidden = [node("Sqrt", ["m"], ["y"])]
    names = [
        "w",
        "val_12",
        "onnx::MatMul_77",
        "model.layers.3.mlp.gate_proj.weight",
        "encoder.layer.0.output.dense.weight",
        "model.layers.0.attn.qkv_proj.MatMul.weight",
        "decoder.embed_positions_projection.fc",
    ]
    for name in names:
        assert _spared(_layer(make_model, sparse, weight=name, after=hidden)) == "", name
    # A hidden state that is the model's output, and a projection that is cached.
    assert _spared(_layer(make_model, sparse, outputs=("m",))) == ""
    assert _spared(_layer(make_model, sparse, n=600, after=[node("Transpose", ["m"], ["y"])])) == ""


@pytest.mark.parametrize(
    ("weight", "scope", "why"),
    [
        ("lm_head.weight", None, "output head"),
        ("w", "lm_head", "output head"),
        ("lm_head.MatMul.weight", None, "output head"),
        ("classifier.weight", None, "output head"),
        ("w", "model.score", "output head"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("bert.embeddings.word_embeddings.weight", None, "embedding"),
        ("transformer.wte.weight", None, "embedding"),
        ("model.layers.0.block_sparse_moe.gate.weight", None, "experts"),
        ("w", "model.layers.0.mlp.gate", "experts"),
        ("model.layers.0.mlp.shared_expert_gate.weight", None, "experts"),
        ("layer.router.weight", None, "experts"),
    ],
)
def test_names_that_are_spared(make_model, sparse, weight, scope, why) -> None:
    assert why in _spared(_layer(make_model, sparse, weight=weight, scope=scope, after=[node("Sqrt", ["m"], ["y"])]))


def test_structures_that_are_spared(make_model, sparse) -> None:
    hidden = [node("Sqrt", ["m"], ["y"])]
    assert "small head (128 x 8)" in _spared(_layer(make_model, sparse, n=8, after=hidden))
    assert "small head (16 x 128)" in _spared(_layer(make_model, sparse, k=16, after=hidden))
    assert "output head" in _spared(_layer(make_model, sparse, n=512, outputs=("m",)))
    softmax = [node("Cast", ["m"], ["c"], to=1), node("Softmax", ["c"], ["y"])]
    assert "output head" in _spared(_layer(make_model, sparse, n=512, after=softmax))
    assert "angles" in _spared(_layer(make_model, sparse, after=[node("Sin", ["m"], ["y"])]))
    turned = [node("Add", ["m", "m"], ["s"]), node("Sin", ["s"], ["y"])]
    assert _spared(_layer(make_model, sparse, after=turned)) == ""
    routed = [node("Softmax", ["m"], ["s"]), node("TopK", ["s", "two"], ["y", "i"])]
    assert "experts" in _spared(_layer(make_model, sparse, after=routed, extra={"two": np.array([2], np.int64)}))
    tied = make_model(
        [node("Gather", ["e", "ids"], ["g"]), node("Transpose", ["e"], ["t"]), node("MatMul", ["g", "t"], ["m"])],
        {"x": (1,)},
        ["m"],
        {"e": sparse((300, 128)), "ids": np.array([[1, 2]])},
    )
    assert "embedding" in _spared(tied)
