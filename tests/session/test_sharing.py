"""Weights are used where they lie in the page cache: loading costs no memory, and processes share them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from sparamx_onnx.ops.packing import Form, PackOptions, WeightType, pack_into, packed_size

MB = 10**6
# Dense fp32: a known number of bytes, whatever the values. Several matrices, because none is that large in real models.
K, N, LAYERS = 5120, 5120, 3

_PROCESS = """
import json
import re
import sys

import numpy as np
import onnxruntime
import sparamx_onnx

def memory():
    rollup = dict(re.findall(r"^(\\w+): +(\\d+) kB", open("/proc/self/smaps_rollup").read(), re.M))
    mapped, inside = {"Pss": 0, "Rss": 0, "Private_Clean": 0, "Private_Dirty": 0}, False
    for line in open("/proc/self/smaps"):
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.rstrip().endswith(sys.argv[1] + ".data")
        elif inside and line.split(":")[0] in mapped:
            mapped[line.split(":")[0]] += int(line.split()[1]) * 1024
    return {"anonymous": int(rollup["Anonymous"]) * 1024, "mapped": mapped}

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
before = memory()
session = sparamx_onnx.InferenceSession(sys.argv[1], options)
loaded = memory()
rng = np.random.default_rng(0)
for rows in (1, 16):
    x = rng.standard_normal((rows, session.get_inputs()[0].shape[1]), np.float32)
    y = session.run(None, {"x": x})[0]
print(json.dumps({"before": before, "loaded": loaded, "sum": float(y.sum())}), flush=True)
for _ in sys.stdin:
    print(json.dumps(memory()), flush=True)
"""


def test_two_processes_share_the_weights_of_a_model(
    tmp_path: Path,
    make_layer: Callable[..., object],
    make_model: Callable[..., onnx.ModelProto],
    save_model: Callable[..., Path],
) -> None:
    options = PackOptions(WeightType.FP32, Form.DENSE)
    row = np.random.default_rng(0).standard_normal(2 * N, np.float32)
    # Overlapping rows of one vector: a full matrix without the memory of one.
    weight = np.lib.stride_tricks.as_strided(row, (K, N), (4, 4), writeable=False)
    layer = make_layer(16, 16)
    blob = np.empty(packed_size(weight, options), np.uint8)
    pack_into(weight, options, blob)
    layers = [type(layer)(blob, K, N) for _ in range(LAYERS)]
    size = LAYERS * blob.size
    assert size > 300 * MB
    path = save_model(make_model(layers), tmp_path / "big.onnx")
    del blob, layers

    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROCESS, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        first = [json.loads(process.stdout.readline()) for process in processes]
        # Both have read all of their weights and are still there: now the kernel's books show who holds what.
        now = []
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
            now.append(json.loads(process.stdout.readline()))

    assert first[0]["sum"] == first[1]["sum"]
    for start, end in zip(first, now, strict=True):
        # Nothing of the size of the weights on the heap, neither after loading nor after running.
        assert start["loaded"]["anonymous"] - start["before"]["anonymous"] < 30 * MB
        assert end["anonymous"] - start["before"]["anonymous"] < 60 * MB
        mapped = end["mapped"]
        assert mapped["Rss"] > 0.95 * size
        assert mapped["Private_Clean"] + mapped["Private_Dirty"] < 0.05 * size
        assert mapped["Pss"] < 0.55 * size
