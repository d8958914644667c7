"""The speed model counts what the kernels do, and its bounds move the way they must."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

_PATH = Path(__file__).parents[2] / "benchmarks" / "amx_model.py"


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("amx_model", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["amx_model"] = module
    spec.loader.exec_module(module)
    return module


# What AmxKernels.* in tests/cpp counts for these.
@pytest.mark.parametrize(
    ("weights", "m", "products"),
    [("bf16", 64, 4 * 256 * 128), ("int8", 64, 4 * 256 * 64), ("int4", 16, 256 * 128), ("int4", 33, 3 * 256 * 128)],
)
def test_products_are_those_that_the_kernels_run(model: ModuleType, weights: str, m: int, products: int) -> None:
    assert model.tile_products(weights, m, 4096, 4096) == products


def test_one_row_is_bound_by_memory_and_many_by_the_tile_unit(model: ModuleType) -> None:
    cpu = model.CPUS["sapphire-rapids"]
    for weights in model.TYPES:
        assert model.predict(cpu, weights, 0.5, 1, 4096, 14336, 56).bound == "memory"
        assert model.predict(cpu, weights, 0.5, 512, 4096, 14336, 56).bound == "tile products"


def test_more_zeros_and_more_cores_never_cost(model: ModuleType) -> None:
    cpu = model.CPUS["sapphire-rapids"]
    for weights in model.TYPES:
        for m in (1, 16, 32, 33, 512):
            times = [model.predict(cpu, weights, 0.5, m, 4096, 4096, cores).milliseconds for cores in cpu.cores]
            assert times == sorted(times, reverse=True)
            half, most = (model.predict(cpu, weights, zeros, m, 4096, 4096, 8) for zeros in (0.5, 0.9))
            assert most.milliseconds <= half.milliseconds


def test_the_command_says_that_it_is_a_model(model: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main([]) == 0
    assert capsys.readouterr().out.startswith("A model, not a measurement: Sapphire Rapids")
    assert model.main(["--cpu", "granite-rapids-2", "--json", "--m", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert len(found) == 3 * 2 * 2
    assert all(one["bound"] in ("memory", "tile products", "tile loads", "expansion") for one in found)
