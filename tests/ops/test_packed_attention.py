"""SparseAMXAttention with the packed cache in ONNX Runtime sessions: calls of conversations against the reference."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sparamx_onnx.ops import library
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_ATTENTION
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packed_cache import BLOCK, HEADER_BYTES, CacheLayout, CacheOptions
from sparamx_onnx.ops.reference_attention import AttentionOptions, sparse_amx_attention
from sparamx_onnx.ops.reference_packed_cache import from_bf16, pack_row, packed_attention, to_bf16, unpack_row

FULL = bool(os.environ.get("SPARAMX_TEST_FULL"))
SUPPORTED = [level["name"] for level in library.cpu_info()["levels"] if level["supported"]]
REFERENCE_ERROR = 1e-4  # relative to the largest number of the output

ELEMENT_TYPES = {
    np.float32: TensorProto.FLOAT,
    np.int32: TensorProto.INT32,
    np.int64: TensorProto.INT64,
    np.uint8: TensorProto.UINT8,
}

Inputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What stays the same from call to call: attributes, optional inputs, one buffer or growing ones."""

    options: AttentionOptions
    cache: CacheOptions
    size: int
    value_size: int
    batch: int
    optional: frozenset[str]
    capacity: int | None  # of the one buffer

    @property
    def layout(self) -> CacheLayout:
        return CacheLayout(self.cache, self.size, self.value_size)


def packed_session(
    options: AttentionOptions, pruning: CacheOptions, inputs: Inputs, threads: int = 2, **others: Any
) -> onnxruntime.InferenceSession:
    """One node with a packed cache."""
    roles = [name for name in inputs if name != "query"]
    attributes: dict[str, Any] = {
        name: int(value) if isinstance(value, bool) else value
        for name, value in {**vars(options), **vars(pruning)}.items()
    }
    node = helper.make_node(
        SPARSE_AMX_ATTENTION.name, ["query", *roles], others.pop("outputs", ["output", "", "", "present_cache"]),
        "attention", domain=DOMAIN, roles=",".join(roles), **({"cache": "packed"} | attributes | others),
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "graph",
        [
            helper.make_tensor_value_info(name, ELEMENT_TYPES[x.dtype.type], [f"{name}{i}" for i in range(x.ndim)])
            for name, x in inputs.items()
        ],
        [
            helper.make_tensor_value_info(
                name, TensorProto.UINT8 if name == "present_cache" else TensorProto.FLOAT, None
            )
            for name in node.output
            if name
        ],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4
    session_options.intra_op_num_threads = threads
    library.register(session_options)
    model = helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString()
    return onnxruntime.InferenceSession(model, session_options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: Inputs, one_buffer: bool) -> tuple[np.ndarray, np.ndarray]:
    """Output and cache; the same memory for past and present where asked for."""
    if not one_buffer:
        output, cache = session.run(["output", "present_cache"], inputs)
        return output, cache
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x.copy()) for name, x in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    binding.bind_ortvalue_output("present_cache", values["past_cache"])
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy().copy(), values["past_cache"].numpy().copy()


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max(initial=0.0) / max(1e-3, np.abs(expected).max(initial=0.0)))


