"""Opens and runs a model for every damaged blob it is told of; dies where the library would.

Argument: a folder with ``blob.npy``, ``damages.json`` (a list of damages) and room for models. A damage is an object:
``bytes`` ([[offset, value], ...] to overwrite), ``keep`` (bytes to keep; null for all), ``follow`` (whether the
operator's K and N say what the damaged header says), ``external`` (whether the weight lies in a mapped file) and
``cut`` (whether the mapped file is shorter than the model says). Prints the number of each damage before it tries it,
and then what became of it.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

import sparamx_onnx

ROWS = (1, 5)
_LARGEST_K = 100_000


def model(blob: bytes, k: int, n: int, data: Path | None, stated: int) -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[stated])
    if data is None:
        weight.raw_data = blob
    else:
        data.write_bytes(blob)
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", data.name), ("offset", "0"), ("length", str(stated))):
            weight.external_data.add(key=key, value=value)
    node = helper.make_node("SparseAMXMatMul", ["x", "w"], ["y"], "damaged", domain="com.sparamx", K=k, N=n)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "k"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.sparamx", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()


def attempt(folder: Path, original: bytes, damage: dict) -> str:
    blob = bytearray(original)
    for offset, value in damage["bytes"]:
        blob[offset] = value
    if damage["keep"] is not None:
        del blob[damage["keep"] :]
    header = blob if damage["follow"] and len(blob) >= 40 else original
    k, n = struct.unpack_from("<QQ", header, 24)
    k, n = min(k, 2**63 - 1), min(n, 2**63 - 1)
    data = folder / "m.data" if damage["external"] else None
    stated = len(original) if damage["cut"] else len(blob)
    (folder / "m.onnx").write_bytes(model(bytes(blob), k, n, data, stated))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    try:
        session = sparamx_onnx.InferenceSession(folder / "m.onnx", options)
        for rows in ROWS:
            x = np.ones((rows, k if k < _LARGEST_K else 1), np.float32)
            y = session.run(None, {"x": x})[0]
            if y.shape != (rows, n) or y.dtype != np.float32:
                return f"WRONG: {y.dtype} {y.shape} for {rows} x {n}"
    except Exception as error:
        message = str(error)
        return "refused: " + message if message else "WRONG: refused without a word"
    return "ran"


def main() -> None:
    folder = Path(sys.argv[1])
    original = np.load(folder / "blob.npy").tobytes()
    for number, damage in enumerate(json.loads((folder / "damages.json").read_text())):
        print(number, flush=True)
        print(json.dumps(attempt(folder, original, damage)), flush=True)


if __name__ == "__main__":
    main()
