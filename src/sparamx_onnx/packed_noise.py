"""A packed cache full of noise, to measure with: made by the operator itself, one row for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_ATTENTION
from sparamx_onnx.ops.packed_cache import CacheLayout
from sparamx_onnx.session import InferenceSession


def noise_row(layout: CacheLayout, tokens: int, capacity: int) -> npt.NDArray[np.uint8]:
    """The row of a packed cache that holds random keys and values.

    Args:
        layout: How it is pruned, and the sizes of a head.
        tokens: Keys in it.
        capacity: Keys that it has room for.

    Returns:
        uint8 [bytes].
    """
    row: npt.NDArray[np.uint8] = np.zeros(layout.row_bytes(capacity), np.uint8)
    if not tokens:
        return row
    rng = np.random.default_rng(0)
    feeds: dict[str, npt.NDArray[Any]] = {
        "query": np.zeros((1, tokens, layout.key_size), np.float32),
        "key": rng.uniform(-1, 1, (1, tokens, layout.key_size)).astype(np.float32),
        "value": rng.uniform(-1, 1, (1, tokens, layout.value_size)).astype(np.float32),
        "past_cache": row[None, None],
        "seqlens_k": np.array([tokens - 1], np.int32),
        "total_sequence_length": np.array([tokens], np.int32),
    }
    session = InferenceSession(_one_head(layout, list(feeds)))
    present: npt.NDArray[np.uint8] = session.run(["present_cache"], feeds)[0]
    filled: npt.NDArray[np.uint8] = present[0, 0]
    return filled


def _one_head(layout: CacheLayout, inputs: list[str]) -> bytes:
    """Attention of one head, in which a token sees itself alone: nothing but the packing takes time."""
    options = layout.options
    node = helper.make_node(
        SPARSE_AMX_ATTENTION.name,
        inputs,
        ["output", "", "", "present_cache"],
        domain=DOMAIN,
        roles=",".join(inputs[1:]),
        num_heads=1,
        kv_num_heads=1,
        local_window_size=1,
        cache="packed",
        k_sparsity=options.k_sparsity,
        v_sparsity=options.v_sparsity,
        sink=options.sink,
        recent=options.recent,
    )
    types = {
        "past_cache": TensorProto.UINT8,
        "seqlens_k": TensorProto.INT32,
        "total_sequence_length": TensorProto.INT32,
    }
    graph = helper.make_graph(
        [node],
        "noise",
        [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None) for name in inputs],
        [helper.make_tensor_value_info("present_cache", TensorProto.UINT8, None)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    serialized: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return serialized
