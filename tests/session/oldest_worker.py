"""Runs models with nothing but onnxruntime, numpy and the shared library: what a user of another language has.

Arguments: the library, a folder with ``NAME.onnx`` and ``x.npz``, and the file to write the outputs to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    library, folder, output = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    inputs = dict(np.load(folder / "x.npz"))
    outputs = {}
    for path in sorted(folder.glob("*.onnx")):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(library)
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            outputs[path.stem] = np.array(str(error))
            continue
        is_half = session.get_inputs()[0].type == "tensor(float16)"
        for name, x in inputs.items():
            x = x.astype(np.float16) if is_half else x
            outputs[f"{path.stem}/{name}"] = np.concatenate(session.run(None, {"x": x}), axis=-1)
        outputs[f"{path.stem}/shapes"] = np.array([str(output.shape) for output in session.get_outputs()])
    np.savez(output, version=np.array(onnxruntime.__version__), **outputs)


if __name__ == "__main__":
    main()
