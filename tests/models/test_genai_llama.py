"""A decoder as onnxruntime-genai's builder writes it, and the benchmark that times such decoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparamx_onnx
from sparamx_onnx import cli
from sparamx_onnx.models import genai_llama
from sparamx_onnx.models.llama import LlamaShape

SHAPE = LlamaShape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=96, vocab=304, positions=128)
LINEAR = (5, 1)  # in a layer (query, key and value are one), and the last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    genai_llama.export(path, SHAPE, sparsity=0.5)
    return path


@pytest.fixture(scope="module")
def converted(folder: Path) -> Path:
    return Path(sparamx_onnx.convert(folder, weights="fp32", attention="fast").output or "")


def test_every_linear_layer_has_the_zeros_that_were_asked_for(folder: Path) -> None:
    plan = sparamx_onnx.inspect(folder).plan
    assert len(plan.converted) == LINEAR[0] * SHAPE.layers + LINEAR[1]
    assert [node.sparsity for node in plan.converted] == pytest.approx([0.5] * len(plan.converted), abs=0.02)


def test_the_whole_text_at_once_and_token_by_token_give_the_same(folder: Path, converted: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab, (2, 20))
    for model in (folder, converted):
        at_once = sparamx_onnx.DecoderSession(model, capacity=32)
        steps = sparamx_onnx.DecoderSession(model, capacity=32)
        expected = at_once.append(tokens)[:, -1]
        for token in tokens.T:
            last = steps.step(token)
        np.testing.assert_allclose(last, expected, atol=1e-4 * np.abs(expected).max())


def test_converted_with_exact_weights_it_is_the_same(folder: Path, converted: Path) -> None:
    assert sparamx_onnx.verify(folder, converted).passed
    operators = [node.op_type for node in onnx.load(converted / "model.onnx", load_external_data=False).graph.node]
    assert operators.count("SparseAMXAttention") == SHAPE.layers
    assert "GroupQueryAttention" not in operators


def test_another_seed_gives_other_weights_and_the_same_seed_the_same(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.onnx.data").read_bytes()
    for seed, is_equal in ((0, True), (1, False)):
        genai_llama.export(tmp_path, SHAPE, sparsity=0.5, seed=seed)
        assert ((tmp_path / "model.onnx.data").read_bytes() == data) == is_equal


def test_the_command_line_of_the_builder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--hidden=64", "--layers=1", "--heads=2", "--kv-heads=1", "--intermediate=64", "--vocab=80"]
    genai_llama.main([str(tmp_path / "new"), *sizes, "--positions=16"])
    assert "GB of weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        genai_llama.main([str(tmp_path / "new"), *sizes, "--sparsity=1"])
    assert "below 1" in capsys.readouterr().err


# --- The benchmark ----------------------------------------------------------------------------------------------------


def test_generation_is_timed_with_its_memory_and_shown(
    folder: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    report = tmp_path / "out.html"
    command = ["bench", str(converted), "--against", str(folder), "--prompt", "24", "--context", "40"]
    assert cli.run([*command, "--threads", "1", "--report", str(report), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt"], result["context"], result["batch"], result["threads"]) == (24, 40, 1, 1)
    for timing, model in zip(result["timings"], (converted, folder), strict=True):
        assert timing["model"] == str(model / "model.onnx")
        assert timing["prefill_tokens_per_second"] == pytest.approx(24 / timing["first_token"])
        assert timing["decode_tokens_per_second"] == pytest.approx(1 / timing["step"])
        for name in ("first_token", "step"):
            low, high = timing[f"{name}_quartiles"]
            assert 0 < low <= timing[name] <= high
        # Float keys and values of every layer; the capacity holds a burst of steps beyond the context.
        assert timing["cache_bytes"] >= 40 * SHAPE.layers * 2 * SHAPE.kv_heads * SHAPE.head_size * 4
        assert timing["load_seconds"] > 0
        assert timing["pss"] > timing["model_pss"]
    ours, theirs = result["timings"]
    assert result["decode_ratio"] == pytest.approx(theirs["step"] / ours["step"])
    assert result["prefill_ratio"] == pytest.approx(theirs["first_token"] / ours["first_token"])
    page = report.read_text()
    assert page.count("<svg") == 3
    assert f"<code>{converted / 'model.onnx'}</code>" in page
    assert cli.run([*command, "--report", str(report)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.run(["bench", str(converted), "--context", "40", "--batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "batch 2, context 40, one thread per core" in text
    assert "as fast as" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "8", "--length", "8"], "--length is for a single run"),
        (["--report", "out.html"], "--report needs --prompt or --context"),
    ],
)
def test_options_that_do_not_go_together(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.run(["bench", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_decoder_has_no_context(tmp_path: Path) -> None:
    graph = onnx.parser.parse_graph("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    with pytest.raises(sparamx_onnx.SparamxError, match="takes no key-value cache"):
        sparamx_onnx.bench_generation(path, context=4)
    with pytest.raises(sparamx_onnx.SparamxError, match="nothing to time"):
        sparamx_onnx.bench_generation(path)
