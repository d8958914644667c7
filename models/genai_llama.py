"""A Llama-architecture decoder of any size with random weights, as onnxruntime-genai's builder writes it.

The graph has GroupQueryAttention with rotation inside over a cache that may be one buffer for past and present, one
product for query, key and value, and norms that add; only the last token's logits are computed. Weights are noise, and
as many of the smallest ones as asked for are zero; they are drawn while the file is written, so that writing needs the
memory of one matrix. For timing and testing.

    python -m sparamx_onnx.models.genai_llama FOLDER --hidden 2048 --layers 16 --vocab 128256 --sparsity 0.5
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from sparamx_onnx.models.llama import LlamaShape

MODEL_NAME = "model.onnx"
LLAMA_3_2_1B = LlamaShape(
    hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128256, positions=20480
)

_OPSET, _IR_VERSION = 21, 10
_MICROSOFT = "com.microsoft"
_DEVIATION = 0.02
_ROTARY_BASE = 500000.0
_EPSILON = 1e-5
_ALIGNMENT = 4096
# Drawn at a time, so that no matrix is held twice.
_CHUNK = 1 << 24


def export(folder: str | Path, shape: LlamaShape, *, sparsity: float = 0.0, seed: int = 0) -> Path:
    """Writes a model folder of onnxruntime-genai, without a tokenizer.

    Args:
        folder: Where to; made if it is not there.
        shape: The sizes.
        sparsity: Share of zeros in the weight of every linear layer, the last one included.
        seed: Of the weights.

    Returns:
        The model file. Inputs: ``input_ids`` int64 [batch, sequence], ``attention_mask`` int64 [batch, total],
        ``past_key_values.N.key`` and ``.value`` float32 [batch, kv_heads, past, head]. Outputs: ``logits`` float32
        [batch, 1, vocab] and ``present.N.key`` and ``.value``.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_NAME
    with path.with_name(path.name + ".data").open("wb") as data:
        graph = _Graph(shape, _Weights(data, path.name + ".data", sparsity, seed)).build()
    imports = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    onnx.save(helper.make_model(graph, ir_version=_IR_VERSION, opset_imports=imports), path)
    (folder / "genai_config.json").write_text(json.dumps(configuration(shape), indent=4) + "\n")
    return path


def configuration(shape: LlamaShape) -> dict[str, Any]:
    """The content of ``genai_config.json``."""
    cache = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    decoder = {
        "session_options": {},
        "filename": MODEL_NAME,
        "head_size": shape.head_size,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{f"past_{part}_names": name for part, name in cache.items()},
        },
        "outputs": {
            "logits": "logits",
            **{f"present_{part}_names": name.replace("past_key_values", "present") for part, name in cache.items()},
        },
    }
    model = {"type": "llama", "vocab_size": shape.vocab, "context_length": shape.positions, "decoder": decoder}
    model |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {"model": model, "search": {"max_length": shape.positions, "past_present_share_buffer": True}}


