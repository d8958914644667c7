"""Small models of the architectures that people export, with random weights: what compatibility is tried on.

Each is what transformers builds from a configuration with two layers, in a wrapper that makes its inputs and outputs
plain tensors with the names that optimum gives them. Both exporters of torch can write it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.pytorch_utils import Conv1D

from sparamx_onnx.models import torch_export
from sparamx_onnx.models.llama import CachedDecoder

HIDDEN, HEADS, KV_HEADS, HEAD, INTERMEDIATE, LAYERS = 64, 4, 2, 16, 112, 2
VOCAB, EXPERTS, EXPERTS_PER_TOKEN = 136, 4, 2
IMAGE, PATCH, MELS, FRAMES = 32, 8, 20, 48

# An example's size of each symbolic axis; all differ, from each other too, so that a mix-up cannot go unnoticed.
SIZES: Mapping[str, int] = {"batch": 2, "sequence": 7, "past": 5, "total": 12, "source": 9, "texts": 3}

# How far weights of one dimension (biases, norms) are moved from their initial zeros and ones, which hide errors.
_DEVIATION = 0.1

# Of weights, as transformers draws them.
_WEIGHT_DEVIATION = 0.02

# Makes routers as decided as trained ones: where all experts weigh the same, rounding exchanges half of the result.
_ROUTER_FACTOR = 10

_TORCHSCRIPT_OPSET = 17

_EAGER: dict[str, Any] = {"attn_implementation": "eager"}
_LABELS: dict[str, Any] = {"num_labels": 10}
_ENCODER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
}
_TEXT: dict[str, Any] = {**_ENCODER, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED: dict[str, Any] = {**_TEXT, **_EAGER, "num_key_value_heads": KV_HEADS}
_T5: dict[str, Any] = {
    **_EAGER,
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": HEAD,
    "d_ff": INTERMEDIATE,
    "num_layers": LAYERS,
    "num_heads": HEADS,
}


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        name: Its name.
        axes: The size of each axis; a name where it is symbolic.
        below: For int64 inputs, the number that all values lie below; None for float32, normally distributed.
    """

    name: str
    axes: tuple[int | str, ...]
    below: int | None = None

    @property
    def symbolic_axes(self) -> dict[int, str]:
        """The names of the axes that have one, by index."""
        return {index: axis for index, axis in enumerate(self.axes) if isinstance(axis, str)}

    def draw(self, sizes: Mapping[str, int], rng: np.random.Generator) -> NDArray[np.generic]:
        """Random values where the symbolic axes have these sizes."""
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)
        if self.below is None:
            return rng.standard_normal(shape, np.float32)
        return rng.integers(0, self.below, shape, np.int64)


class Named(torch.nn.Module):
    """A transformers model that takes tensors by position and returns a tuple of them."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs the model with its inputs in order."""
        result = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(getattr(result, output) for output in self.outputs)


class Decoder(CachedDecoder):
    """A decoder whose cache is passed as a flat list of tensors, like all other inputs."""

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        """Tokens, mask and positions, then key and value of every layer."""
        tokens, mask, positions, *past = tensors
        return super().forward(tokens, mask, positions, list(zip(past[::2], past[1::2], strict=True)))


class T5Decoder(torch.nn.Module):
    """T5 without its encoder, whose result is an input."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Tokens, the encoder's last hidden state and its mask; returns the logits."""
        tokens, states, mask = tensors
        result = self.model(decoder_input_ids=tokens, encoder_outputs=(states,), attention_mask=mask, use_cache=False)
        logits: torch.Tensor = result.logits
        return logits


def _linear(inputs: int, outputs: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, outputs, bias=False)
    torch.nn.init.normal_(layer.weight, std=_WEIGHT_DEVIATION)
    return layer


