import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import sparamx_onnx
from sparamx_onnx.models import llama
from sparamx_onnx.models.llama import TINY

Convert = Callable[[Path, str, str], Path]
Arrays = dict[str, np.ndarray]


def run(session: sparamx_onnx.InferenceSession, inputs: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def relative_error(result: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(result - reference).max() / np.abs(reference).max())


def decode(path: Path, tokens: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """Feeds tokens [B, S] one at a time, every step's cache into the next; logits [B, S, vocab] and the last cache."""
    session = sparamx_onnx.InferenceSession(path)
    batch, length = tokens.shape
    inputs: Arrays = llama.feeds(TINY, batch=batch, sequence=1, past=0)
    logits = []
    for step in range(length):
        inputs["input_ids"] = tokens[:, step : step + 1]
        inputs["attention_mask"] = np.ones((batch, step + 1), np.int64)
        inputs["position_ids"] = np.full((batch, 1), step, np.int64)
        outputs = run(session, inputs)
        logits.append(outputs.pop("logits"))
        inputs |= {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
    return np.concatenate(logits, axis=1), outputs


@pytest.mark.parametrize(
    ("batch", "sequence", "past"), [(1, 1, 0), (1, 7, 0), (2, 1, 0), (2, 5, 3), (3, 1, 9), (1, 1, 31)]
)
def test_the_export_computes_what_torch_computes(llama_path: Path, batch: int, sequence: int, past: int) -> None:
    inputs = llama.feeds(TINY, batch, sequence, past, seed=past)
    cache = [
        tuple(torch.from_numpy(inputs[f"past_key_values.{layer}.{kind}"]) for kind in ("key", "value"))
        for layer in range(TINY.layers)
    ]
    with torch.no_grad():
        expected = llama.CachedDecoder(llama.build(TINY))(
            *(torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask", "position_ids")), cache
        )
    outputs = run(sparamx_onnx.InferenceSession(llama_path), inputs)
    assert list(outputs) == ["logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value"]
    for name, reference in zip(outputs, expected, strict=True):
        assert outputs[name].shape == tuple(reference.shape), name
        assert relative_error(outputs[name], reference.numpy()) < 1e-5, name


def test_decoding_step_by_step_equals_one_pass(llama_path: Path) -> None:
    inputs = llama.feeds(TINY, batch=2, sequence=9, past=0)
    at_once = run(sparamx_onnx.InferenceSession(llama_path), inputs)
    logits, cache = decode(llama_path, inputs["input_ids"])
    assert relative_error(logits, at_once["logits"]) < 1e-5
    for name, value in cache.items():
        assert relative_error(value, at_once[name]) < 1e-5, name


def test_names_and_dynamic_axes_are_those_of_optimum(llama_path: Path) -> None:
    graph = onnx.load(llama_path, load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 32]
    assert shapes["present.1.value"] == ["batch_size", 2, "past_sequence_length + sequence_length", 32]
    assert shapes["logits"] == ["batch_size", "sequence_length", 112]


def test_the_weights_lie_in_the_external_file(llama_path: Path) -> None:
    embedding_and_head = 2 * TINY.vocab * TINY.hidden
    data_bytes = (llama_path.parent / "llama.onnx.data").stat().st_size
    assert data_bytes >= 4 * (TINY.decoder_weights + embedding_and_head)
    assert llama_path.stat().st_size < 1_000_000


def test_all_linear_layers_are_converted(llama_path: Path, tmp_path: Path) -> None:
    plan = sparamx_onnx.convert(llama_path, tmp_path / "out.onnx", method="keep", weights="fp32").plan
    per_layer = {(128, 128): 2, (128, 64): 2, (128, 80): 2, (80, 128): 1}
    expected = Counter({size: count * TINY.layers for size, count in per_layer.items()}) + Counter({(128, 112): 1})
    assert Counter((node.k, node.n) for node in plan.converted) == expected
    assert len(plan.converted) == TINY.linear_layers
    assert sum(node.k * node.n for node in plan.converted if node.k and node.n) == TINY.decoder_weights + 128 * 112


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_the_converted_decoder_decodes_the_same(
    llama_path: Path, convert_once: Convert, weights: str, tolerance: float
) -> None:
    tokens = llama.feeds(TINY, batch=2, sequence=12, past=0, seed=5)["input_ids"]
    logits, cache = decode(llama_path, tokens)
    converted_logits, converted_cache = decode(convert_once(llama_path, "keep", weights), tokens)
    assert relative_error(converted_logits, logits) < tolerance
    assert converted_cache.keys() == cache.keys()
    for name, value in cache.items():
        assert relative_error(converted_cache[name], value) < tolerance, name


def test_half_of_the_decoder_can_be_pruned_but_not_its_head(llama_path: Path, tmp_path: Path) -> None:
    plan = sparamx_onnx.convert(llama_path, tmp_path / "out.onnx", method="magnitude", sparsity=0.5).plan
    sparsities = {(node.k, node.n): node.sparsity for node in plan.converted}
    assert sparsities.pop((128, 112)) == pytest.approx(0, abs=0.01)
    assert list(sparsities.values()) == pytest.approx([0.5] * len(sparsities), abs=0.01)


def test_feeds_fit_the_model(llama_path: Path) -> None:
    session = sparamx_onnx.InferenceSession(llama_path)
    inputs = llama.feeds(TINY, batch=1, sequence=2, past=3)
    assert {value.name for value in session.get_inputs()} == set(inputs)
    assert all(np.isfinite(value).all() for value in run(session, inputs).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, r"hidden \(128\) must be an even multiple of heads \(5\)"),
        ({"heads": 128}, r"hidden \(128\) must be an even multiple of heads \(128\)"),
        ({"kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_the_command_line_takes_every_size_and_the_same_seed_gives_the_same_bytes(
    llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "llama.onnx"
    llama.main([str(output), *(f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(TINY).items())])
    assert "14 linear layers" in capsys.readouterr().out
    for name in ("llama.onnx", "llama.onnx.data"):
        assert (tmp_path / name).read_bytes() == (llama_path.parent / name).read_bytes()


def test_another_seed_gives_other_weights() -> None:
    assert np.array_equal(llama.draw_weight(3, (5, 7), seed=0), llama.draw_weight(3, (5, 7), seed=0))
    assert not np.array_equal(llama.draw_weight(3, (5, 7), seed=0), llama.draw_weight(3, (5, 7), seed=1))
    assert not np.array_equal(llama.draw_weight(3, (5, 7), seed=0), llama.draw_weight(4, (5, 7), seed=0))


def test_the_command_line_refuses_impossible_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        llama.main([str(tmp_path / "out.onnx"), "--heads", "7"])
    assert stopped.value.code == 2
    assert "must be an even multiple of heads (7)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