def make_setting(rng: np.random.Generator) -> Setting:
    """Any sizes, any options."""
    kv_heads = int(rng.integers(1, 3))
    heads = kv_heads * int(rng.choice([1, 2, 3, 4, 7]))
    sparsities = [0.0, 0.3, 0.5, 0.75, 0.95]
    optional = {
        name
        for name in ("rotary", "position_ids", "attention_bias", "key_padding_mask", "head_sink", "side_by_side")
        if rng.integers(4) == 0
    }
    size = int(rng.choice([8, 16, 24, 40, 64, 80, 128]))
    value_size = size if "side_by_side" in optional else int(rng.choice([size, size, 20]))
    return Setting(
        AttentionOptions(
            heads,
            kv_heads,
            scale=float(rng.choice([0.0, 0.0, 0.3])),
            softcap=float(rng.choice([0.0, 0.0, 2.0])),
            local_window_size=-1 if "key_padding_mask" in optional else int(rng.choice([-1, -1, 1, 70, 200])),
            rotary_interleaved=bool(rng.integers(2)),
            smooth_softmax=bool(rng.integers(4) == 0),
        ),
        CacheOptions(
            float(rng.choice(sparsities)),
            float(rng.choice(sparsities)),
            sink=int(rng.choice([0, 0, 1, 70])),
            recent=int(rng.choice([0, 0, 1, 30, 64, 130])),
        ),
        size,
        value_size,
        int(rng.integers(1, 4)),
        frozenset(optional),
        int(rng.choice([650, 777])) if rng.integers(2) else None,
    )


