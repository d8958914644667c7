"""Models that several tests use, exported and converted once per run."""

from collections.abc import Callable
from pathlib import Path

import pytest

import sparamx_onnx
from sparamx_onnx.models import llama, minilm, tinylm

Convert = Callable[[Path, str, str], Path]


@pytest.fixture(scope="session")
def minilm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    minilm.main([str(path)])
    return path


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "llama.onnx"
    llama.export(path, llama.TINY)
    return path


@pytest.fixture(scope="session")
def convert_once() -> Convert:
    """Converts a model with (method, weights) unless it has been, and returns where the result lies."""

    def convert(model: Path, method: str, weights: str) -> Path:
        output = model.with_name(f"{model.stem}.{method}.{weights}.onnx")
        if not output.exists():
            sparamx_onnx.convert(model, output, method=method, weights=weights)
        return output

    return convert


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinylm, a trained decoder, as onnxruntime-genai's own builder writes its folder."""
    folder = tmp_path_factory.mktemp("tinylm")
    tinylm.main([str(folder)])
    return folder
