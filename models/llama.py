"""A Llama-architecture decoder of any size with random weights, as ONNX with a KV cache.

For timing and testing: the graph is what torch.onnx writes for transformers' LlamaForCausalLM, the weights are noise.
They are drawn while the file is written, so exporting needs the memory of one matrix, not of the model.

    python -m sparamx_onnx.models.llama OUT.onnx --hidden 2048 --layers 4 --heads 32 --kv-heads 8 --intermediate 8192
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray

from sparamx_onnx.models import torch_export

# Weights are drawn with this standard deviation, as transformers does (LlamaConfig.initializer_range).
_DEVIATION = 0.02
# Initializers from this size on go to the external data file.
_EXTERNAL_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """The sizes of a decoder. `hidden` must be a multiple of `heads`, and `heads` of `kv_heads`."""

    hidden: int = 2048
    layers: int = 4
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 8192
    vocab: int = 8192
    positions: int = 4096

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, not {getattr(self, field.name)}")
        if self.hidden % self.heads or self.head_size % 2:
            raise ValueError(f"hidden ({self.hidden}) must be an even multiple of heads ({self.heads})")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @property
    def head_size(self) -> int:
        """Values per head."""
        return self.hidden // self.heads

    @property
    def linear_layers(self) -> int:
        """Linear layers with their own weights: seven a decoder layer, and the head."""
        return 7 * self.layers + 1

    @property
    def decoder_weights(self) -> int:
        """Weights in the linear layers of the decoder layers, without the head and the embedding."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_size
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def config(self) -> transformers.LlamaConfig:
        """The configuration for transformers."""
        options: dict[str, Any] = {"attn_implementation": "eager"}  # fewer nodes than SDPA after export
        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocab,
            max_position_embeddings=self.positions,
            tie_word_embeddings=False,
            **options,
        )


# For tests: every size differs from every other, so that a mix-up cannot go unnoticed, and two queries share a key.
TINY = LlamaShape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=80, vocab=112, positions=64)


class CachedDecoder(torch.nn.Module):
    """LlamaForCausalLM with its cache as plain tensors, so that it can be a graph's inputs and outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, ...]:
        """Runs one step.

        Args:
            input_ids: int64 [batch, new tokens].
            attention_mask: int64 [batch, past + new tokens].
            position_ids: int64 [batch, new tokens].
            past: Key and value of every layer, float32 [batch, kv_heads, past, head].

        Returns:
            The logits [batch, new tokens, vocab], then key and value [batch, kv_heads, past + new tokens, head] of
            every layer.
        """
        cache: Any = transformers.DynamicCache(past)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)


def draw_weight(index: int, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The values of parameter number `index` in the layout of the file (linear layers: [inputs, outputs]).

    Norm weights (1-D) lie around 1, so that a lost or swapped one shows; all others are normal with deviation 0.02.
    """
    values = np.random.default_rng([seed, index]).standard_normal(shape, np.float32)
    values *= np.float32(_DEVIATION)
    if len(shape) == 1:
        values += np.float32(1)
    return values


def build(shape: LlamaShape, seed: int = 0) -> torch.nn.Module:
    """The LlamaForCausalLM with the weights that `export` writes for the same shape and seed, all in memory."""
    model: torch.nn.Module = transformers.LlamaForCausalLM(shape.config())
    with torch.no_grad():
        for index, parameter in enumerate(_parameters(model)):
            values = torch.from_numpy(draw_weight(index, parameter.file_shape, seed))
            parameter.tensor.copy_(values.T if parameter.transposed else values)
    return model.eval()


def export(path: str | Path, shape: LlamaShape, seed: int = 0, opset: int = torch_export.DEFAULT_OPSET) -> None:
    """Writes the decoder as `path`, and its weights beside it as `path`.data.

    Inputs and outputs are named as optimum names them: `input_ids`, `attention_mask`, `position_ids`,
    `past_key_values.N.key` and `.value`; `logits`, `present.N.key` and `.value`. Batch, sequence and past length are
    dynamic, and the past may be empty.
    """
    model, parameters = _export_with_markers(shape, opset)
    _draw_on_write(model, [parameter.file_shape for parameter in parameters], seed)
    path = Path(path)
    ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=_EXTERNAL_BYTES)


