"""SparseAMXAttention in ONNX Runtime sessions, against the reference and against GroupQueryAttention."""

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
from sparamx_onnx.ops.reference_attention import AttentionOptions, AttentionResult, sparse_amx_attention

FULL = bool(os.environ.get("SPARAMX_TEST_FULL"))
SUPPORTED = [level["name"] for level in library.cpu_info()["levels"] if level["supported"]]

# Relative to the largest number of the output.
REFERENCE_ERROR = 1e-4
GROUP_QUERY_ERROR = 1e-3

ROLES = [port.name for port in SPARSE_AMX_ATTENTION.inputs if port.role]
GROUP_QUERY_INPUTS = [
    *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"),
    *("cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink"),
]
OUTPUTS = ["output", "present_key", "present_value"]
ELEMENT_TYPES = {
    np.float32: TensorProto.FLOAT,
    np.int32: TensorProto.INT32,
    np.int64: TensorProto.INT64,
    np.bool_: TensorProto.BOOL,
}

# Heads of a node whose queries share keys.
GROUPED = {"query": 4, "key": 2, "value": 2}

Inputs = dict[str, np.ndarray]
Change = Callable[[Inputs], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: attributes, inputs, and whether past and present are one buffer."""

    options: AttentionOptions
    inputs: Inputs
    shared: bool

    def __str__(self) -> str:
        shapes = {name: list(array.shape) for name, array in self.inputs.items()}
        lengths = self.inputs.get("seqlens_k")
        return f"{self.options} {shapes} seqlens_k {lengths} shared {self.shared}"


def _session(node: Any, inputs: Inputs, outputs: list[str], threads: int = 2) -> onnxruntime.InferenceSession:
    graph = helper.make_graph(
        [node],
        "graph",
        [
            helper.make_tensor_value_info(
                name, ELEMENT_TYPES[array.dtype.type], [f"{name}{i}" for i in range(array.ndim)]
            )
            for name, array in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    imports = [
        helper.make_opsetid("", 20),
        helper.make_opsetid(DOMAIN, DOMAIN_VERSION),
        helper.make_opsetid("com.microsoft", 1),
    ]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    library.register(options)
    model = helper.make_model(graph, ir_version=10, opset_imports=imports)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attention_session(
    options: AttentionOptions, inputs: Inputs, outputs: int = 3, threads: int = 2
) -> onnxruntime.InferenceSession:
    """One SparseAMXAttention node."""
    roles = [name for name in inputs if name != "query"]
    attributes: dict[str, Any] = {
        name: int(value) if isinstance(value, bool) else value for name, value in vars(options).items()
    }
    node = helper.make_node(
        SPARSE_AMX_ATTENTION.name, ["query", *roles], OUTPUTS[:outputs], "attention", domain=DOMAIN,
        roles=",".join(roles), **attributes,
    )  # fmt: skip
    return _session(node, inputs, OUTPUTS[:outputs], threads)


def group_query_session(options: AttentionOptions, inputs: Inputs) -> onnxruntime.InferenceSession:
    """One GroupQueryAttention node of ONNX Runtime."""
    names = [name if name in inputs else "" for name in GROUP_QUERY_INPUTS]
    attributes: dict[str, Any] = {
        name: int(value) if isinstance(value, bool) else value for name, value in vars(options).items()
    }
    for name in ("causal", "mask_filter_value"):
        del attributes[name]
    node = helper.make_node(
        "GroupQueryAttention", names, OUTPUTS, domain="com.microsoft", do_rotary=int("cos_cache" in inputs),
        **attributes,
    )  # fmt: skip
    return _session(node, inputs, OUTPUTS)


def run(session: onnxruntime.InferenceSession, case: Case) -> list[np.ndarray]:
    """The outputs of a session, with past and present in one buffer where the case says so."""
    if not case.shared:
        return list(session.run(None, case.inputs))
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in case.inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output")
    binding.bind_ortvalue_output("present_key", values["past_key"])
    binding.bind_ortvalue_output("present_value", values["past_value"])
    session.run_with_iobinding(binding)
    output = binding.get_outputs()[0].numpy().copy()
    return [output, values["past_key"].numpy().copy(), values["past_value"].numpy().copy()]


def expected_of(case: Case) -> AttentionResult:
    """What the reference gives."""
    inputs: dict[str, Any] = dict(case.inputs)
    if "total_sequence_length" in inputs:
        inputs["total_sequence_length"] = int(inputs["total_sequence_length"])
    return sparse_amx_attention(case.options, **inputs)


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max(initial=0.0) / max(1e-3, np.abs(expected).max(initial=0.0)))


def _check(case: Case, outputs: list[np.ndarray], tolerance: float) -> None:
    """Compares with the reference, but for padding and for what lies in a shared cache beyond an entry's keys."""
    expected = expected_of(case)
    valid = ~expected.is_padding
    assert _error(outputs[0][valid], expected.output[valid]) <= tolerance, str(case)
    lengths = case.inputs.get("seqlens_k")
    for b in range(len(valid)):
        end = expected.present_key.shape[2] if lengths is None else int(lengths[b]) + 1
        for actual, wanted in zip(outputs[1:], (expected.present_key, expected.present_value), strict=True):
            assert actual.shape == wanted.shape
            assert _error(actual[b, :, :end], wanted[b, :, :end]) <= 1e-6, str(case)


def make_cases(seed: int, count: int, for_group_query: bool = False) -> Iterator[Case]:
    """Random calls: first calls, decode steps and chunks, with every option; more with SPARAMX_TEST_FULL.

    Args:
        seed: Seed.
        count: How many.
        for_group_query: Only what GroupQueryAttention takes, too.
    """
    rng = np.random.default_rng(seed)
    for index in range(count * (10 if FULL else 1)):
        kind = ("first", "decode", "chunk")[index % 3]
        size = int(rng.choice([8, 16, 24, 40, 64, 80, 128, 136]))
        kv_heads, group = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 4, 7]))
        batch = 1 if kind == "chunk" and for_group_query else int(rng.integers(1, 4))
        tokens = 1 if kind == "decode" else int(rng.integers(2, 300 if rng.integers(3) == 0 else 40))
        pasts = np.zeros(batch, int) if kind == "first" else rng.integers(1, 300, batch)
        if kind == "decode" and rng.integers(4) == 0:
            pasts = pasts + 1000
        fresh = rng.integers(1, tokens + 1, batch) if kind == "first" else np.full(batch, tokens)
        if kind == "first":
            fresh[rng.integers(batch)] = tokens
        lengths = pasts + fresh
        total = int(lengths.max())
        shared = bool(rng.integers(2))
        capacity = total + int(rng.integers(20)) if shared else int(pasts.max())
        heads = kv_heads * group

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        inputs: Inputs = {"query": normal(batch, tokens, heads * size)}
        if rng.integers(3) == 0:
            inputs["query"] = normal(batch, tokens, (heads + 2 * kv_heads) * size)
        else:
            inputs["key"], inputs["value"] = (normal(batch, tokens, kv_heads * size) for _ in range(2))
        if capacity or rng.integers(2) == 0:
            inputs["past_key"], inputs["past_value"] = (normal(batch, kv_heads, capacity, size) for _ in range(2))
        inputs["seqlens_k"] = (lengths - 1).astype(np.int32)
        inputs["total_sequence_length"] = np.array(total, np.int32)
        if rng.integers(2) and size % 16 == 0:
            half = size // 2 if rng.integers(3) else 8
            angles = rng.uniform(0, 6, (total + 9, half))
            inputs["cos_cache"], inputs["sin_cache"] = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
            if rng.integers(3) == 0:
                inputs["position_ids"] = rng.integers(0, 10 if kind == "first" else total + 9, (batch, tokens))
        if rng.integers(4) == 0:
            inputs["attention_bias"] = normal(int(rng.choice([1, batch])), int(rng.choice([1, heads])), tokens, total)
        smooth = bool(rng.integers(4) == 0)
        if rng.integers(4) == 0:
            inputs["head_sink"] = normal(heads)
        if not for_group_query:
            if rng.integers(6) == 0:
                inputs["key_padding_mask"] = rng.integers(0, 2, (batch, total)).astype(np.int32)
                # Where a query saw hidden keys only, fp32 would keep three digits of its scores beside the -10000.
                inputs["key_padding_mask"][:, 0] = 1
            order = [*rng.permutation([name for name in inputs if name != "query"])]
            inputs = {name: inputs[name] for name in ["query", *order]}
        options = AttentionOptions(
            heads,
            kv_heads,
            scale=float(rng.choice([0.0, 0.0, 0.05, 0.3])),
            softcap=float(rng.choice([0.0, 0.0, 2.0, 30.0])),
            local_window_size=-1 if "key_padding_mask" in inputs else int(rng.choice([-1, -1, 1, 5, 70, 200])),
            rotary_interleaved=bool(rng.integers(2)),
            smooth_softmax=smooth,
        )
        yield Case(options, inputs, shared)