class SeparateExperts(torch.nn.Module):
    """Mixtral's experts as one linear layer each, and every token through all of them, weighed by the router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.ModuleList(_linear(HIDDEN, INTERMEDIATE) for _ in range(EXPERTS))
        self.up = torch.nn.ModuleList(_linear(HIDDEN, INTERMEDIATE) for _ in range(EXPERTS))
        self.down = torch.nn.ModuleList(_linear(INTERMEDIATE, HIDDEN) for _ in range(EXPERTS))

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """States [tokens, HIDDEN]; the chosen experts and their weights, [tokens, EXPERTS_PER_TOKEN] each."""
        result = torch.zeros_like(states)
        for index, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            share = torch.where(chosen == index, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
            result = result + share * down(torch.nn.functional.silu(gate(states)) * up(states))
        return result


class StackedExperts(torch.nn.Module):
    """The same with the experts' weights side by side in three dimensions, as in a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE) * _WEIGHT_DEVIATION)
        self.down = torch.nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) * _WEIGHT_DEVIATION)

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `SeparateExperts.forward`."""
        shares = torch.zeros(states.shape[0], EXPERTS, dtype=states.dtype).scatter(1, chosen, weights)
        gate, up = torch.matmul(states.unsqueeze(0), self.gate_up).chunk(2, -1)
        results = torch.matmul(torch.nn.functional.silu(gate) * up, self.down)
        return (results * shares.T.unsqueeze(-1)).sum(0)


def _mixtral(experts: Callable[[], torch.nn.Module] | None) -> torch.nn.Module:
    """Mixtral with other experts, or its own, which gather the weights of the chosen ones for each token."""
    options: dict[str, Any] = {"experts_implementation": "batched_mm"}
    config = transformers.MixtralConfig(
        **_GROUPED, num_local_experts=EXPERTS, num_experts_per_tok=EXPERTS_PER_TOKEN, **options
    )
    model = transformers.MixtralForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.gate.weight.mul_(_ROUTER_FACTOR)
        if experts is not None:
            layer.mlp.experts = experts()
    return model


def _clip() -> torch.nn.Module:
    config = transformers.CLIPConfig(
        text_config={**_TEXT, "eos_token_id": VOCAB - 1},
        vision_config={**_ENCODER, "image_size": IMAGE, "patch_size": PATCH},
        projection_dim=HIDDEN,
    )
    clip: Any = transformers.CLIPModel
    model: torch.nn.Module = clip._from_config(config, **_EAGER)
    return model


_TOKENS = Input("input_ids", ("batch", "sequence"), VOCAB)
_MASK = Input("attention_mask", ("batch", "sequence"), 2)
_SEGMENTS = Input("token_type_ids", ("batch", "sequence"), 2)
_PIXELS = Input("pixel_values", ("batch", 3, IMAGE, IMAGE))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model that can be built and exported.

    Attributes:
        name: What it is called.
        build: Makes the transformers model.
        inputs: Its inputs.
        outputs: Names of its outputs.
        wrap: Makes it a module from tensors to tensors; None takes `Named`.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    wrap: Callable[[torch.nn.Module], torch.nn.Module] | None = None

    def module(self, seed: int = 0) -> torch.nn.Module:
        """The module to export, in evaluation mode, with random weights."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = self.build()
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=_DEVIATION)
        names = tuple(each.name for each in self.inputs)
        module = Named(model, names, self.outputs) if self.wrap is None else self.wrap(model)
        return module.eval()

    def feeds(self, sizes: Mapping[str, int] = SIZES, seed: int = 0) -> dict[str, NDArray[np.generic]]:
        """Inputs for one run. Masks are random, but the first token of every row is seen."""
        rng = np.random.default_rng(seed)
        feeds = {each.name: each.draw(sizes, rng) for each in self.inputs}
        for name, values in feeds.items():
            if name.endswith("mask"):
                values[:, 0] = 1
        return feeds

    @property
    def linear_layers(self) -> int:
        """How many linear layers the torch modules have: what must be found again in every export."""
        modules = list(self.module().modules())
        single = sum(isinstance(module, torch.nn.Linear | Conv1D | MixtralTopKRouter) for module in modules)
        # Two products for all experts together.
        return single + 2 * sum(isinstance(module, MixtralExperts | StackedExperts) for module in modules)


