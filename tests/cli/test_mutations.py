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
MODELS = 4000 if os.environ.get("SPARAMX_TEST_FULL") else 500
PER_PROCESS = 100


def _outcomes(folder: Path, first: int, end: int) -> dict[int, tuple[str, str]]:
    """What was done to the model of each number, and what became of it."""
    outcomes: dict[int, tuple[str, str]] = {}
    while first < end:
        command = [sys.executable, "-P", str(WORKER), str(folder), str(first), str(end)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        damage = stage = ""
        for line in result.stdout.splitlines():
            number, kind, text = json.loads(line)
            if kind == "outcome":
                outcomes[number] = (damage, text)
                first, stage = number + 1, ""
            elif text == "running the original" or text == "running the converted":
                stage = text
            else:
                damage, stage = text, "converting"
        if result.returncode == 0:
            break
        # ONNX Runtime may die of a damaged model; that is not ours to judge.
        assert stage == "running the original", f"{first} ({damage}) died while {stage}: {result.stderr[-2000:]}"
        outcomes[first] = (damage, "unusable: ONNX Runtime died")
        first += 1
    return outcomes


@pytest.mark.parametrize("first", range(0, MODELS, PER_PROCESS))
def test_damaged_models(tmp_path: Path, first: int) -> None:
    outcomes = _outcomes(tmp_path, first, first + PER_PROCESS)
    assert sorted(outcomes) == list(range(first, first + PER_PROCESS))
    wrong = {number: outcome for number, outcome in outcomes.items() if outcome[1].startswith("WRONG")}
    assert not wrong, json.dumps(wrong, indent=1)
    # All kinds must have happened, or the damages did not reach what they are meant to reach.
    kinds = Counter(outcome.partition(":")[0] for _, outcome in outcomes.values())
    assert set(kinds) == {"refused", "same", "unusable"}
    assert min(kinds["refused"], kinds["same"]) >= 5, kinds
