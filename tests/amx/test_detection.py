"""Where AMX is missing, refused or half there, the library loads, runs something else and says why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sparamx_onnx.ops import library

_LEVELS = {level["name"]: level for level in library.cpu_info()["levels"]}
# The kernels need AVX-512 beside tiles: the emulator helps only a CPU that has that.
_BEST_WITHOUT = [name for name, level in _LEVELS.items() if level["supported"] and name != "amx"][-1]
_BEST = "amx" if _BEST_WITHOUT == "avx512_bf16" else _BEST_WITHOUT
_REFUSAL = "the operating system refused AMX to this process (arch_prctl: Operation not permitted)"
_MULTIPLY = """
import numpy as np
from sparamx_onnx.ops import packing
from sparamx_onnx.ops.packing import PackOptions, WeightType
w = np.random.default_rng(0).standard_normal((200, 48), np.float32)
x = np.random.default_rng(1).standard_normal((40, 200), np.float32)
for weight_type in WeightType:
    y, path = packing.matmul(packing.pack(w, PackOptions(weight_type)), x)
    assert np.abs(y - x @ w).max() < (5 if weight_type is WeightType.INT4 else 0.7), weight_type
    print(weight_type.value, path)
"""
# Loads a filter that lets Linux refuse arch_prctl(ARCH_REQ_XCOMP_PERM), and goes on with what the arguments say.
_WITH_SECCOMP = """
import ctypes, runpy, struct, sys
load, jump, end = 0x20, 0x15, 0x06  # words of struct seccomp_data: 0 the call's number, 16 its first argument
refuse, allow = 0x50001, 0x7FFF0000
code = [(load, 0, 0, 0), (jump, 0, 3, 158), (load, 0, 0, 16), (jump, 0, 1, 0x1023)]
code += [(end, 0, 0, refuse), (end, 0, 0, allow)]
program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *instruction) for instruction in code))
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert prctl(22, 2, ctypes.byref(Filter(len(code), ctypes.addressof(program)))) == 0, "PR_SET_SECCOMP"
sys.argv = ["sparamx-onnx", "info", "--json"]
runpy.run_module("sparamx_onnx", run_name="__main__")
"""


def _info(run_python, pretend: str | None, **variables: str) -> tuple[dict[str, Any], str]:
    result = run_python(pretend, "-m", "sparamx_onnx", "info", "--json", **variables)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["cpu"], result.stderr


def _amx(cpu: dict[str, Any]) -> dict[str, Any]:
    return next(level for level in cpu["levels"] if level["name"] == "amx")


def test_the_emulator_shows_amx(run_python) -> None:
    cpu, log = _info(run_python, "full")
    assert {"amx_tile", "amx_bf16", "amx_int8"} <= set(cpu["features"])
    assert cpu["level"] == _BEST
    assert _amx(cpu)["supported"] is (_BEST == "amx")
    assert log == ""


@pytest.mark.parametrize(
    ("pretend", "lacks"),
    [
        ("absent", "amx_tile, amx_bf16, amx_int8"),
        ("unsaved", "amx_tile, amx_bf16, amx_int8"),
        ("no_bf16", "amx_bf16"),
        ("no_int8", "amx_int8"),
    ],
)
def test_without_all_of_amx_another_level_runs(run_python, pretend: str, lacks: str) -> None:
    cpu, log = _info(run_python, pretend)
    assert cpu["level"] == _BEST_WITHOUT
    assert _amx(cpu)["supported"] is False
    assert _amx(cpu)["reason"].endswith(lacks)
    assert log == ""


def test_a_refusal_is_one_line_and_avx512_runs(run_python) -> None:
    cpu, log = _info(run_python, "refused")
    assert cpu["level"] == _BEST_WITHOUT
    assert _amx(cpu)["supported"] is False
    assert _amx(cpu)["reason"] == _REFUSAL
    assert log == f"sparamx-onnx: {_REFUSAL}; using AVX-512 instead\n"


def test_a_real_kernel_refuses(run_python, cpu_flags: set[str]) -> None:
    result = run_python(None, "-c", _WITH_SECCOMP)
    assert result.returncode == 0, result.stderr
    cpu = json.loads(result.stdout)["cpu"]
    assert cpu["level"] == _BEST_WITHOUT
    has_amx = "amx_tile" in cpu_flags
    assert result.stderr == (f"sparamx-onnx: {_REFUSAL}; using AVX-512 instead\n" if has_amx else "")


@pytest.mark.parametrize("pretend", ["full", "absent", "refused", "unsaved", "no_bf16", "no_int8"])
def test_products_are_right_whatever_the_cpu_says(run_python, pretend: str) -> None:
    result = run_python(pretend, "-c", _MULTIPLY)
    assert result.returncode == 0, result.stderr
    paths = dict(line.split() for line in result.stdout.splitlines())
    assert set(paths) == {"fp32", "bf16", "int8", "int4"}
    uses_amx = {weight_type for weight_type, path in paths.items() if path == "amx"}
    assert bool(uses_amx) is (pretend == "full" and _BEST == "amx")
    assert len(result.stderr.splitlines()) == (pretend == "refused")


@pytest.mark.parametrize("pretend", ["absent", "refused", "unsaved", "no_bf16"])
def test_amx_that_is_not_there_cannot_be_forced(run_python, pretend: str) -> None:
    result = run_python(pretend, "-c", _MULTIPLY, SPARAMX_ISA="amx")
    assert result.returncode == 1
    reason = _REFUSAL if pretend == "refused" else "this CPU lacks"
    assert f"SPARAMX_ISA=amx cannot run here: {reason}" in result.stderr


def test_forced_amx_runs_fp32_weights_with_avx512_and_says_so(run_python) -> None:
    cpu, _ = _info(run_python, "full", SPARAMX_ISA="amx")
    if _BEST != "amx":
        assert "SPARAMX_ISA=amx cannot run here" in cpu["reason"]
        return
    assert cpu["kernels"]["fp32"] == {"1": "avx512"}
    assert {path for name in ("bf16", "int8", "int4") for path in cpu["kernels"][name].values()} == {"amx"}