@pytest.mark.parametrize("isa", SUPPORTED)
def test_agrees_with_the_reference(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARAMX_ISA", isa)
    expected = {"scalar": "scalar", "avx2": "avx2"}.get(isa, "avx512")
    assert library.cpu_info()["attention"] == expected
    for case in make_cases(SUPPORTED.index(isa), 60):
        _check(case, run(attention_session(case.options, case.inputs), case), REFERENCE_ERROR)


@pytest.mark.skipif(
    onnxruntime.__version__.startswith("1.21."), reason="GroupQueryAttention of onnxruntime 1.21 has fewer inputs"
)
def test_agrees_with_group_query_attention() -> None:
    for case in make_cases(100, 150, for_group_query=True):
        ours = run(attention_session(case.options, case.inputs), case)
        theirs = run(group_query_session(case.options, case.inputs), case)
        valid = ~expected_of(case).is_padding
        assert _error(ours[0][valid], theirs[0][valid]) <= GROUP_QUERY_ERROR, str(case)
        for b, last in enumerate(case.inputs["seqlens_k"]):
            for mine, other in zip(ours[1:], theirs[1:], strict=True):
                assert mine.shape == other.shape
                assert _error(mine[b, :, : last + 1], other[b, :, : last + 1]) <= GROUP_QUERY_ERROR, str(case)


def test_threads_do_not_change_a_bit() -> None:
    for case in make_cases(300, 12):
        sessions = [attention_session(case.options, case.inputs, threads=threads) for threads in (1, 2, 5)]
        valid = ~expected_of(case).is_padding
        results = {run(session, case)[0][valid].tobytes() for session in sessions}
        assert len(results) == 1, str(case)


def _cross_attention(rng: np.random.Generator, past: int) -> Case:
    """What MultiHeadAttention computes: no lengths, no causality, values of another size."""
    batch, heads, tokens, keys, size, value_size = 2, 3, 17, 70, 24, 40
    inputs: Inputs = {
        "query": rng.standard_normal((batch, tokens, heads * size), np.float32),
        "key": rng.standard_normal((batch, keys, heads * size), np.float32),
        "value": rng.standard_normal((batch, keys, heads * value_size), np.float32),
        "key_padding_mask": rng.integers(0, 2, (batch, past + keys)).astype(np.int32),
        "attention_bias": rng.standard_normal((1, heads, tokens, past + keys), np.float32),
    }
    if past:
        inputs["past_key"] = rng.standard_normal((batch, heads, past, size), np.float32)
        inputs["past_value"] = rng.standard_normal((batch, heads, past, value_size), np.float32)
    return Case(AttentionOptions(heads, heads, causal=False), inputs, shared=False)


def make_layout_cases(seed: int, count: int) -> Iterator[tuple[Case, int]]:
    """Random calls without lengths of a cache: every layout and mask, more or fewer keys than queries.

    Yields:
        A case, and how many outputs it has.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count * (10 if FULL else 1)):
        kv_heads, group, batch = (int(n) for n in rng.integers(1, 4, 3))
        size, value_size = (int(n) for n in rng.choice([8, 16, 24, 40, 128], 2))
        tokens, keys = (int(n) for n in rng.integers(1, 200 if rng.integers(4) == 0 else 20, 2))
        heads, causal, past = kv_heads * group, bool(rng.integers(2)), int(rng.choice([0, 0, 7, 90]))

        def tensor(heads: int, tokens: int, size: int, batch: int = batch) -> np.ndarray:
            shape = [batch, heads, tokens, size] if rng.integers(2) else [batch, tokens, heads * size]
            return rng.standard_normal(shape, np.float32)

        layout = rng.choice(["apart", "apart", "key and value", "all", "all at each head"])
        inputs: Inputs = {"query": tensor(heads, tokens, size)}
        if layout == "apart":
            inputs["key"], inputs["value"] = tensor(kv_heads, keys, size), tensor(kv_heads, keys, value_size)
        elif layout == "key and value":
            value_size = size
            inputs["key"] = rng.standard_normal((batch, keys, kv_heads, 2, size), np.float32)
        else:
            value_size, keys = size, tokens
            inputs["query"] = tensor(heads + 2 * kv_heads, tokens, size)
            if layout == "all at each head":
                kv_heads = heads
                inputs["query"] = rng.standard_normal((batch, tokens, heads, 3, size), np.float32)
        has_lengths = rng.integers(4) == 0
        if has_lengths:
            past = 0
            inputs["nonpad_kv_seqlen"] = rng.integers(0, keys + 1, batch)
        if past:
            inputs["past_key"] = rng.standard_normal((batch, kv_heads, past, size), np.float32)
            inputs["past_value"] = rng.standard_normal((batch, kv_heads, past, value_size), np.float32)
        total = past + keys
        if rng.integers(2):
            whole = [batch, heads, tokens, total if rng.integers(3) else int(rng.integers(1, total + 1))]
            shape = [n if rng.integers(2) else 1 for n in whole[:3]] + whole[3:]
            shape = shape[int(rng.integers(4)) :]
            is_bool = rng.integers(2)
            inputs["attention_bias"] = (
                rng.integers(0, 4, shape) > 0 if is_bool else rng.standard_normal(shape, np.float32)
            )
        if rng.integers(3) == 0:
            shape = [[batch, total], [batch, tokens, total], [batch]][int(rng.integers(3))]
            inputs["key_padding_mask"] = rng.integers(0, 2 if len(shape) > 1 else total + 2, shape).astype(np.int32)
        options = AttentionOptions(
            heads,
            kv_heads,
            scale=float(rng.choice([0.0, 0.3])),
            softcap=float(rng.choice([0.0, 2.0])),
            local_window_size=int(rng.choice([-1, 1, 9])) if causal else -1,
            causal=causal,
            # Where a query sees hidden keys only, fp32 would keep three digits of its scores beside -10000.
            mask_filter_value=-50.0,
        )
        yield Case(options, inputs, shared=False), 1 if has_lengths or rng.integers(2) else 3


@pytest.mark.parametrize("isa", SUPPORTED)
def test_every_layout_and_mask(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARAMX_ISA", isa)
    for case, outputs in make_layout_cases(500 + SUPPORTED.index(isa), 60):
        got = run(attention_session(case.options, case.inputs, outputs), case)
        expected = expected_of(case)
        assert _error(got[0], expected.output) <= REFERENCE_ERROR, str(case)
        for actual, wanted in zip(got[1:], (expected.present_key, expected.present_value), strict=False):
            assert _error(actual, wanted) <= 1e-6, str(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(nonpad_kv_seqlen=np.array([3, 8])), "entry 1 of the batch has 8 keys, but the call has 7"),
        (lambda i: i.update(nonpad_kv_seqlen=np.array([-1, 7])), "entry 0 of the batch has -1 keys"),
        (lambda i: i.update(nonpad_kv_seqlen=np.array([3])), "nonpad_kv_seqlen has the shape"),
        (lambda i: i.update(key=i["key"][:, :1]), r"key has the shape \[2, 1, 7, 16\], but it must be"),
        (lambda i: i.update(value=i["value"][:, :, :6]), r"value has the shape \[2, 2, 6, 8\], which is not that of"),
        (lambda i: i.pop("value"), r"must be \[batch, tokens, 2, 2, size\]"),
        (lambda i: i.update(attention_bias=np.zeros((5, 8), bool)), "attention_bias has the shape"),
        (lambda i: i.update(attention_bias=np.zeros((4, 7), bool)), "attention_bias has the shape"),
        (lambda i: i.update(attention_bias=np.zeros((1, 1, 1, 5, 7), np.float32)), "attention_bias has the shape"),
        (lambda i: i.update(attention_bias=np.zeros((5, 7), np.int32)), "attention_bias does not have the"),
        (lambda i: i.update(key_padding_mask=np.zeros(3, np.int32)), "key_padding_mask has the shape"),
        (lambda i: i.update(key_padding_mask=np.zeros((2, 4, 7), np.int32)), "key_padding_mask has the shape"),
    ],
)  # fmt: skip
def test_wrong_layouts_and_masks_are_refused_in_words(change: Change, message: str) -> None:
    inputs: Inputs = {
        "query": np.zeros((2, 4, 5, 16), np.float32),
        "key": np.zeros((2, 2, 7, 16), np.float32),
        "value": np.zeros((2, 2, 7, 8), np.float32),
    }
    change(inputs)
    with pytest.raises(Exception, match=f"SparseAMXAttention node 'attention': .*{message}"):
        attention_session(AttentionOptions(4, 2, causal=False), inputs, outputs=1).run(None, inputs)


@pytest.mark.parametrize("other", ["past_key", "seqlens_k", "cos_cache"])
def test_lengths_of_a_whole_cache_go_without_a_past(other: str) -> None:
    inputs = dict(_step().inputs)
    kept = {"query", "key", "value"} | {name for name in inputs if name.split("_")[0] == other.split("_")[0]}
    kept |= {"past_value"} if other == "past_key" else set()
    kept |= {"total_sequence_length"} if other == "seqlens_k" else set()
    kept |= {"sin_cache"} if other == "cos_cache" else set()
    inputs = {name: array for name, array in inputs.items() if name in kept} | {"nonpad_kv_seqlen": np.array([1, 1])}
    with pytest.raises(Exception, match=f"nonpad_kv_seqlen cannot go with {other}"):
        attention_session(AttentionOptions(4, 2), inputs)


@pytest.mark.parametrize("past", [0, 33])
@pytest.mark.parametrize("outputs", [1, 3])
def test_without_lengths_and_causality(past: int, outputs: int) -> None:
    case = _cross_attention(np.random.default_rng(past), past)
    got = run(attention_session(case.options, case.inputs, outputs), case)
    expected = expected_of(case)
    assert _error(got[0], expected.output) <= REFERENCE_ERROR
    if outputs == 3:
        _check(case, got, REFERENCE_ERROR)


def test_no_present_is_asked_for() -> None:
    for case in make_cases(7, 30):
        got = attention_session(case.options, case.inputs, outputs=1).run(None, case.inputs)[0]
        expected = expected_of(case)
        assert _error(got[~expected.is_padding], expected.output[~expected.is_padding]) <= REFERENCE_ERROR, str(case)


def test_keys_that_are_all_hidden_give_zeros() -> None:
    rng = np.random.default_rng(1)
    inputs = {
        "query": rng.standard_normal((1, 3, 32), np.float32),
        "key": rng.standard_normal((1, 3, 16), np.float32),
        "value": rng.standard_normal((1, 3, 16), np.float32),
        "attention_bias": np.zeros((1, 1, 3, 3), np.float32),
    }
    inputs["attention_bias"][0, 0, 1] = -np.inf
    case = Case(AttentionOptions(2, 1), inputs, shared=False)
    output = run(attention_session(case.options, inputs), case)[0]
    assert not output[0, 1].any()
    assert _error(output, expected_of(case).output) <= REFERENCE_ERROR


def test_large_scores_and_values_that_are_no_numbers() -> None:
    rng = np.random.default_rng(2)
    inputs = {
        "query": rng.standard_normal((1, 150, 64), np.float32) * 100,
        "key": rng.standard_normal((1, 150, 32), np.float32) * 100,
        "value": rng.standard_normal((1, 150, 32), np.float32),
    }
    case = Case(AttentionOptions(2, 1), inputs, shared=False)
    session = attention_session(case.options, inputs)
    assert _error(run(session, case)[0], expected_of(case).output) <= REFERENCE_ERROR
    for bits in (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC000FF):  # a NaN is a NaN, whatever else it says
        inputs["key"][0, 100, 5] = np.array(bits, np.uint32).view(np.float32)
        output = run(session, case)[0]
        assert np.isfinite(output[0, :100]).all()
        assert np.isnan(output[0, 100:]).all(), hex(bits)


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_that_a_query_does_not_see_do_not_matter(isa: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARAMX_ISA", isa)
    rng = np.random.default_rng(4)
    inputs = {name: rng.standard_normal((1, 150, heads * 40), np.float32) for name, heads in GROUPED.items()}
    options = AttentionOptions(GROUPED["query"], GROUPED["key"], local_window_size=40)
    expected = run(attention_session(options, inputs), Case(options, inputs, shared=False))[0]
    for name in ("key", "value"):
        inputs[name][0, 100] = bad
    output = run(attention_session(options, inputs), Case(options, inputs, shared=False))[0]
    np.testing.assert_allclose(output[0, :100], expected[0, :100], atol=1e-5)
    np.testing.assert_allclose(output[0, 140:], expected[0, 140:], atol=1e-5)
    assert not np.isfinite(output[0, 100:140]).any()
    # A bias hides the key from all, and a step in a shared buffer ends before it.
    options = dataclasses.replace(options, local_window_size=-1)
    inputs["attention_bias"] = np.zeros((1, 1, 150, 150), np.float32)
    inputs["attention_bias"][..., 100] = -np.inf
    assert np.isfinite(run(attention_session(options, inputs), Case(options, inputs, shared=False))[0]).all()
    step: Inputs = {name: inputs[name][:, :1] for name in GROUPED}
    for name in ("key", "value"):
        past = inputs[name].reshape(1, 150, GROUPED[name], 40).transpose(0, 2, 1, 3)
        step[f"past_{name}"] = np.ascontiguousarray(past)
    step["seqlens_k"], step["total_sequence_length"] = np.array([99], np.int32), np.array(100, np.int32)
    assert np.isfinite(run(attention_session(options, step), Case(options, step, shared=True))[0]).all()


def _run_bound(session: onnxruntime.InferenceSession, inputs: Inputs, outputs: Inputs) -> None:
    """A run that writes into arrays; those that are inputs, too, or begin where one does, share its memory."""
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)


def _ragged_step(lengths: list[int]) -> Case:
    """A decode step whose entries end with these lengths."""
    rng = np.random.default_rng(8)
    batch, past = len(lengths), max(lengths) - 1
    inputs: Inputs = {
        "query": rng.standard_normal((batch, 1, 64), np.float32),
        "key": rng.standard_normal((batch, 1, 32), np.float32),
        "value": rng.standard_normal((batch, 1, 32), np.float32),
        "past_key": rng.standard_normal((batch, 2, past, 16), np.float32),
        "past_value": rng.standard_normal((batch, 2, past, 16), np.float32),
        "seqlens_k": np.array(lengths, np.int32) - 1,
        "total_sequence_length": np.array(max(lengths), np.int32),
    }
    return Case(AttentionOptions(4, 2), inputs, shared=False)


def test_beyond_the_keys_of_an_entry_a_new_cache_has_zeros() -> None:
    case = _ragged_step([101, 700, 1601])  # keys are cut into three parts
    outputs = {
        "output": np.full((3, 1, 64), 7, np.float32),
        "present_key": np.full((3, 2, 1601, 16), 7, np.float32),
        "present_value": np.full((3, 2, 1601, 16), 7, np.float32),
    }
    _run_bound(attention_session(case.options, case.inputs), case.inputs, outputs)
    expected = expected_of(case)
    np.testing.assert_array_equal(outputs["present_key"], expected.present_key)
    np.testing.assert_array_equal(outputs["present_value"], expected.present_value)


def test_one_buffer_of_two_shapes_is_refused() -> None:
    case = _ragged_step([20, 30])
    room = {name: np.zeros((2, 2, 30, 16), np.float32) for name in ("present_key", "present_value")}
    inputs = dict(case.inputs)
    for past in ("past_key", "past_value"):
        inputs[past] = room[past.replace("past", "present")].reshape(-1)[: inputs[past].size].reshape(2, 2, 29, 16)
    session = attention_session(case.options, inputs)
    with pytest.raises(Exception, match="past and present are one buffer, but of different shapes"):
        _run_bound(session, inputs, {"output": np.zeros((2, 1, 64), np.float32), **room})


def test_a_sink_of_minus_infinity_is_none() -> None:
    rng = np.random.default_rng(9)
    inputs: Inputs = {name: rng.standard_normal((2, 3, 16 * heads), np.float32) for name, heads in GROUPED.items()}
    inputs["attention_bias"] = np.zeros((1, 1, 3, 3), np.float32)
    inputs["attention_bias"][0, 0, 1] = -np.inf
    inputs["head_sink"] = rng.standard_normal(GROUPED["query"], np.float32)
    inputs["head_sink"][::2] = -np.inf
    case = Case(AttentionOptions(GROUPED["query"], GROUPED["key"]), inputs, shared=False)
    output = run(attention_session(case.options, inputs), case)[0]
    assert _error(output, expected_of(case).output) <= REFERENCE_ERROR


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 1 << 40, 0), (1, 0, 1 << 38), (1, 0, 1 << 58)])
def test_heads_of_no_size_or_of_any_are_refused(shape: tuple[int, ...]) -> None:
    inputs = {name: np.zeros(shape, np.float32) for name in ("query", "key", "value")}
    with pytest.raises(Exception, match=r"query has the shape .* heads of some size, of at most 1048576 numbers"):
        attention_session(AttentionOptions(1, 1), inputs).run(None, inputs)


def test_a_buffer_that_is_too_small_is_refused() -> None:
    case = dataclasses.replace(_step(), shared=True)
    case.inputs["seqlens_k"][1], case.inputs["total_sequence_length"] = 24, np.array(25, np.int32)
    with pytest.raises(
        Exception, match="its cache has 25 tokens, but the buffer given for past and present has room for 24"
    ):
        run(attention_session(case.options, case.inputs), case)


@pytest.mark.parametrize("size", [(0, 5), (2, 0)])
def test_empty_calls(size: tuple[int, int]) -> None:
    batch, tokens = size
    inputs = {
        "query": np.zeros((batch, tokens, 32), np.float32),
        "key": np.zeros((batch, tokens, 16), np.float32),
        "value": np.zeros((batch, tokens, 16), np.float32),
        "past_key": np.ones((batch, 1, 3, 16), np.float32),
        "past_value": np.ones((batch, 1, 3, 16), np.float32),
    }
    output, present_key, _ = attention_session(AttentionOptions(2, 1), inputs).run(None, inputs)
    assert output.shape == (batch, tokens, 32)
    assert present_key.shape == (batch, 1, 3 + tokens, 16)
    assert (present_key == 1).all()


def _step() -> Case:
    """A decode step of a ragged batch in a shared buffer."""
    rng = np.random.default_rng(3)
    angles = rng.uniform(0, 6, (30, 8))
    inputs: Inputs = {
        "query": rng.standard_normal((2, 1, 64), np.float32),
        "key": rng.standard_normal((2, 1, 32), np.float32),
        "value": rng.standard_normal((2, 1, 32), np.float32),
        "past_key": rng.standard_normal((2, 2, 24, 16), np.float32),
        "past_value": rng.standard_normal((2, 2, 24, 16), np.float32),
        "seqlens_k": np.array([11, 20], np.int32),
        "total_sequence_length": np.array(21, np.int32),
        "cos_cache": np.cos(angles).astype(np.float32),
        "sin_cache": np.sin(angles).astype(np.float32),
    }
    return Case(AttentionOptions(4, 2), inputs, shared=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(seqlens_k=np.array([11, 21], np.int32)), "22 tokens in all, which is not in 1 to .* = 21"),
        (lambda i: i.update(seqlens_k=np.array([-2, 20], np.int32)), "seqlens_k says that entry 0"),
        (lambda i: i.update(seqlens_k=np.array([11], np.int32)), r"seqlens_k has the shape \[1\]"),
        (lambda i: i.update(total_sequence_length=np.array(40, np.int32)), "total_sequence_length is 40"),
        (lambda i: i.update(total_sequence_length=np.array(-1, np.int32)), "total_sequence_length is -1"),
        (lambda i: i.update(total_sequence_length=np.array([21, 21], np.int32)), "must be one number"),
        (lambda i: i.update(past_key=i["past_key"][:, :, :20]), r"past_value has the shape \[2, 2, 24, 16\]"),
        (lambda i: i.update(past_key=i["past_key"][:, :1]), "past_key has the shape"),
        (lambda i: i.update(past_key=i["past_key"][0]), "past_key has the shape"),
        (lambda i: i.update(key=i["key"][:, :, :16]), r"key has the shape \[2, 1, 16\], which is not .* 2 heads of 16"),
        (lambda i: i.update(value=i["value"][:1]), "value has the shape"),
        (lambda i: i.update(query=i["query"][:, :, :63]), "a multiple of 4"),
        (lambda i: i.update(query=i["query"][0]), "query has the shape"),
        (lambda i: i.update({n: i[n][:20] for n in ("cos_cache", "sin_cache")}), "the position 20, but .* 20"),
        (lambda i: i.update(cos_cache=i["cos_cache"][:, :4]), "sin_cache has the shape"),
        (lambda i: i.update(cos_cache=np.ones((30, 9), np.float32)), r"cos_cache .* \[positions, at most 8\]"),
        (lambda i: i.update(position_ids=np.array([[3], [-1]])), "has the position -1"),
        (lambda i: i.update(position_ids=np.array([[3, 4], [5, 6]])), "position_ids has the shape"),
        (lambda i: i.update(attention_bias=np.zeros((1, 3, 1, 21), np.float32)), "attention_bias has the shape"),
        (lambda i: i.update(attention_bias=np.zeros((1, 1, 1, 20), np.float32)), "attention_bias has the shape"),
        (lambda i: i.update(head_sink=np.zeros(3, np.float32)), r"head_sink has the shape \[3\]"),
        (lambda i: i.update(key_padding_mask=np.zeros((2, 20), np.int32)), "key_padding_mask has the shape"),
        (lambda i: i.update(seqlens_k=np.array([11, 20], np.int64)), "seqlens_k does not have the element type"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_in_words(change: Change, message: str) -> None:
    case = _step()
    change(case.inputs)
    with pytest.raises(Exception, match=f"SparseAMXAttention node 'attention': .*{message}"):
        run(attention_session(case.options, case.inputs), case)


def test_an_entry_shorter_than_the_calls_tokens_is_refused() -> None:
    case = _step()
    for name in ("query", "key", "value"):
        case.inputs[name] = np.repeat(case.inputs[name], 3, axis=1)
    case.inputs["seqlens_k"] = np.array([1, 20], np.int32)
    with pytest.raises(Exception, match="entry 0 of the batch has 2 tokens in all, fewer than the 3 that this call"):
        run(attention_session(case.options, case.inputs), case)


@pytest.mark.parametrize(
    ("options", "without", "message"),
    [
        (AttentionOptions(4, 3), (), "4 query heads cannot share 3 key and value heads"),
        (AttentionOptions(4, 0), (), "cannot share"),
        # Three times so many are one less than none in 64 bits.
        (AttentionOptions(6148914691236517205, 6148914691236517205), (), "query heads are more than 65536"),
        (AttentionOptions(4, 2, local_window_size=0), (), "a window of 0 keys"),
        (
            AttentionOptions(4, 2, local_window_size=3, causal=False),
            ("cos_cache", "sin_cache"),
            "a window needs causal",
        ),
        (AttentionOptions(4, 2, softcap=-1.0), (), "a softcap cannot be negative"),
        (AttentionOptions(4, 2), ("key",), "roles name value, but not key"),
        (AttentionOptions(4, 2), ("past_value",), "past_key and past_value both or neither"),
        (AttentionOptions(4, 2), ("total_sequence_length",), "both or neither"),
        (AttentionOptions(4, 2), ("sin_cache",), "cos_cache and sin_cache both or neither"),
    ],
)
def test_wrong_attributes_are_refused_in_words(
    options: AttentionOptions, without: tuple[str, ...], message: str
) -> None:
    inputs = {name: array for name, array in _step().inputs.items() if name not in without}
    with pytest.raises(Exception, match=message):
        attention_session(options, inputs)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("key,value,kez", "'kez', which is no role"),
        ("key,value,key", "names key twice"),
        ("key,value", "3 inputs after the query, but its attribute roles names 2"),
        ("key,value,position_ids", "position_ids need cos_cache and sin_cache"),
        ("key,value,past_cache", "its cache is float, so it cannot have the input past_cache"),
    ],
)
def test_wrong_roles_are_refused_in_words(roles: str, message: str) -> None:
    inputs = {name: _step().inputs[name] for name in ("query", "key", "value", "seqlens_k")}
    node = helper.make_node(
        SPARSE_AMX_ATTENTION.name, list(inputs), ["output"], domain=DOMAIN, num_heads=4, kv_num_heads=2, roles=roles
    )
    with pytest.raises(Exception, match=message):
        _session(node, inputs, ["output"]).run(None, inputs)


def test_roles_are_the_documented_ones() -> None:
    case = _step()
    rng = np.random.default_rng(5)
    every = {
        **case.inputs,
        "position_ids": np.array([[3], [4]]),
        "attention_bias": rng.standard_normal((2, 4, 1, 21), np.float32),
        "key_padding_mask": np.ones((2, 21), np.int32),
        "head_sink": rng.standard_normal(4, np.float32),
    }
    assert set(every) == {"query", *ROLES} - {"past_cache", "nonpad_kv_seqlen"}
    case = dataclasses.replace(case, inputs=every)
    _check(case, run(attention_session(case.options, every), case), REFERENCE_ERROR)


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_are_inferred(packed: bool) -> None:
    inputs = dict(_step().inputs)
    if packed:
        inputs["query"] = np.zeros((2, 1, 128), np.float32)
        del inputs["key"], inputs["value"]
    graph_inputs = [
        helper.make_tensor_value_info(name, ELEMENT_TYPES[array.dtype.type], ["batch", "tokens", array.shape[2]])
        if name in ("query", "key", "value")
        else helper.make_tensor_value_info(name, ELEMENT_TYPES[array.dtype.type], [None] * array.ndim)
        for name, array in inputs.items()
    ]
    roles = [name for name in inputs if name != "query"]
    nodes = [
        helper.make_node(
            SPARSE_AMX_ATTENTION.name, list(inputs), ["output"], domain=DOMAIN, num_heads=4, kv_num_heads=2,
            roles=",".join(roles),
        ),
        helper.make_node("Identity", ["output"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(nodes, "g", graph_inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    options = onnxruntime.SessionOptions()
    library.register(options)
    model = helper.make_model(graph, ir_version=10, opset_imports=imports).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == ["batch", "tokens", 64]


def _damage(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Another length, another rank, or integers that make no sense."""
    kind = rng.integers(4)
    if kind == 0 and array.ndim and array.size:
        axis = int(rng.integers(array.ndim))
        length = int(rng.integers(array.shape[axis] + 2))
        return np.take(array, np.arange(length) % array.shape[axis], axis)
    if kind == 1:
        return array.reshape(-1) if rng.integers(2) else array[None]
    if array.dtype == np.float32:
        return array
    if kind == 2:
        return array + array.dtype.type(rng.integers(-5, 6))
    return rng.integers(-(2**31), 2**31 - 1, array.shape).astype(array.dtype)


def test_damaged_calls_run_or_are_refused_in_words() -> None:
    rng = np.random.default_rng(6)
    refused = []
    for case in make_cases(400, 150):
        name = str(rng.choice(list(case.inputs)))
        case.inputs[name] = np.ascontiguousarray(_damage(rng, case.inputs[name]))
        try:
            attention_session(case.options, case.inputs).run(None, case.inputs)
        except Exception as error:
            refused.append(f"{name} in {case}: {error}")
    assert len(refused) > 30
    assert [text for text in refused if "SparseAMXAttention node 'attention': " not in text] == []


def test_heads_that_do_not_fit_are_refused_by_the_reference() -> None:
    with pytest.raises(SparamxError, match="3 query heads cannot share 2 key and value heads equally"):
        sparse_amx_attention(AttentionOptions(num_heads=3, kv_num_heads=2), np.zeros((1, 1, 48), np.float32))
