"""Text in, text out: a decoder between a tokenizer and a detokenizer that are operators of onnxruntime-extensions.

    python examples/continue_text.py FOLDER "Once upon a time" --new-tokens 50

FOLDER is one that `sparamx-onnx convert` has written from a folder of onnxruntime-genai. Its tokenizer.json must be a
byte-level BPE, as those of GPT-2, Llama 3, Qwen and their like are; both operators are made from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_extensions
from onnx import TensorProto, helper

import sparamx_onnx


class Tokenizer:
    """Two sessions of one operator each. The models can be saved as well, for programs in other languages."""

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, added = content["model"]["vocab"], content["added_tokens"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
        tokens = vocabulary | {token["content"]: token["id"] for token in added}
        special = [token["id"] for token in added if token["special"]]
        self._encode = _session(
            "GPT2Tokenizer", ("text", TensorProto.STRING), 2, vocab=json.dumps(vocabulary), merges="\n".join(merges)
        )
        self._decode = _session(
            "BpeDecoder",
            ("ids", TensorProto.INT64),
            1,
            id_vocab="\n".join(sorted(tokens, key=lambda token: int(tokens[token]))),
            byte_decoder="\n".join(f"{ord(letter)}\t{byte}" for byte, letter in enumerate(_letters())),
            added_tokens="\n".join(f"{token['id']}\t{token['content']}" for token in added),
            all_special_ids="\n".join(map(str, special)),
            skip_special_tokens=1,
        )
        self.special = special

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encode.run(["output_0"], {"text": np.array([text])})[0].ravel().tolist()
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(np.ravel(self._decode.run(["output_0"], {"ids": np.array(ids, np.int64)})[0])[0])


def _session(operator: str, given: tuple[str, int], outputs: int, **attributes: Any) -> onnxruntime.InferenceSession:
    names = [f"output_{index}" for index in range(outputs)]
    node = helper.make_node(operator, [given[0]], names, domain="ai.onnx.contrib", **attributes)
    kinds = TensorProto.STRING if given[1] == TensorProto.INT64 else TensorProto.INT64
    graph = helper.make_graph(
        [node],
        operator,
        [helper.make_tensor_value_info(given[0], given[1], [None])],
        [helper.make_tensor_value_info(name, kinds, None) for name in names],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.contrib", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=imports)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _letters() -> list[str]:
    """The letter that a byte-level BPE writes for each byte: its own if it can be seen, else one beyond."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(unseen)) for byte in range(256)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Continues a text.")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--new-tokens", type=int, default=50)
    arguments = parser.parse_args()
    tokenizer = Tokenizer(arguments.folder / "tokenizer.json")
    prompt = tokenizer.encode(arguments.text)
    session = sparamx_onnx.DecoderSession(arguments.folder, capacity=len(prompt) + arguments.new_tokens)
    [tokens] = session.generate([prompt], arguments.new_tokens, stop=tokenizer.special)
    print(arguments.text + tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
