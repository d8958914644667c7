"""Runs models with nothing but onnxruntime, numpy and the shared library, each with inputs of its own.

Arguments: the library, a folder with ``NAME.onnx`` and ``NAME.npz``, and the file to write the outputs to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    library, folder, output = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    outputs = {}
    for path in sorted(folder.glob("*.onnx")):
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for index, value in enumerate(session.run(None, dict(np.load(path.with_suffix(".npz"))))):
            outputs[f"{path.stem}/{index}"] = value
    np.savez(output, version=np.array(onnxruntime.__version__), **outputs)


if __name__ == "__main__":
    main()
