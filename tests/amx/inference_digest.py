"""Prints a digest of what ONNX Runtime computes: `inference_digest.py LIBRARY FOLDER [RUNS]`.

For every NAME.onnx of the folder with its inputs in NAME.npz; all runs must give the same bits. Needs numpy and
onnxruntime only, so that it runs in a virtual machine too.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def digest(library: str, model: Path, runs: int) -> str:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    with np.load(model.with_suffix(".npz")) as inputs:
        feeds = dict(inputs)
    digests = set()
    for _ in range(runs):
        outputs = session.run(None, feeds)
        digests.add(hashlib.sha256(b"".join(np.asarray(y).tobytes() for y in outputs)).hexdigest())
    if len(digests) != 1:
        raise SystemExit(f"{model.name}: {len(digests)} different results in {runs} runs")
    return digests.pop()


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[2]).glob("*.onnx")):
        print(path.stem, digest(sys.argv[1], path, int(sys.argv[3]) if len(sys.argv) > 3 else 2), flush=True)
