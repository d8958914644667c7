"""Damaged models through the command line: one clear sentence, or a model that computes the same. Never a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("mutation_worker.py")
FULL = bool(os.environ.get("SPARAMX_TEST_FULL"))
MODELS = int(os.environ.get("SPARAMX_TEST_COUNT") or (4000 if FULL else 500))
RUNS = int(os.environ.get("SPARAMX_TEST_COUNT") or (2000 if FULL else 200))
PER_PROCESS = 100
# Stages in which the process runs a damaged model in ONNX Runtime without an operator of ours.
NOT_OURS = ("running the original",)


def _outcomes(what: str, folder: Path, first: int, end: int) -> dict[int, tuple[str, str]]:
    """What was done to the model of each number, and what became of it."""
    outcomes: dict[int, tuple[str, str]] = {}
    while first < end:
        command = [sys.executable, "-P", str(WORKER), what, str(folder), str(first), str(end)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        damage = stage = ""
        for line in result.stdout.splitlines():
            number, kind, text = json.loads(line)
            if kind == "outcome":
                outcomes[number] = (damage, text)
                first, stage = number + 1, ""
            elif text.startswith("running the "):
                stage = text
            else:
                damage, stage = text, "converting" if what == "convert" else "opening the damaged"
        if result.returncode == 0:
            break
        # ONNX Runtime may die of a damaged model; that is not ours to judge.
        assert stage in NOT_OURS, f"{first} ({damage}) died while {stage}: {result.stderr[-2000:]}"
        outcomes[first] = (damage, "unusable: ONNX Runtime died")
        first += 1
    wrong = {number: outcome for number, outcome in outcomes.items() if outcome[1].startswith("WRONG")}
    assert not wrong, json.dumps(wrong, indent=1)
    return outcomes


def _kinds(outcomes: dict[int, tuple[str, str]]) -> Counter[str]:
    return Counter(outcome.partition(":")[0] for _, outcome in outcomes.values())


@pytest.mark.parametrize("first", range(0, MODELS, PER_PROCESS))
def test_damaged_models(tmp_path: Path, first: int) -> None:
    outcomes = _outcomes("convert", tmp_path, first, first + PER_PROCESS)
    assert sorted(outcomes) == list(range(first, first + PER_PROCESS))
    kinds = _kinds(outcomes)
    print(f"damaged models converted: {dict(kinds)}")
    # All kinds must have happened, or the damages did not reach what they are meant to reach.
    assert set(kinds) == {"refused", "same", "unusable"}
    assert min(kinds["refused"], kinds["same"]) >= 5, kinds


@pytest.mark.parametrize("first", range(0, RUNS, PER_PROCESS))
def test_damaged_converted_models(tmp_path: Path, first: int) -> None:
    """Operators of ours with attributes, inputs and weights that somebody else made up."""
    outcomes = _outcomes("run", tmp_path, first, first + PER_PROCESS)
    assert sorted(outcomes) == list(range(first, first + PER_PROCESS))
    kinds = _kinds(outcomes)
    print(f"damaged converted models run: {dict(kinds)}")
    assert set(kinds) == {"refused", "ran"}
    assert min(kinds.values()) >= 5, kinds
