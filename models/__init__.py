"""Builders and exporters of the models that tests, demo and benchmarks use.

They need the `models` extra (torch, transformers).

- `minilm`: all-MiniLM-L6-v2, a sentence encoder with its trained weights.
- `llama`: a Llama-architecture decoder of any size with random weights and a KV cache.
- `genai_llama`: the same as a folder of onnxruntime-genai, as its builder writes it, with zeros in the weights.
- `tinylm`: a small decoder with trained weights, and the program that trains it.
- `zoo`: small models with random weights of the architectures that people export.
- `compatibility`: writes the zoo in every way there is, converts and compares it, and writes docs/compatibility.md.
- `sentences`: English text that ships with Python.
- `demo`: converts the first two and prints what it gained.
"""
