"""tinylm: a decoder with 5.4 million trained weights that has learned to continue Python's documentation.

A Llama of 6 layers (hidden size 256, 4 query heads over 2 key and value heads of 64, 2048 byte-level BPE tokens) as
transformers and onnxruntime-genai read it: large enough to suffer from pruning, small enough for tests. `train` makes
it from Debian's package python3.11-doc (PSF licence).

The checkpoint lies in the repository, not in the wheel: SPARAMX_TINYLM names its folder, or the command runs in the
checkout.

    python -m sparamx_onnx.models.tinylm OUT_FOLDER
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 6, 4, 2, 64
VOCAB = 2048
END_OF_TEXT = 0
# query, key and value are one product in the export; then output, gate, up and down, and the head of the model.
LINEAR_LAYERS = 5 * LAYERS + 1

_IN_CHECKOUT = Path("models/tinylm/checkpoint")


def checkpoint() -> Path:
    """The folder with configuration, weights (bfloat16), tokenizer, held-out and calibration text.

    Raises:
        FileNotFoundError: It is neither named by SPARAMX_TINYLM, nor beside this module, nor in the working directory.
    """
    named = os.environ.get("SPARAMX_TINYLM")
    places = [Path(named)] if named else [Path(__file__).with_name("checkpoint"), _IN_CHECKOUT]
    for place in places:
        if (place / "model.safetensors").is_file():
            return place.resolve()
    raise FileNotFoundError(f"no checkpoint of tinylm in {' or '.join(map(str, places))}")


def training() -> dict[str, float]:
    """What its training took and reached: `cpu_minutes`, `held_out_perplexity` and others."""
    figures: dict[str, float] = json.loads((checkpoint() / "training.json").read_text())
    return figures


@functools.cache
def tokenizer() -> Tokenizer:
    """Text to tokens and back."""
    return Tokenizer.from_file(str(checkpoint() / "tokenizer.json"))


def held_out() -> NDArray[np.int64]:
    """Tokens of documents that the model has not seen, one row of about 33,000, the first one ending a text."""
    return _read("held_out.txt")


def calibration() -> NDArray[np.int64]:
    """Tokens from all over the text that it has learned from, one row of about 33,000."""
    return _read("calibration.txt")


def _read(name: str) -> NDArray[np.int64]:
    encoded = tokenizer().encode((checkpoint() / name).read_text(encoding="utf-8"))
    return np.array([END_OF_TEXT, *encoded.ids], np.int64)


def export(folder: str | Path) -> Path:
    """Writes the model as onnxruntime-genai's builder does: `model.onnx` with its data, configuration and tokenizer.

    Inputs `input_ids`, `attention_mask` int64 [batch, tokens], `past_key_values.N.key` and `.value` float32
    [batch, 2, past, 64]; outputs `logits` [batch, tokens, 2048], `present.N.key` and `.value`. Its attention is
    GroupQueryAttention.

    Returns:
        The path of the model.

    Raises:
        RuntimeError: The builder failed; its output is in the message.
    """
    folder = Path(folder)
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-i", str(checkpoint()), "-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*builder, *options], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder could not write tinylm:\n{done.stderr}")
    return folder / "model.onnx"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` without the program's name."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__name__}", description="Writes tinylm as onnxruntime-genai's builder writes decoders."
    )
    parser.add_argument("folder", metavar="OUT_FOLDER", type=Path)
    arguments = parser.parse_args(argv)
    path = export(arguments.folder)
    print(f"{path}: held-out perplexity {training()['held_out_perplexity']} in {training()['parameters']:,} parameters")
