import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime_extensions
import pytest
import torch

import sparamx_onnx
from sparamx_onnx.models import minilm, sentences

Convert = Callable[[Path, str, str], Path]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten naps beside the sunny window.",
    "Interest rates rose again in the third quarter.",
    "The central bank raised its rates for the third time this year, and analysts expect one more before spring.",
    "Yes.",
]


def embed(path: Path, texts: list[str]) -> np.ndarray:
    """Sentence embeddings [len(texts), 384], all texts in one batch."""
    return sparamx_onnx.InferenceSession(path).run([minilm.OUTPUT_NAME], minilm.tokenize(texts))[0]


def relative_error(result: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(result - reference).max() / np.abs(reference).max())


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return sentences.collect(64) + SENTENCES


def test_the_export_computes_what_torch_computes(minilm_path: Path) -> None:
    inputs = minilm.tokenize(SENTENCES)
    with torch.no_grad():
        expected = minilm.build()(*(torch.from_numpy(inputs[name]) for name in minilm.INPUT_NAMES)).numpy()
    assert relative_error(embed(minilm_path, SENTENCES), expected) < 1e-5


def test_the_export_is_readable_by_the_oldest_supported_runtime(minilm_path: Path) -> None:
    model = onnx.load(minilm_path)
    onnx.checker.check_model(model)
    assert model.ir_version <= 10
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]


def test_embeddings_have_length_one_and_know_what_sentences_mean(minilm_path: Path) -> None:
    embeddings = embed(minilm_path, SENTENCES)
    assert embeddings.shape == (len(SENTENCES), minilm.EMBEDDING_SIZE)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > 0.5 > similarity[0, 2]
    assert similarity[2, 3] > 0.5 > similarity[1, 3]


def test_padding_does_not_change_an_embedding(minilm_path: Path) -> None:
    together = embed(minilm_path, SENTENCES)
    alone = np.concatenate([embed(minilm_path, [text]) for text in SENTENCES])
    assert relative_error(together, alone) < 1e-5


def test_long_texts_are_cut_to_the_model_s_length() -> None:
    assert minilm.tokenize(["word " * 1000])["input_ids"].shape == (1, minilm.MAX_TOKENS)


def test_all_linear_layers_of_the_encoder_are_converted_and_nothing_else(minilm_path: Path, tmp_path: Path) -> None:
    plan = sparamx_onnx.convert(minilm_path, tmp_path / "converted.onnx", method="keep", weights="fp32").plan
    assert Counter((node.k, node.n) for node in plan.converted) == {(384, 384): 24, (384, 1536): 6, (1536, 384): 6}
    # What is left are the two products of each attention layer, which have no weight.
    assert Counter(node.reason for node in plan.left_alone) == {"two_activations": 12}
    graph = onnx.load(tmp_path / "converted.onnx", load_external_data=False).graph
    # Query, key and value of each of the six layers are one operator.
    outputs = Counter(len(node.output) for node in graph.node if node.op_type == "SparseAMXMatMul")
    assert outputs == {3: 6, 1: minilm.LINEAR_LAYERS - 18}
    assert sum(node.op_type == "MatMul" for node in graph.node) == 12


def test_bias_and_activation_are_computed_in_the_converted_layers(minilm_path: Path, convert_once: Convert) -> None:
    graph = onnx.load(convert_once(minilm_path, "keep", "bf16"), load_external_data=False).graph
    sparse = [node for node in graph.node if node.op_type == "SparseAMXMatMul"]
    assert all(len(node.input) == 3 for node in sparse)
    epilogues = Counter(
        attribute.s.decode() for node in sparse for attribute in node.attribute if attribute.name == "epilogue"
    )
    assert epilogues["gelu"] == 6
    assert not any(node.op_type == "Gelu" for node in graph.node)


def test_fp32_weights_give_the_same_embeddings(minilm_path: Path, convert_once: Convert, corpus: list[str]) -> None:
    converted = embed(convert_once(minilm_path, "keep", "fp32"), corpus)
    assert relative_error(converted, embed(minilm_path, corpus)) < 1e-5


def test_bf16_weights_give_nearly_the_same_embeddings(
    minilm_path: Path, convert_once: Convert, corpus: list[str]
) -> None:
    converted, original = embed(convert_once(minilm_path, "keep", "bf16"), corpus), embed(minilm_path, corpus)
    cosine = (converted * original).sum(1) / np.linalg.norm(converted, axis=1) / np.linalg.norm(original, axis=1)
    assert cosine.min() >= 0.9999
    # Exactly equal would mean that nothing was converted.
    assert not np.array_equal(converted, original)


def test_pruning_by_magnitude_sets_half_of_each_weight_to_zero(minilm_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned.onnx"
    plan = sparamx_onnx.convert(minilm_path, output, method="magnitude", sparsity=0.5, weights="bf16").plan
    assert len(plan.converted) == minilm.LINEAR_LAYERS
    for node in plan.converted:
        assert node.sparsity == pytest.approx(0.5, abs=0.01)
        assert node.bytes_after is not None
        assert node.bytes_before is not None
        assert node.bytes_after < 0.6 * node.bytes_before / 2  # bf16 is half, and of that little more than half
    embeddings = embed(output, SENTENCES)
    cosine = (embeddings * embed(minilm_path, SENTENCES)).sum(1)
    # Uncalibrated pruning costs quality, but what is left must still be this model.
    assert 0.3 < cosine.mean() < 0.99


def test_the_search_example_finds_what_is_meant(minilm_path: Path, convert_once: Convert) -> None:
    command = [sys.executable, str(EXAMPLES / "search.py"), str(convert_once(minilm_path, "keep", "bf16"))]
    command += ["read one line from a file", "--sentences=200", "--top=3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    scores = [float(line.split("  ", 1)[0]) for line in printed]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.3
    assert any(word in printed[0].lower() for word in ("read", "line", "file"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted, with the tokenizer inside."""
    path = tmp_path_factory.mktemp("text") / "minilm.onnx"
    minilm.main([str(path), "--text"])
    return Path(sparamx_onnx.convert(path, weights="bf16").output or "")


def test_text_in_embedding_out_in_one_session_with_two_libraries(
    text_model: Path, minilm_path: Path, convert_once: Convert, corpus: list[str]
) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    session = sparamx_onnx.InferenceSession(text_model, options)
    assert [value.name for value in session.get_inputs()] == [minilm.TEXT_INPUT]
    texts = [*corpus, "Déjà vu in Zürich: naïve café"]
    expected = np.concatenate([embed(convert_once(minilm_path, "keep", "bf16"), [text]) for text in texts])
    embeddings = np.concatenate([session.run(None, {minilm.TEXT_INPUT: np.array([text])})[0] for text in texts])
    assert relative_error(embeddings, expected) < 1e-5


def test_the_text_example_knows_what_is_alike(text_model: Path) -> None:
    def alike(one: str, other: str) -> float:
        command = [sys.executable, str(EXAMPLES / "text.py"), str(text_model), one, other]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert (
        alike("How do I read a file?", "Reading text from disk") > 0.4 > alike("How do I read a file?", "Nice weather")
    )
