"""Text in, embedding out: a session with two operator libraries, onnxruntime-extensions' and ours.

    python -m sparamx_onnx.models.minilm minilm.onnx --text
    sparamx-onnx convert minilm.onnx
    python examples/text.py minilm.sparse.onnx "How do I read a file?" "Reading text from disk"

Prints the cosine of the two texts' embeddings. The tokenizer is an operator of the model, so a program in any language
needs nothing but the two libraries.
"""

from __future__ import annotations

import argparse

import numpy as np
import onnxruntime
import onnxruntime_extensions

import sparamx_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares two texts by meaning.")
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("texts", metavar="TEXT", nargs=2)
    arguments = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    session = sparamx_onnx.InferenceSession(arguments.model, options)
    one, other = (session.run(None, {"text": np.array([text])})[0][0] for text in arguments.texts)
    print(f"{one @ other:.3f}")


if __name__ == "__main__":
    main()
