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

from __future__ import annotations

import sys
from types import TracebackType


def _name_the_extra(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a program in here that lacks a package, one sentence instead of a traceback."""
    if not isinstance(error, ModuleNotFoundError):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {error}: install the extra 'models' (pip install 'sparamx-onnx[models]').", file=sys.stderr)


# So it is while `python -m` looks for its module, and not where somebody imports one.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _name_the_extra
