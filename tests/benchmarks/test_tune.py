"""The tuning program makes the table that its measurements say, and its file compiles into the library as it is."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = ["avx512_vbmi2", "avx512_bf16", "amx"]
ROWS = [1, 4, 8, 32, 33, 512]


@pytest.fixture(scope="module")
def tune() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tune  # type: ignore[import-not-found, unused-ignore]
    finally:
        sys.path.pop(0)
    return tune


def test_it_knows_every_level_but_the_lowest(tune: Any) -> None:
    table = (ROOT / "cpp" / "kernels" / "kernel_table.h").read_text()
    assert {"kScalarLevel", *tune.LEVELS.values()} == set(re.findall(r"extern const Level (\w+);", table))


def cells(weights: str, times: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Two matrices, of which the second takes twice as long, with the given times by kernel and M."""
    return [
        {"weights": weights, "k": k, "n": 64, "sparsity": 0.5, "m": m}
        | {"seconds": {name: by_m[m] * k for name, by_m in times.items()}}
        for k in (1, 2)
        for m in ROWS
    ]


def test_a_rule_for_every_stretch_where_another_kernel_is_faster(tune: Any) -> None:
    same = dict.fromkeys(ROWS, 1.0)
    times = {
        "avx512_vbmi2 int8": same | {1: 0.5, 4: 0.8},
        "amx int8": same,
        "amx bf16": same | {33: 0.9, 512: 0.25},
    }
    found = tune.rules(cells("int4", times), LEVELS)
    assert [(rule.best, rule.first, rule.last, rule.level, rule.activations) for rule in found] == [
        ("amx", 1, 7, "avx512_vbmi2", "int8"),
        ("amx", 33, None, "amx", "bf16"),
    ]
    assert [rule.faster for rule in found] == pytest.approx([2, 4])


def test_lower_cpus_get_rules_from_lower_levels_only(tune: Any) -> None:
    times = {
        "avx512_vbmi2 bf16": dict.fromkeys(ROWS, 1.0),
        "avx512_bf16 bf16": dict.fromkeys(ROWS, 2.0),
        "amx bf16": dict.fromkeys(ROWS, 0.1),
    }
    (rule,) = tune.rules(cells("bf16", times), LEVELS)
    assert (rule.best, rule.first, rule.last, rule.level) == ("avx512_bf16", 1, None, "avx512_vbmi2")


def test_what_is_faster_by_less_than_noise_gets_no_rule_unless_for_every_matrix(tune: Any) -> None:
    times = {"avx512_vbmi2 int8": dict.fromkeys(ROWS, 0.98), "amx int8": dict.fromkeys(ROWS, 1.0)}
    measured = cells("int8", times)
    (rule,) = tune.rules(measured, LEVELS)
    assert (rule.best, rule.first, rule.last, rule.level) == ("amx", 1, None, "avx512_vbmi2")
    for cell in measured[: len(ROWS)]:
        cell["seconds"]["avx512_vbmi2 int8"] = 1.01
    assert tune.rules(measured, LEVELS) == []


def test_regret_names_the_matrix_that_the_rules_serve_worst(tune: Any) -> None:
    measured = cells("int8", {"avx512_vbmi2 int8": dict.fromkeys(ROWS, 1.0), "amx int8": dict.fromkeys(ROWS, 0.5)})
    measured[3]["seconds"]["avx512_vbmi2 int8"] = 0.4
    cost, cell, chosen, best = tune.regret(measured, LEVELS)[0]
    assert (cost, cell, chosen, best) == (pytest.approx(1.25), measured[3], "amx int8", "avx512_vbmi2 int8")


def cpuinfo_vendor() -> str:
    found = re.search(r"^vendor_id\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def test_it_measures_and_prints_the_table(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "tune.py"), "--weights", "int4", "--shapes", "64x64"]
    command += ["--m", "1", "40", "--file-bytes", "100000", "--json", str(tmp_path / "out.json")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    if cpuinfo_vendor() not in ("GenuineIntel", "AuthenticAMD"):
        assert (first.returncode, "no table for CPUs of" in first.stderr) == (1, True)
        return
    assert first.returncode == 0, first.stderr
    assert "// Made by `python benchmarks/tune.py --write` on" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout.split("// Made")[1] == first.stdout.split("// Made")[1]


@pytest.mark.parametrize("vendor", ["amd", "intel"])
def test_the_tables_say_where_they_are_from_and_name_their_own_vendor(vendor: str) -> None:
    text = (ROOT / "cpp" / "runtime" / f"choice_{vendor}.inc").read_text()
    assert text.startswith("// ")
    assert set(re.findall(r"Vendor::k(\w+)", text)) <= {vendor.capitalize()}
