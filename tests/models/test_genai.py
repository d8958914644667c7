"""Converted decoders in onnxruntime-genai, which knows the library from its configuration file alone."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

import sparamx_onnx
from sparamx_onnx.models import llama, tinylm
from sparamx_onnx.models.llama import TINY

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPT: list[int] = tinylm.held_out()[1000:1012].tolist()
NEW_TOKENS = 200
# How far the logit of a chosen token may lie below the dense model's largest one, by the largest absolute logit.
NEAR = {"fp32": 1e-4, "bf16": 2e-2}

GENERATE = """
import json, sys
import numpy as np
import onnxruntime_genai as og

model = og.Model(sys.argv[1])
parameters = og.GeneratorParams(model)
prompt = json.loads(sys.argv[3])
parameters.set_search_options(max_length=len(prompt) + int(sys.argv[2]), do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(np.array([prompt], np.int32))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)]))
"""


def generate(folder: Path, new_tokens: int = NEW_TOKENS, prompt: Sequence[int] = PROMPT) -> list[int]:
    """Greedily, in a process of its own that does not know sparamx_onnx; prompt and new tokens."""
    command = [sys.executable, "-c", GENERATE, str(folder), str(new_tokens), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tokens: list[int] = json.loads(done.stdout)
    assert tokens[: len(prompt)] == prompt
    assert len(tokens) == len(prompt) + new_tokens
    return tokens


def decoder_configuration(folder: Path) -> dict[str, int]:
    decoder: dict[str, int] = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    return decoder


def dense_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """The original model's logits [tokens, vocab] for a text, by ONNX Runtime alone."""
    session = sparamx_onnx.InferenceSession(folder / "model.onnx")
    sizes = decoder_configuration(folder)
    empty = np.zeros((1, sizes["num_key_value_heads"], 0, sizes["head_size"]), np.float32)
    inputs = {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
    inputs["input_ids"] = np.array([tokens], np.int64)
    inputs["attention_mask"] = np.ones((1, len(tokens)), np.int64)
    logits: np.ndarray = session.run(["logits"], inputs)[0][0]
    return logits


@pytest.mark.parametrize("attention", ["keep", "fast"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_converted_folder_generates_the_dense_model_s_tokens(
    built: Path, tmp_path: Path, weights: str, attention: str
) -> None:
    output = tmp_path / "converted"
    plan = sparamx_onnx.convert(built, output, weights=weights, attention=attention).plan
    layers = decoder_configuration(built)["num_hidden_layers"]
    assert len(plan.converted) == 5 * layers + 1  # query, key and value are one
    operators = [node.op_type for node in onnx.load(output / "model.onnx", load_external_data=False).graph.node]
    assert operators.count("SparseAMXAttention") == (layers if attention == "fast" else 0)
    tokens = generate(output)
    logits = dense_logits(built, tokens)
    # Token by token: after a choice between two that are nearly equal, the texts may differ altogether.
    before = np.arange(len(PROMPT), len(tokens)) - 1
    chosen, largest = logits[before, tokens[len(PROMPT) :]], logits[before].max(axis=1)
    assert (largest - chosen).max() <= NEAR[weights] * np.abs(logits).max()
    assert (chosen == largest).mean() > 0.95
    assert len(set(tokens)) > 2 * len(PROMPT)


def test_the_dense_folder_is_judged_right(built: Path) -> None:
    tokens = generate(built)
    logits = dense_logits(built, tokens)
    assert logits[len(PROMPT) - 1 : -1].argmax(axis=1).tolist() == tokens[len(PROMPT) :]


TEXT = "Return a list of"


def test_text_in_text_out_in_onnxruntime_genai(built: Path, tmp_path: Path) -> None:
    output = Path(sparamx_onnx.convert(built, tmp_path / "converted", weights="bf16", attention="fast").output or "")
    printed = run_example("genai_text.py", output, TEXT, "--new-tokens", "12")
    assert printed == continued(output, 12)


def test_text_in_text_out_with_operators_of_onnxruntime_extensions(built: Path, tmp_path: Path) -> None:
    output = Path(sparamx_onnx.convert(built, tmp_path / "converted", weights="bf16").output or "")
    printed = run_example("continue_text.py", output, TEXT, "--new-tokens", "12")
    assert printed == continued(output, 12)


def run_example(name: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def continued(folder: Path, new_tokens: int) -> str:
    """What the decoder makes of the text, with the tokenizer that the folder's file was made by."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    [tokens] = sparamx_onnx.DecoderSession(folder).generate([tokenizer.encode(TEXT).ids], new_tokens)
    assert len(set(tokens)) > 2
    return TEXT + tokenizer.decode(tokens)


def test_an_export_of_torch_with_a_configuration_of_one_s_own(llama_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for suffix in ("", ".data"):
        (folder / f"llama.onnx{suffix}").symlink_to(llama_path.with_name(f"llama.onnx{suffix}"))
    (folder / "genai_config.json").write_text(json.dumps(configuration()))
    converted = sparamx_onnx.convert(folder, method="keep", weights="fp32")
    length = 24
    prompt = [5, 9, 77, 30]
    tokens = generate(Path(converted.output or ""), length, prompt)
    assert tokens == greedy(llama_path, prompt, len(tokens))
    assert len(set(tokens)) > len(prompt)


def configuration() -> dict[str, object]:
    decoder = {
        "filename": "llama.onnx",
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


def greedy(model: Path, prompt: list[int], length: int) -> list[int]:
    """The most likely next token again and again, by ONNX Runtime alone."""
    session = sparamx_onnx.InferenceSession(model)
    tokens = list(prompt)
    inputs = llama.feeds(TINY, batch=1, sequence=1, past=0)
    while len(tokens) < length:
        inputs["input_ids"] = np.array([tokens], np.int64)
        inputs["attention_mask"] = np.ones((1, len(tokens)), np.int64)
        inputs["position_ids"] = np.arange(len(tokens), dtype=np.int64)[None]
        tokens.append(int(session.run(["logits"], inputs)[0][0, -1].argmax()))
    return tokens
