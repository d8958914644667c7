"""A converted decoder in onnxruntime-genai, which knows the library from its configuration file alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sparamx_onnx
from sparamx_onnx.models import llama
from sparamx_onnx.models.llama import TINY

PROMPT = [5, 9, 77, 30]
LENGTH = 24

GENERATE = """
import json, sys
import numpy as np
import onnxruntime_genai as og

model = og.Model(sys.argv[1])
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=int(sys.argv[2]), do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(np.array([json.loads(sys.argv[3])], np.int32))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)]))
"""


def configuration() -> dict[str, object]:
    decoder = {
        # It looks for the library in the model's folder.
        "session_options": {"custom_ops_library": "libsparamx_onnx.so"},
        "filename": "model.onnx",
        "head_size": TINY.head_size,
        "hidden_size": TINY.hidden,
        "num_attention_heads": TINY.heads,
        "num_hidden_layers": TINY.layers,
        "num_key_value_heads": TINY.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {"type": "llama", "vocab_size": TINY.vocab, "context_length": TINY.positions, "decoder": decoder}
    # Tokens that these random weights do not happen to choose, so that nothing ends the text early.
    model |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {"model": model, "search": {"past_present_share_buffer": False}}


@pytest.fixture
def folder(llama_path: Path, tmp_path: Path) -> Path:
    sparamx_onnx.convert(llama_path, tmp_path / "model.onnx", method="keep", weights="fp32")
    shutil.copy(sparamx_onnx.get_library_path(), tmp_path / "libsparamx_onnx.so")
    (tmp_path / "genai_config.json").write_text(json.dumps(configuration()))
    return tmp_path


def greedy(model: Path) -> list[int]:
    """The most likely next token again and again, by ONNX Runtime alone."""
    session = sparamx_onnx.InferenceSession(model)
    tokens = list(PROMPT)
    inputs = llama.feeds(TINY, batch=1, sequence=1, past=0)
    while len(tokens) < LENGTH:
        inputs["input_ids"] = np.array([tokens], np.int64)
        inputs["attention_mask"] = np.ones((1, len(tokens)), np.int64)
        inputs["position_ids"] = np.arange(len(tokens), dtype=np.int64)[None]
        tokens.append(int(session.run(["logits"], inputs)[0][0, -1].argmax()))
    return tokens


def test_it_generates_what_the_original_model_would(llama_path: Path, folder: Path) -> None:
    command = [sys.executable, "-c", GENERATE, str(folder), str(LENGTH), json.dumps(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout)
    assert tokens == greedy(llama_path)
    assert len(set(tokens)) > len(PROMPT)