class _Weights:
    """Draws initializers into the external data file."""

    def __init__(self, file: BinaryIO, location: str, sparsity: float, seed: int) -> None:
        self._file = file
        self._location = location
        self._smallest = _DEVIATION * statistics.NormalDist().inv_cdf((1 + sparsity) / 2)
        self._seed = seed
        self.tensors: list[TensorProto] = []

    def linear(self, name: str, inputs: int, outputs: int) -> str:
        """A matrix [inputs, outputs] with zeros."""
        return self._draw(name, [inputs, outputs], self._smallest)

    def dense(self, name: str, *shape: int) -> str:
        """A tensor without zeros."""
        return self._draw(name, list(shape), 0.0)

    def given(self, name: str, values: NDArray[np.float32]) -> str:
        """A tensor of known values."""
        offset = self._align()
        self._file.write(values.tobytes())
        return self._add(name, list(values.shape), offset)

    def _draw(self, name: str, shape: list[int], smallest: float) -> str:
        rng = np.random.default_rng([self._seed, len(self.tensors)])
        offset, left = self._align(), int(np.prod(shape))
        while left:
            values = rng.standard_normal(min(left, _CHUNK), np.float32)
            values *= np.float32(_DEVIATION)
            if smallest:
                values[np.abs(values) < smallest] = 0
            self._file.write(values.data)
            left -= values.size
        return self._add(name, shape, offset)

    def _align(self) -> int:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        return self._file.tell()

    def _add(self, name: str, shape: list[int], offset: int) -> str:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        length = self._file.tell() - offset
        for key, value in (("location", self._location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        self.tensors.append(tensor)
        return name


class _Graph:
    """The nodes of the decoder, from the first to the last."""

    def __init__(self, shape: LlamaShape, weights: _Weights) -> None:
        self._shape = shape
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._numbers: list[TensorProto] = []

    def build(self) -> onnx.GraphProto:
        """All of it."""
        shape = self._shape
        self._lengths()
        angles = _angles(shape)
        self._weights.given("cos_cache", np.cos(angles))
        self._weights.given("sin_cache", np.sin(angles))
        embedding = self._weights.dense("model.embed_tokens.weight", shape.vocab, shape.hidden)
        stream = self._node("Gather", [embedding, "input_ids"], "/model/embed_tokens/Gather")
        scale = self._scale("model.layers.0.input_layernorm")
        options: dict[str, Any] = {"epsilon": _EPSILON, "axis": -1}
        norm = self._node("SimplifiedLayerNormalization", [stream, scale], "/model/layers.0/input_layernorm", **options)
        for layer in range(shape.layers):
            stream, norm = self._layer(layer, stream, norm)
        last = self._node("Gather", [norm, self._number("last", [-1])], "/model/last_token/Gather", axis=1)
        self._linear("/lm_head/MatMul", "lm_head.MatMul.weight", last, shape.hidden, shape.vocab, output="logits")
        return helper.make_graph(
            self._nodes, "decoder", self._inputs(), self._outputs(), [*self._weights.tensors, *self._numbers]
        )

    def _lengths(self) -> None:
        """What GroupQueryAttention wants to know, from the mask of tokens."""
        folder = "/model/attn_mask_reformat"
        counted = self._node(
            "ReduceSum", ["attention_mask", self._number("one", [1])], f"{folder}/ReduceSum", keepdims=0
        )
        last = self._node("Sub", [counted, self._number("one_token", 1)], f"{folder}/Sub")
        self._node("Cast", [last], f"{folder}/Cast", output="seqlens_k", to=TensorProto.INT32)
        sizes = self._node("Shape", ["attention_mask"], f"{folder}/Shape")
        total = self._node("Gather", [sizes, self._number("second", 1)], f"{folder}/Gather", axis=0)
        self._node("Cast", [total], f"{folder}/total/Cast", output="total_sequence_length", to=TensorProto.INT32)

    def _layer(self, layer: int, stream: str, norm: str) -> tuple[str, str]:
        """One decoder layer; the stream without this layer's result, which the returned norm has added."""
        shape, path, weights = self._shape, f"/model/layers.{layer}", f"model.layers.{layer}"
        heads, size = shape.heads, shape.head_size
        packed = (heads + 2 * shape.kv_heads) * size
        qkv = self._linear(f"{path}/attn/qkv_proj/MatMul", f"{weights}.attn.qkv_proj", norm, shape.hidden, packed)
        cache = [f"{side}.{layer}.{part}" for side in ("past_key_values", "present") for part in ("key", "value")]
        attention = f"{path}/attn/GroupQueryAttention"
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [qkv, "", "", *cache[:2], "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"],
                [f"{attention}/output_0", *cache[2:]],
                attention,
                domain=_MICROSOFT,
                num_heads=heads,
                kv_num_heads=shape.kv_heads,
                scale=size**-0.5,
                do_rotary=1,
            )
        )
        after = self._linear(
            f"{path}/attn/o_proj/MatMul", f"{weights}.attn.o_proj", f"{attention}/output_0", heads * size, shape.hidden
        )
        stream, norm = self._add_norm(f"{path}/post_attention_layernorm", stream, after)
        wide = shape.intermediate
        gate = self._linear(f"{path}/mlp/gate_proj/MatMul", f"{weights}.mlp.gate_proj", norm, shape.hidden, wide)
        up = self._linear(f"{path}/mlp/up_proj/MatMul", f"{weights}.mlp.up_proj", norm, shape.hidden, wide)
        sigmoid = self._node("Sigmoid", [gate], f"{path}/mlp/act_fn/Sigmoid")
        active = self._node("Mul", [gate, sigmoid], f"{path}/mlp/act_fn/Mul")
        product = self._node("Mul", [active, up], f"{path}/mlp/Mul")
        down = self._linear(f"{path}/mlp/down_proj/MatMul", f"{weights}.mlp.down_proj", product, wide, shape.hidden)
        following = layer + 1
        name = "final_norm" if following == shape.layers else "input_layernorm"
        return self._add_norm(f"/model/layers.{following}/{name}", stream, down)

    def _add_norm(self, path: str, stream: str, added: str) -> tuple[str, str]:
        """(the sum, its norm)."""
        scale = self._scale(path.strip("/").replace("/", "."))
        outputs = [f"{path}/output_0", "", "", f"{path}/output_3"]
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [stream, added, scale],
            outputs,
            path,
            domain=_MICROSOFT,
            epsilon=_EPSILON,
        )
        self._nodes.append(node)
        return outputs[3], outputs[0]

    def _scale(self, name: str) -> str:
        return self._weights.given(f"{name}.weight", np.ones(self._shape.hidden, np.float32))

    def _linear(self, path: str, weight: str, value: str, inputs: int, outputs: int, output: str | None = None) -> str:
        name = weight if weight.endswith(".weight") else f"{weight}.MatMul.weight"
        return self._node("MatMul", [value, self._weights.linear(name, inputs, outputs)], path, output=output)

    def _node(self, kind: str, inputs: Sequence[str], path: str, *, output: str | None = None, **options: Any) -> str:
        result = output or f"{path}/output_0"
        self._nodes.append(helper.make_node(kind, inputs, [result], path, **options))
        return result

    def _number(self, name: str, value: int | list[int]) -> str:
        self._numbers.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        tokens = {"input_ids": "sequence_length", "attention_mask": "total_sequence_length"}
        return [
            *(
                helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", axis])
                for name, axis in tokens.items()
            ),
            *self._caches("past_key_values", "past_sequence_length"),
        ]

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", 1, self._shape.vocab])
        return [logits, *self._caches("present", "total_sequence_length")]

    def _caches(self, prefix: str, axis: str) -> list[onnx.ValueInfoProto]:
        sizes: list[str | int | None] = ["batch_size", self._shape.kv_heads, axis, self._shape.head_size]
        return [
            helper.make_tensor_value_info(f"{prefix}.{layer}.{part}", TensorProto.FLOAT, sizes)
            for layer in range(self._shape.layers)
            for part in ("key", "value")
        ]


def _angles(shape: LlamaShape) -> NDArray[np.float32]:
    """Rotary angles [positions, half a head]."""
    half = shape.head_size // 2
    frequencies = _ROTARY_BASE ** -(np.arange(half) / half)
    return np.outer(np.arange(shape.positions), frequencies).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; ``argv`` without the program's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    for field in dataclasses.fields(LlamaShape):
        default = getattr(LLAMA_3_2_1B, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--sparsity", type=float, default=0.0, help="zeros in every linear layer; default 0")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    sizes = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(LlamaShape)}
    try:
        path = export(arguments.folder, LlamaShape(**sizes), sparsity=arguments.sparsity, seed=arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{path}: {path.with_name(path.name + '.data').stat().st_size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