def feeds(shape: LlamaShape, batch: int, sequence: int, past: int, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """Inputs for one run of the exported model: random tokens after a random cache of `past` positions."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, NDArray[np.generic]] = {
        "input_ids": rng.integers(0, shape.vocab, (batch, sequence), np.int64),
        "attention_mask": np.ones((batch, past + sequence), np.int64),
        "position_ids": np.broadcast_to(np.arange(past, past + sequence, dtype=np.int64), (batch, sequence)).copy(),
    }
    for name in _cache_names("past_key_values", shape):
        inputs[name] = rng.standard_normal((batch, shape.kv_heads, past, shape.head_size), np.float32)
    return inputs


def _cache_names(prefix: str, shape: LlamaShape) -> list[str]:
    return [f"{prefix}.{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]


def _export_with_markers(shape: LlamaShape, opset: int) -> tuple[ir.Model, list[_Parameter]]:
    """Exports a decoder whose parameters take no memory: number i holds i + 1 everywhere, with stride 0.

    The exporter folds the transposition of each weight, which on a stride-0 tensor costs nothing and keeps the value.
    """
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(shape.config())
    model.eval()
    # What is computed, not trained, must be real.
    model.model.rotary_emb = type(model.model.rotary_emb)(shape.config())
    parameters = list(_parameters(model))
    for index, parameter in enumerate(parameters):
        marker = torch.full((1,) * parameter.tensor.dim(), float(index + 1)).expand(parameter.tensor.shape)
        setattr(parameter.module, parameter.name, torch.nn.Parameter(marker, requires_grad=False))
    batch, sequence, past = 2, 3, 5
    tokens = torch.zeros((batch, sequence), dtype=torch.int64)
    mask = torch.ones((batch, past + sequence), dtype=torch.int64)
    cache = torch.zeros((batch, shape.kv_heads, past, shape.head_size))
    tokens_axes = {0: "batch_size", 1: "sequence_length"}
    cache_axes = {0: "batch_size", 2: "past_sequence_length"}
    exported = torch_export.export(
        CachedDecoder(model),
        (tokens, mask, tokens.clone(), [(cache.clone(), cache.clone()) for _ in range(shape.layers)]),
        (
            tokens_axes,
            {0: "batch_size", 1: "total_sequence_length"},
            tokens_axes,
            [(cache_axes, cache_axes) for _ in range(shape.layers)],
        ),
        ["input_ids", "attention_mask", "position_ids", *_cache_names("past_key_values", shape)],
        ["logits", *_cache_names("present", shape)],
        opset,
    )
    return exported, parameters


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """One trained tensor of the torch model and how it stands in the exported file."""

    module: torch.nn.Module
    name: str
    tensor: torch.Tensor

    @property
    def transposed(self) -> bool:
        """Whether the file holds the transpose: the exporter turns Linear's [out, in] into MatMul's [in, out]."""
        return isinstance(self.module, torch.nn.Linear)

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(reversed(self.tensor.shape)) if self.transposed else tuple(self.tensor.shape)


def _parameters(model: torch.nn.Module) -> Iterator[_Parameter]:
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            yield _Parameter(module, name, tensor)


def _draw_on_write(model: ir.Model, shapes: list[tuple[int, ...]], seed: int) -> None:
    """Replaces every marker of `_export_with_markers` by random values that are made when they are read.

    Raises RuntimeError if the exported graph does not hold each parameter exactly once in the expected layout.
    """
    missing = set(range(len(shapes)))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) == 0:
            continue
        corners = tensor.numpy().flat
        index = int(corners[0]) - 1
        is_marker = corners[0] == corners[-1] == index + 1 and index in missing
        if not is_marker or tensor.shape.numpy() != shapes[index]:
            continue
        missing.remove(index)
        value.const_value = _random_tensor(index, shapes[index], seed, value.name)
    if missing:
        raise RuntimeError(f"the exported graph does not hold parameters {sorted(missing)} as they were expected")


def _random_tensor(index: int, shape: tuple[int, ...], seed: int, name: str | None) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(draw_weight(index, shape, seed)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape),
        name=name,
        cache=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` without the program's name."""
    parser = argparse.ArgumentParser(
        description="Writes a Llama-architecture decoder with random weights as an ONNX model."
    )
    parser.add_argument("output", metavar="OUT.onnx", type=Path)
    for field in dataclasses.fields(LlamaShape):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default, help=f"default {field.default}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opset", type=int, default=torch_export.DEFAULT_OPSET)
    arguments = parser.parse_args(argv)
    sizes = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(LlamaShape)}
    try:
        shape = LlamaShape(**sizes)
    except ValueError as error:
        parser.error(str(error))
    export(arguments.output, shape, arguments.seed, arguments.opset)
    print(
        f"{arguments.output}: {7 * shape.layers} linear layers with {shape.decoder_weights / 1e6:.1f} million weights"
    )


if __name__ == "__main__":
    main()
