"""The list of reasons is closed, explained and documented."""

from __future__ import annotations

import re
from pathlib import Path

from sparamx_onnx.graph_passes.plan import Action, NodePlan, Plan, Reason

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "conversion.md"


def test_every_reason_is_a_sentence() -> None:
    for reason in Reason:
        assert re.fullmatch(r"[A-Z].*\.", reason.text), reason


def test_every_reason_is_documented() -> None:
    section = DOCUMENTATION.read_text().partition("## Reasons")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(documented) == sorted(reason.value for reason in Reason)


def test_figures_that_are_unknown() -> None:
    plan = NodePlan("n", "MatMul", Action.CONVERTED, Reason.CONVERTED, weight="w", packed="p", bytes_before=100)
    assert plan.sparsity is None
    plans = Plan([plan])
    assert (plans.bytes_before, plans.bytes_after) == (100, None)
    plan.k, plan.n, plan.nnz, plan.bytes_after = 10, 10, 25, 70
    assert plan.sparsity == plans.sparsity == 0.75
    assert plan.sparsity_before is plans.sparsity_before is Plan().sparsity is None
    assert plans.bytes_after == 70
    assert Plan().to_json()["summary"] == {
        "nodes": 0,
        "converted": 0,
        "left_alone": 0,
        "reasons": {},
        "bytes_before": 0,
        "bytes_after": 0,
        "attention_converted": 0,
    }


def test_shared_weights_count_once() -> None:
    def plan(name: str) -> NodePlan:
        sizes = {"bytes_before": 100, "bytes_after": 40}
        return NodePlan(name, "MatMul", Action.CONVERTED, Reason.CONVERTED, weight="w", packed="p", **sizes)

    plans = Plan([plan("a"), plan("b"), NodePlan("c", "MatMul", Action.LEFT_ALONE, Reason.TWO_ACTIVATIONS)])
    assert (plans.bytes_before, plans.bytes_after) == (100, 40)
    assert plans.reasons == {Reason.CONVERTED: 2, Reason.TWO_ACTIVATIONS: 1}