def _decoder(name: str, build: Callable[[], torch.nn.Module], kv_heads: int = KV_HEADS) -> Architecture:
    """A decoder with a key-value cache."""
    caches = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    inputs = (
        _TOKENS,
        Input("attention_mask", ("batch", "total"), 2),
        Input("position_ids", ("batch", "sequence"), SIZES["total"]),
        *(Input(f"past_key_values.{cache}", ("batch", kv_heads, "past", HEAD)) for cache in caches),
    )
    return Architecture(name, build, inputs, ("logits", *(f"present.{cache}" for cache in caches)), Decoder)


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "BERT",
        lambda: transformers.BertModel(transformers.BertConfig(**_TEXT, **_EAGER)),
        (_TOKENS, _MASK, _SEGMENTS),
        ("last_hidden_state", "pooler_output"),
    ),
    Architecture(
        "DistilBERT",
        lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(
                vocab_size=VOCAB, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=INTERMEDIATE, **_EAGER
            )
        ),
        (_TOKENS, _MASK),
        ("last_hidden_state",),
    ),
    Architecture(
        "RoBERTa",
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_TEXT, **_EAGER)),
        (_TOKENS, _MASK),
        ("logits",),
    ),
    _decoder(
        "GPT-2",
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCAB, **_EAGER)
        ),
        HEADS,
    ),
    _decoder(
        "OPT",
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**_TEXT, **_EAGER, ffn_dim=INTERMEDIATE, word_embed_proj_dim=HIDDEN)
        ),
        HEADS,
    ),
    _decoder("Llama", lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED))),
    _decoder("Qwen2", lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_GROUPED))),
    _decoder("Mistral", lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_GROUPED))),
    _decoder("Phi-3", lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_GROUPED))),
    _decoder("Gemma-2", lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_GROUPED, head_dim=HEAD))),
    Architecture(
        "T5 encoder",
        lambda: transformers.T5EncoderModel(transformers.T5Config(**_T5)),
        (_TOKENS, _MASK),
        ("last_hidden_state",),
    ),
    Architecture(
        "T5 decoder",
        # The encoder is not part of what is exported.
        lambda: _without_encoder(transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5))),
        (
            _TOKENS,
            Input("encoder_hidden_states", ("batch", "source", HIDDEN)),
            Input("encoder_attention_mask", ("batch", "source"), 2),
        ),
        ("logits",),
        T5Decoder,
    ),
    Architecture(
        "ViT",
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**_ENCODER, **_EAGER, **_LABELS, image_size=IMAGE, patch_size=PATCH)
        ),
        (_PIXELS,),
        ("logits",),
    ),
    Architecture(
        "Whisper encoder",
        lambda: WhisperEncoder(
            transformers.WhisperConfig(
                d_model=HIDDEN,
                encoder_layers=LAYERS,
                encoder_attention_heads=HEADS,
                encoder_ffn_dim=INTERMEDIATE,
                num_mel_bins=MELS,
                max_source_positions=FRAMES // 2,
                **_EAGER,
            )
        ),
        (Input("input_features", ("batch", MELS, FRAMES)),),
        ("last_hidden_state",),
    ),
    Architecture(
        "CLIP",
        _clip,
        (
            Input("input_ids", ("texts", "sequence"), VOCAB),
            _PIXELS,
            Input("attention_mask", ("texts", "sequence"), 2),
        ),
        # Not their cosines: those of random embeddings are near zero, where a relative error says nothing.
        ("text_embeds", "image_embeds"),
    ),
    _decoder("Mixtral, gathered experts", lambda: _mixtral(None)),
    _decoder("Mixtral, separate experts", lambda: _mixtral(SeparateExperts)),
    _decoder("Mixtral, stacked experts", lambda: _mixtral(StackedExperts)),
)


def _without_encoder(model: Any) -> torch.nn.Module:
    model.encoder.block = torch.nn.ModuleList()
    result: torch.nn.Module = model
    return result


def export_dynamo(architecture: Architecture, path: Path) -> None:
    """Writes a model as torch's dynamo exporter does, which is torch's default."""
    arguments = _arguments(architecture)
    axes = tuple(each.symbolic_axes for each in architecture.inputs)
    names = [each.name for each in architecture.inputs]
    model = torch_export.export(architecture.module(), arguments, (axes,), names, architecture.outputs)
    ir.save(model, path)


def export_torchscript(architecture: Architecture, path: Path) -> None:
    """Writes a model as torch's older exporter does, which traces; optimum uses it."""
    with torch_export.quiet(), torch.no_grad():
        torch.onnx.export(
            architecture.module(),
            _arguments(architecture),
            path,
            dynamo=False,
            input_names=[each.name for each in architecture.inputs],
            output_names=list(architecture.outputs),
            dynamic_axes={each.name: each.symbolic_axes for each in architecture.inputs},
            opset_version=_TORCHSCRIPT_OPSET,
        )


def _arguments(architecture: Architecture) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(values) for values in architecture.feeds().values())
