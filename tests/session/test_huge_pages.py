"""SPARAMX_HUGE_PAGES: weights are copied into huge pages where it is asked for, and compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

SIZE, LAYERS = 3072, 3

_PROCESS = """
import hashlib
import json
import re
import sys

import numpy as np
import sparamx_onnx

def memory():
    rollup = dict(re.findall(r"^(\\w+): +(\\d+) kB", open("/proc/self/smaps_rollup").read(), re.M))
    return {name: int(rollup[name]) * 1024 for name in ("Anonymous", "AnonHugePages")}

before = memory()
session = sparamx_onnx.InferenceSession(sys.argv[1])
loaded = memory()
x = np.random.default_rng(0).standard_normal((3, session.get_inputs()[0].shape[1]), np.float32)
y = hashlib.sha256(session.run(None, {"x": x})[0].tobytes()).hexdigest()
del session
print(json.dumps({"before": before, "loaded": loaded, "after": memory(), "y": y}))
"""


@pytest.fixture(scope="module")
def layers(make_layer: Callable[..., Any]) -> list[Any]:
    return [make_layer(SIZE, SIZE, seed=index) for index in range(LAYERS)]


@pytest.fixture(scope="module")
def model(
    layers: list[Any],
    make_model: Callable[..., onnx.ModelProto],
    save_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return save_model(make_model(layers), tmp_path_factory.mktemp("huge") / "model.onnx")


def _run(model: Path, value: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: text for name, text in os.environ.items() if name != "SPARAMX_HUGE_PAGES"}
    if value is not None:
        environment["SPARAMX_HUGE_PAGES"] = value
    command = [sys.executable, "-P", "-c", _PROCESS, str(model)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _grown(report: dict[str, Any], when: str, what: str) -> int:
    grown: int = report[when][what] - report["before"][what]
    return grown


def test_weights_are_copied_and_compute_the_same(model: Path, layers: list[Any]) -> None:
    size = sum(layer.blob.size for layer in layers)
    mapped, zero, copied = (json.loads(_run(model, value).stdout) for value in (None, "0", "1"))
    assert mapped["y"] == zero["y"] == copied["y"]
    assert _grown(mapped, "loaded", "Anonymous") < 0.5 * size
    assert _grown(zero, "loaded", "Anonymous") < 0.5 * size
    assert _grown(copied, "loaded", "Anonymous") > size
    assert _grown(copied, "after", "Anonymous") < 0.5 * size


def test_the_copies_lie_in_huge_pages(model: Path, layers: list[Any]) -> None:
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.exists() or "[never]" in allowed.read_text():
        pytest.skip("this system gives no huge pages: transparent_hugepage is absent or set to never")
    size = sum(layer.blob.size for layer in layers)
    copied = json.loads(_run(model, "1").stdout)
    assert _grown(copied, "loaded", "AnonHugePages") > 0.7 * size


def test_any_other_value_is_refused(model: Path) -> None:
    result = _run(model, "yes")
    assert result.returncode != 0
    assert "SPARAMX_HUGE_PAGES=yes is neither 0 nor 1" in result.stderr
    assert "layer0" in result.stderr