def make_call(rng: np.random.Generator, s: Setting, cache: np.ndarray, before: np.ndarray, tokens: int) -> Inputs:
    """The inputs of a call after so many tokens of each entry; where all of them are zero, entries may be shorter."""
    heads, kv_heads = s.options.num_heads, s.options.kv_num_heads
    fresh = rng.integers(1, tokens + 1, s.batch) if not before.any() else np.full(s.batch, tokens)
    fresh[rng.integers(s.batch)] = tokens
    after = before + fresh
    total = int(after.max())

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    if "side_by_side" in s.optional:
        inputs: Inputs = {"query": normal(s.batch, tokens, (heads + 2 * kv_heads) * s.size)}
    else:
        inputs = {
            "query": normal(s.batch, tokens, heads * s.size),
            "key": normal(s.batch, tokens, kv_heads * s.size),
            "value": normal(s.batch, tokens, kv_heads * s.value_size),
        }
    inputs["past_cache"] = cache
    inputs["seqlens_k"] = (after - 1).astype(np.int32)
    inputs["total_sequence_length"] = np.array(total, np.int32)
    if s.optional & {"rotary", "position_ids"}:
        angles = np.random.default_rng(1).uniform(0, 6, (1000, s.size // 4))
        inputs["cos_cache"], inputs["sin_cache"] = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    if "position_ids" in s.optional:
        inputs["position_ids"] = rng.integers(0, 500, (s.batch, tokens))
    if "attention_bias" in s.optional:
        inputs["attention_bias"] = normal(int(rng.choice([1, s.batch])), int(rng.choice([1, heads])), tokens, total)
    if "key_padding_mask" in s.optional:
        inputs["key_padding_mask"] = rng.integers(0, 2, (s.batch, total)).astype(np.int32)
        inputs["key_padding_mask"][:, 0] = 1  # where all keys were hidden, fp32 would keep few digits beside the -10000
    if "head_sink" in s.optional:
        inputs["head_sink"] = normal(heads)
    return inputs


def conversation(seed: int) -> Iterator[tuple[Setting, Inputs, onnxruntime.InferenceSession, np.ndarray, np.ndarray]]:
    """Calls one after the other, each over the cache that the last one left: setting, inputs, session, results.

    The longest has 650 tokens.
    """
    rng = np.random.default_rng(seed)
    setting = make_setting(rng)
    row_bytes = 0 if setting.capacity is None else setting.layout.row_bytes(setting.capacity)
    # What a fresh buffer holds is of no interest.
    cache = rng.integers(0, 256, (setting.batch, setting.options.kv_num_heads, row_bytes)).astype(np.uint8)
    before = np.zeros(setting.batch, np.int64)
    session = None
    for tokens in [int(rng.choice([1, 20, 64, 150])), *map(int, rng.choice([1, 1, 1, 2, 9, 63, 100], 5))]:
        inputs = make_call(rng, setting, cache, before, tokens)
        session = session or packed_session(setting.options, setting.cache, inputs)
        output, cache = run(session, inputs, setting.capacity is not None)
        yield setting, inputs, session, output, cache
        before = inputs["seqlens_k"].astype(np.int64) + 1


def reference(setting: Setting, inputs: Inputs) -> Any:
    arguments: dict[str, Any] = dict(inputs)
    arguments["total_sequence_length"] = int(inputs["total_sequence_length"])
    return packed_attention(setting.options, setting.cache, **arguments)


@pytest.mark.parametrize("isa", SUPPORTED)
def test_conversations_agree_with_the_reference(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARAMX_ISA", isa)
    assert library.cpu_info()["packed_attention"] == PATHS[isa]
    for seed in range(200 if FULL else 8):
        for setting, inputs, _, output, cache in conversation(1000 * SUPPORTED.index(isa) + seed):
            expected = reference(setting, inputs)
            where = f"{isa}, seed {seed}: {setting} after {inputs['seqlens_k'] + 1}"
            valid = ~expected.is_padding
            assert _error(output[valid], expected.output[valid]) <= REFERENCE_ERROR, where
            assert not output[expected.is_padding].any(), where
            if setting.capacity is None:
                np.testing.assert_array_equal(cache, expected.present_cache, err_msg=where)
            else:  # what lies beyond an entry's tokens is of no interest
                for row, wanted in zip(
                    cache.reshape(-1, cache.shape[2]), expected.present_cache.reshape(-1, cache.shape[2]), strict=True
                ):
                    for part, other in zip(
                        unpack_row(setting.layout, row), unpack_row(setting.layout, wanted), strict=True
                    ):
                        np.testing.assert_array_equal(part, other, err_msg=where)


PATHS = {
    "scalar": "scalar",
    "avx2": "avx2",
    "avx512": "avx512",
    "avx512_vnni": "avx512",
    "avx512_vbmi2": "avx512_vbmi2",
    "avx512_bf16": "avx512_vbmi2",
    "amx": "amx",
}


def test_threads_do_not_change_a_bit() -> None:
    for seed in range(6):
        for setting, inputs, _, output, cache in conversation(10_000 + seed):
            for threads in (1, 5):
                session = packed_session(setting.options, setting.cache, inputs, threads)
                again, cache_again = run(session, inputs, setting.capacity is not None)
                assert again.tobytes() == output.tobytes()
                assert cache_again.tobytes() == cache.tobytes()


def _step(tokens: int = 1, past: int = 200, **cache: Any) -> tuple[AttentionOptions, CacheOptions, Inputs]:
    """A call on the cache that a prompt left."""
    options, cache_options = AttentionOptions(4, 2), CacheOptions(**({"k_sparsity": 0.3, "v_sparsity": 0.5} | cache))
    setting = Setting(options, cache_options, 16, 16, 2, frozenset(), None)
    rng = np.random.default_rng(4)
    empty = np.zeros((2, 2, 0), np.uint8)
    prompt = make_call(rng, setting, empty, np.zeros(2, np.int64), past)
    prompt["seqlens_k"][:] = past - 1
    _, filled = run(packed_session(options, cache_options, prompt), prompt, False)
    return options, cache_options, make_call(rng, setting, filled, np.full(2, past), tokens)


def test_the_cache_says_how_many_tokens_there_are() -> None:
    options, cache, inputs = _step(3)
    expected, expected_cache = run(packed_session(options, cache, inputs), inputs, False)
    del inputs["seqlens_k"], inputs["total_sequence_length"]
    output, present = run(packed_session(options, cache, inputs), inputs, False)
    assert output.tobytes() == expected.tobytes()
    assert present.tobytes() == expected_cache.tobytes()
    # A prompt without a past needs no lengths, either.
    del inputs["past_cache"]
    output, present = run(packed_session(options, cache, inputs), inputs, False)
    result = packed_attention(options, cache, **inputs)
    assert _error(output, result.output) <= REFERENCE_ERROR
    np.testing.assert_array_equal(present, result.present_cache)


def test_nothing_pruned_is_attention_over_bf16() -> None:
    options, cache, inputs = _step(5, k_sparsity=0.0, v_sparsity=0.0)
    output, _ = run(packed_session(options, cache, inputs), inputs, False)
    rows = [[unpack_row(CacheLayout(cache, 16, 16), row) for row in rows] for rows in inputs["past_cache"]]
    floats = {name: from_bf16(to_bf16(inputs[name])) for name in ("key", "value")}
    past_key, past_value = (np.array([[from_bf16(row[i]) for row in entry] for entry in rows]) for i in (0, 1))
    expected = sparse_amx_attention(options, inputs["query"], **floats, past_key=past_key, past_value=past_value)
    assert _error(output, expected.output) <= REFERENCE_ERROR


def test_tokens_can_be_taken_back_where_no_packed_block_is_undone() -> None:
    options, cache, inputs = _step(2, past=250, recent=20)
    inputs["seqlens_k"][:] = 231
    inputs["total_sequence_length"] = np.array(232, np.int32)
    session = packed_session(options, cache, inputs)
    expected = packed_attention(options, cache, **(inputs | {"total_sequence_length": 232}))
    for one_buffer in (False, True):
        output, present = run(session, inputs, one_buffer)
        assert _error(output, expected.output) <= REFERENCE_ERROR
        np.testing.assert_array_equal(present, expected.present_cache)
    inputs["seqlens_k"][:] = 190
    with pytest.raises(Exception, match="blocks after the first 189, the past of the call, are packed already"):
        run(session, inputs, False)


Change = Callable[[Inputs], Any]


def _set(at: int, value: int, row: tuple[int, int] = (1, 1)) -> Change:
    def change(inputs: Inputs) -> None:
        inputs["past_cache"][*row, at] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(0, 0), "past_cache of entry 1, head 1: it is not a packed cache"),
        (_set(8, 2, (0, 1)), "past_cache of entry 0, head 1: its format version is 2, this library knows 1"),
        (_set(12, 32), "its tokens in a block are 32, but the node's are 64"),
        (_set(16, 17), "its numbers in a key are 17, but the node's are 16"),
        (_set(36, 5), "its recent tokens are 5, but the node's are 0"),
        (_set(41, 1), "it says that it holds 456 tokens, but has room for 255"),
        (_set(40, 100), "it holds 100 tokens, but the call has a past of 200"),
        (_set(50, 1), "the reserved bytes of its header are not zero"),
        (_set(64, 0), "past_cache of entry 1, head 1: the bitmap of block 0 does not have as many bits"),
        (lambda i: i.update(past_cache=i["past_cache"][:, :, :-1]), "past_cache has rows of"),
        (lambda i: i.update(past_cache=i["past_cache"][:, :, :5]), "past_cache has rows of 5 bytes"),
        (lambda i: i.update(past_cache=i["past_cache"][:, :1]), "past_cache has the shape"),
        (lambda i: i.update(past_cache=i["past_cache"][:1]), "past_cache has the shape"),
        (lambda i: i.update(past_cache=i["past_cache"][0]), "past_cache has the shape"),
        (lambda i: i.update(seqlens_k=np.array([200, 700], np.int32)), "not in 1 to total_sequence_length = 201"),
        (lambda i: i.update(total_sequence_length=np.array(300, np.int32)), "total_sequence_length is 300"),
        (lambda i: i.update(seqlens_k=np.array([200, -1], np.int32)), "seqlens_k says that entry 1"),
        (lambda i: i.update(query=i["query"][:, :, :0]), "heads of some size"),
    ],
)
def test_wrong_calls_are_refused_in_words(change: Change, message: str) -> None:
    options, cache, inputs = _step()
    inputs["past_cache"] = inputs["past_cache"].copy()
    change(inputs)
    inputs = {name: np.ascontiguousarray(x) for name, x in inputs.items()}
    if inputs["query"].shape[2] == 0:
        inputs["key"], inputs["value"] = inputs["key"][:, :, :0], inputs["value"][:, :, :0]
    before = inputs["past_cache"].copy()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in inputs.items()}
    session = packed_session(options, cache, inputs)
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    binding.bind_ortvalue_output("present_cache", values["past_cache"])
    with pytest.raises(Exception, match=f"SparseAMXAttention node 'attention': .*{message}"):
        session.run_with_iobinding(binding)
    np.testing.assert_array_equal(values["past_cache"].numpy(), before)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"cache": "sparse"}, "cache is 'sparse', but it must be float or packed"),
        ({"cache": "float"}, "its cache is float, so it cannot have the input past_cache"),
        ({"k_sparsity": 1.0}, "sparsity of a cache is from 0 to below 1"),
        ({"v_sparsity": -0.5}, "sparsity of a cache is from 0 to below 1"),
        ({"sink": -1}, "sink and recent are from 0"),
        ({"recent": 1 << 30}, "sink and recent are from 0"),
        ({"outputs": ["output", "present_key", "", "present_cache"]}, "so it cannot have the output present_key"),
    ],
)
def test_wrong_attributes_are_refused_in_words(attributes: dict[str, Any], message: str) -> None:
    options, cache, inputs = _step()
    with pytest.raises(Exception, match=message):
        packed_session(options, cache, inputs, **attributes)


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [1, 7])
def test_keys_that_a_query_does_not_see_do_not_matter(
    isa: str, bad: float, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARAMX_ISA", isa)
    options, pruning = AttentionOptions(4, 2, local_window_size=40), CacheOptions(0.3, 0.5)
    setting = Setting(options, pruning, 40, 40, 1, frozenset(), None)
    rng = np.random.default_rng(5)
    prompt = make_call(rng, setting, np.zeros((1, 2, 0), np.uint8), np.zeros(1, np.int64), 150)
    step = make_call(rng, setting, np.zeros((1, 2, 0), np.uint8), np.full(1, 150), tokens)
    outputs = []
    for number in (1.0, bad):
        for name in ("key", "value"):
            prompt[name][0, 100] = number
        session = packed_session(options, pruning, prompt)
        output, step["past_cache"] = run(session, prompt, False)
        outputs.append(np.concatenate([output, run(session, step, False)[0]], axis=1))
    for hidden in (slice(0, 100), slice(140, None)):
        np.testing.assert_allclose(outputs[1][0, hidden], outputs[0][0, hidden], atol=1e-5)
    assert not np.isfinite(outputs[1][0, 100:140]).any()


def test_a_buffer_that_is_too_small_is_refused() -> None:
    options, cache, inputs = _step(60)
    with pytest.raises(
        Exception, match="its cache has 260 tokens, but the buffer given for past and present has room for 255"
    ):
        run(packed_session(options, cache, inputs), inputs, True)


def test_damaged_rows_and_caches_of_nothing_are_refused_by_the_reference() -> None:
    with pytest.raises(SparamxError, match="heads of some size"):
        CacheLayout(CacheOptions(), 0, 16)
    layout = CacheLayout(CacheOptions(0.5, 0.5, 0, 0), 16, 16)
    with pytest.raises(SparamxError, match="No row of a packed cache with these options has 100 bytes"):
        layout.capacity(100)
    words = to_bf16(np.random.default_rng(0).standard_normal((2 * BLOCK, 16)).astype(np.float32))
    row = np.frombuffer(pack_row(layout, words, words, layout.row_bytes(2 * BLOCK)), np.uint8)
    for at, what in ((HEADER_BYTES, "A bitmap of the packed cache is damaged"), (0, "does not fit its node")):
        damaged = row.copy()
        damaged[at] ^= 1
        with pytest.raises(SparamxError, match=what):
            unpack_row(layout, damaged)
