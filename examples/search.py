#!/usr/bin/env python3
"""Searches sentences by meaning with a converted sentence encoder.

First, ``python -m sparamx_onnx.models.minilm minilm.onnx`` and ``sparamx-onnx convert minilm.onnx``; then
``python examples/search.py minilm.sparse.onnx "how do I read a file line by line?"``.
"""

import argparse

import numpy as np

import sparamx_onnx
from sparamx_onnx.models import minilm, sentences


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches Python's documentation strings by meaning.")
    parser.add_argument("model", help="an all-MiniLM-L6-v2 in ONNX, converted or not")
    parser.add_argument("query")
    parser.add_argument("--sentences", type=int, default=1000, help="how many to search")
    parser.add_argument("--top", type=int, default=5)
    arguments = parser.parse_args()

    # onnxruntime.InferenceSession with the sparse operators registered; it runs ordinary models too.
    session = sparamx_onnx.InferenceSession(arguments.model)

    def embed(texts: list[str]) -> np.ndarray:
        return session.run(["sentence_embedding"], minilm.tokenize(texts))[0]

    texts = sentences.collect(arguments.sentences)
    # Sentences of like length share a batch, so that little is padded.
    texts.sort(key=len)
    embeddings = np.concatenate([embed(texts[start : start + 32]) for start in range(0, len(texts), 32)])
    scores = embeddings @ embed([arguments.query])[0]
    for index in np.argsort(-scores)[: arguments.top]:
        print(f"{scores[index]:.3f}  {texts[index]}")


if __name__ == "__main__":
    main()
