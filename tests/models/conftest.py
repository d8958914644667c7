"""Models that several tests use, exported and converted once per run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import sparamx_onnx
from sparamx_onnx.models import llama, minilm, sentences

GENAI_SHAPE = llama.LlamaShape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=96, vocab=304, positions=256)

Convert = Callable[[Path, str, str], Path]


@pytest.fixture(scope="session")
def minilm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    minilm.main([str(path)])
    return path


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "llama.onnx"
    llama.export(path, llama.TINY)
    return path


@pytest.fixture(scope="session")
def convert_once() -> Convert:
    """Converts a model with (method, weights) unless it has been, and returns where the result lies."""

    def convert(model: Path, method: str, weights: str) -> Path:
        output = model.with_name(f"{model.stem}.{method}.{weights}.onnx")
        if not output.exists():
            sparamx_onnx.convert(model, output, method=method, weights=weights)
        return output

    return convert


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as onnxruntime-genai's own builder writes it from a checkpoint with random weights."""
    checkpoint, folder = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("built")
    model = llama.build(GENAI_SHAPE)
    # An end of text that is never chosen, so that nothing ends early.
    model.config.update({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    model.lm_head.weight.data[2] = 0
    model.save_pretrained(checkpoint)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=GENAI_SHAPE.vocab,
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    # No token is a part of a letter: what random weights choose is a text.
    tokenizer.train_from_iterator([text for text in sentences.collect(100) if text.isascii()], trainer)
    assert tokenizer.get_vocab_size() == GENAI_SHAPE.vocab
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(checkpoint)
    build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", folder]
    done = subprocess.run(
        [*build, "-p", "fp32", "-e", "cpu", "-c", str(tmp_path_factory.mktemp("cache"))],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder
