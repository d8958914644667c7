"""The decoder with trained weights: what it has learned, how it is exported and trained, what it generates."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers

import sparamx_onnx
from sparamx_onnx import DecoderSession
from sparamx_onnx.models import tinylm
from sparamx_onnx.models.tinylm import text, train
from sparamx_onnx.ops.packed_cache import BLOCK, CacheLayout, CacheOptions
from sparamx_onnx.ops.reference_packed_cache import chosen, from_bf16, from_tiles, to_bf16, to_tiles

WINDOW = 512
# Logits within this of the largest one, relative to the largest magnitude: the weights' rounding decides between them.
NEAR = 2e-2


@pytest.fixture(scope="session")
def tinylm_path(built: Path) -> Path:
    return built / "model.onnx"


def perplexity(path: Path, windows: np.ndarray) -> float:
    """Of the tokens [batch, 1 + length] after the first ones."""
    logits = DecoderSession(path, capacity=windows.shape[1]).append(windows[:, :-1])
    likely = np.take_along_axis(logits, windows[:, 1:, None], axis=2)[..., 0]
    largest = logits.max(axis=2)
    return float(np.exp((np.log(np.exp(logits - largest[..., None]).sum(axis=2)) + largest - likely).mean()))


def test_it_continues_text_that_it_has_not_seen(tinylm_path: Path) -> None:
    tokens = tinylm.held_out()
    windows = np.lib.stride_tricks.sliding_window_view(tokens, WINDOW + 1)[::WINDOW][:12]
    measured = perplexity(tinylm_path, windows)
    # Its own figure is that of all held-out documents.
    assert measured == pytest.approx(tinylm.training()["held_out_perplexity"], rel=0.25)
    counts = np.bincount(tinylm.calibration(), minlength=tinylm.VOCAB) + 1
    by_frequency = np.exp(-np.log(counts / counts.sum())[windows[:, 1:]].mean())
    assert measured < by_frequency / 10


def test_the_export_is_what_onnxruntime_genai_writes(tinylm_path: Path) -> None:
    graph = onnx.load(tinylm_path, load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["GroupQueryAttention"] == tinylm.LAYERS
    assert operators["MatMul"] == tinylm.LINEAR_LAYERS
    configuration = json.loads((tinylm_path.parent / "genai_config.json").read_text())
    decoder = configuration["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (tinylm.HEADS, tinylm.KV_HEADS)
    assert (decoder["head_size"], configuration["model"]["vocab_size"]) == (tinylm.HEAD_SIZE, tinylm.VOCAB)
    sentence = "The :func:`open` function returns a file object.\n"
    assert tinylm.tokenizer().decode(tinylm.tokenizer().encode(sentence).ids) == sentence


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_conversion_generates_the_dense_model_s_tokens(tinylm_path: Path, tmp_path: Path, weights: str) -> None:
    converted = tmp_path / "fast.onnx"
    plan = sparamx_onnx.convert(tinylm_path, converted, method="keep", weights=weights, attention="fast").plan
    assert (len(plan.converted), len(plan.converted_attention)) == (tinylm.LINEAR_LAYERS, tinylm.LAYERS)
    prompt = tinylm.held_out()[1000:1050].tolist()
    [tokens] = DecoderSession(converted, capacity=256).generate([prompt], 200)
    # Token by token: after a choice between two that are nearly equal, the texts may differ altogether.
    logits = DecoderSession(tinylm_path, capacity=256).append([prompt + tokens])[0, len(prompt) - 1 : -1]
    largest, chosen = logits.max(axis=1), logits[np.arange(len(tokens)), tokens]
    assert len(tokens) == 200
    assert (largest - chosen).max() <= NEAR * np.abs(logits).max()
    assert (largest == chosen).mean() > 0.97
    assert len(set(tokens)) > 20
    if weights == "fp32":
        assert [tokens] == DecoderSession(tinylm_path, capacity=256).generate([prompt], 200)


def pruned_rows(rows: np.ndarray, kept: int, keys: bool) -> np.ndarray:
    """Keys or values [tokens, size] of one head as bf16, every complete block of them pruned."""
    words = to_bf16(rows)
    for start in range(0, len(rows) - BLOCK + 1, BLOCK):
        block = words[start : start + BLOCK]
        matrix = block.T if keys else block
        tiles = to_tiles(matrix)
        smaller = from_tiles(np.where(chosen(tiles, kept), tiles, np.uint16(0)), *matrix.shape)
        words[start : start + BLOCK] = smaller.T if keys else smaller
    return from_bf16(words)


def recomputed(tokens: np.ndarray, options: CacheOptions) -> np.ndarray:
    """Logits [tokens, vocab] of transformers' own model with the rule of a packed cache, without a cache.

    What each token sees is put together anew from all keys and values: bf16, the blocks that are packed by then pruned.
    """
    layout = CacheLayout(options, tinylm.HEAD_SIZE, tinylm.HEAD_SIZE)

    def attend(
        module: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, None]:
        output = np.zeros(query[0].shape, np.float32)
        for head, queries in enumerate(query[0].numpy()):
            k, v = (x[0, head * tinylm.KV_HEADS // tinylm.HEADS].numpy() for x in (key, value))
            packed_k, packed_v = pruned_rows(k, layout.keys_kept, True), pruned_rows(v, layout.values_kept, False)
            whole_k, whole_v = (from_bf16(to_bf16(x)) for x in (k, v))
            for position, one in enumerate(queries):
                at = np.arange(position + 1)[:, None]
                old = (layout.sink_blocks * BLOCK <= at) & (at < layout.closed_blocks(position) * BLOCK)
                scores = np.where(old, packed_k[: position + 1], whole_k[: position + 1]) @ one / tinylm.HEAD_SIZE**0.5
                weights = np.exp(scores - scores.max())
                seen = np.where(old, packed_v[: position + 1], whole_v[: position + 1])
                output[head, position] = weights @ seen / weights.sum()
        return torch.from_numpy(output.transpose(1, 0, 2).copy())[None], None

    transformers.AttentionInterface.register("as_packed", attend)
    model = transformers.LlamaForCausalLM.from_pretrained(
        tinylm.checkpoint(), attn_implementation="as_packed", dtype=torch.float32
    )
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()


@pytest.mark.parametrize(
    "options", [CacheOptions(), CacheOptions(0.3, 0.5, 64, 64), CacheOptions(0.5, 0.7, 0, 20)], ids=str
)
def test_every_step_over_a_packed_cache_is_a_full_recomputation(
    tinylm_path: Path, tmp_path: Path, options: CacheOptions
) -> None:
    converted = tmp_path / "packed.onnx"
    sparamx_onnx.convert(tinylm_path, converted, method="keep", weights="fp32", attention="packed", **vars(options))
    tokens = tinylm.held_out()[5000:5300]
    decoder = DecoderSession(converted, capacity=len(tokens))
    steps = np.concatenate([decoder.step(token[None]) for token in tokens])
    expected = recomputed(tokens, options)
    error = np.abs(steps - expected).max(axis=1) / np.abs(expected).max(axis=1)
    # Where sums differ in their last bit, a number rounds to another bf16: 0.001. Pruned 64 steps late: 0.02 and 0.1; a
    # step early, with 20 recent tokens: 0.07.
    assert error.max() < 5e-3, f"step {error.argmax()}"


def test_training_is_reproducible_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [f"{a} {b} {c}.\n" for a in ("red", "green") for b in ("cats", "dogs") for c in ("run", "sleep")]
    corpus = text.Corpus(["".join(sentences[i:] + sentences[:i]) * 20 for i in range(8)], ["".join(sentences) * 20])
    monkeypatch.setattr(text, "fetch", lambda: corpus)
    monkeypatch.setattr(train, "STAGES", ((6, 32), (2, 64)))
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 256)
    monkeypatch.setattr(train, "WARM_UP", 2)
    results = []
    for name in ("first", "second"):
        train.main([str(tmp_path / name), "--threads", "1"])
        results.append((tmp_path / name / "model.safetensors").read_bytes())
    assert results[0] == results[1]
    monkeypatch.setenv("SPARAMX_TINYLM", str(tmp_path / "first"))
    assert tinylm.checkpoint() == (tmp_path / "first").resolve()
    # Guessing among the letters and words alike would give hundreds.
    assert tinylm.training()["held_out_perplexity"] < 100


def test_held_out_documents_are_not_learned_from(tmp_path: Path) -> None:
    for index in range(90):
        (tmp_path / f"{index:02}.rst.txt").write_text(f"document {index}")
    (tmp_path / "ignored.html").write_text("page")
    corpus = text.read(tmp_path)
    assert corpus.held_out == ["document 20", "document 60"]
    assert len(corpus.training) == 88
    assert not set(corpus.held_out) & set(corpus.training)


def test_a_missing_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARAMX_TINYLM", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tinylm.checkpoint()
