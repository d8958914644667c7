"""The result of a conversion as one HTML page."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

from sparamx_onnx.graph_passes.plan import Action, NodePlan, Plan
from sparamx_onnx.html_page import Cell, bar_chart, code, number_cell, page, table, text_cell
from sparamx_onnx.tables import duration, percent, size

if TYPE_CHECKING:
    from sparamx_onnx.conversion import ConversionResult

_BINS = 20
# A share of just below half counts as half.
_HARDLY = 1e-3


def report_page(result: ConversionResult) -> str:
    """The page.

    Args:
        result: What ``convert`` returned, also of a dry run or where nothing was converted.
    """
    plan = result.plan
    parts = [
        f"<h1>{code(result.model)}{f' → {code(result.output)}' if result.output else ''}</h1>",
        f"<p>{escape(_verdict(result))}</p>",
        _summary(result),
        _charts(plan),
        _layers(plan),
        _left_alone(plan),
        _attention(plan),
        _options(plan),
    ]
    return page(f"{result.model}: conversion", parts)


def _verdict(result: ConversionResult) -> str:
    if not result.plan.changes:
        return f"The model {result.nothing_to_do}"
    if result.dry_run:
        sentence = "" if result.prediction is None else f" {result.prediction.text}"
        return f"A dry run: nothing was written, and sizes are predicted.{sentence}"
    return f"Converted in {duration(result.seconds)}."


def _summary(result: ConversionResult) -> str:
    plan = result.plan
    already = len(plan.already_converted)
    rows = [
        ("Files", size(result.bytes_before), size(result.bytes_after)),
        ("Weights of the converted layers", size(plan.bytes_before), size(plan.bytes_after)),
        ("Zeros in them", percent(plan.sparsity_before), percent(plan.sparsity)),
        ("Linear layers that are sparse operators", str(already), str(already + len(plan.converted))),
        ("Matrix products left alone", "", str(len(plan.unconverted))),
    ]
    if plan.attention:
        rows.append(("Attention operators replaced", "", str(len(plan.converted_attention))))
    body = [
        [text_cell(name), Cell(escape(before), 0, True), Cell(escape(after), 0, True)] for name, before, after in rows
    ]
    return "<h2>The model</h2>" + table(["", "before", "after"], body)


# --- Charts -----------------------------------------------------------------------------------------------------------


def _charts(plan: Plan) -> str:
    nodes = plan.converted
    parts = []
    known = [node for node in nodes if node.sparsity is not None]
    if known:
        shares = [node.sparsity or 0.0 for node in known]
        counts = [0] * _BINS
        for share in shares:
            counts[min(int(share * _BINS + _HARDLY), _BINS - 1)] += 1
        bars = [
            ([float(count)], f"{100 * index // _BINS} to {100 * (index + 1) // _BINS} %, layers: {count}")
            for index, count in enumerate(counts)
        ]
        labels = [f"{100 * index // _BINS} %" if index % 2 == 0 else "" for index in range(_BINS)]
        parts.append("<h2>Layers by their share of zeros</h2>" + bar_chart(bars, "{:.0f}".format, labels, counts=True))
    if nodes:
        sizes = [
            (
                [float(node.bytes_before or 0), float(node.bytes_after or 0)],
                f"{node.label}: {size(node.bytes_before)} → {size(node.bytes_after)}",
            )
            for node in nodes
        ]
        key = '<p><span class="key" style="background: var(--before)"></span>before'
        key += '<span class="key" style="background: var(--after)"></span>after</p>'
        parts.append("<h2>Bytes per layer</h2>" + key + bar_chart(sizes, lambda value: size(round(value))))
    errors = [([node.error], f"{node.label}: {_error(node)}") for node in nodes if node.error is not None]
    if errors:
        parts.append("<h2>Error per layer</h2>" + _ERROR_MEANING + bar_chart(errors, "{:.2g}".format))
    return "\n".join(parts)


_ERROR_MEANING = "<p>How far pruning moved the layer's result on calibration inputs, relative to the result.</p>"


# --- Tables -----------------------------------------------------------------------------------------------------------


def _layers(plan: Plan) -> str:
    if not plan.converted:
        return ""
    calibrated = plan.is_calibrated
    heads = ["layer", "operator", "K", "N", "zeros before", "zeros after", "before", "after", "packed"]
    heads += ["error"] if calibrated else []
    rows = []
    for node in plan.converted:
        row = [
            Cell(code(node.label)),
            text_cell(node.op_type),
            number_cell(node.k, _plain),
            number_cell(node.n, _plain),
            number_cell(node.sparsity_before, percent),
            number_cell(node.sparsity, percent),
            number_cell(node.bytes_before, size),
            number_cell(node.bytes_after, size),
            text_cell(_packed(node)),
        ]
        if calibrated:
            row.append(Cell(_error(node), node.error, True))
        rows.append([*row, text_cell(_notes(node))])
    return "<h2>Converted layers</h2>" + table([*heads, "notes"], rows, sortable=True)


def _packed(node: NodePlan) -> str:
    words = [node.weight_type or ""]
    if node.group_size is not None:
        words.append(f"in groups of {node.group_size}")
    words.append(node.form or "")
    return " ".join(word for word in words if word)


def _notes(node: NodePlan) -> str:
    notes = [node.text if node.action is Action.PACKED_DENSE else node.detail]
    if node.prune_note:
        notes.append(f"Not pruned: {node.prune_note[0].lower()}{node.prune_note[1:]}")
    if node.epilogue != "none":
        notes.append(f"With {node.epilogue}.")
    if node.fused:
        notes.append(f"Computed by {node.fused}.")
    if node.keeps_dense:
        notes.append("Its dense weight stays, because something else uses it.")
    if node.keeps_codes:
        notes.append("Keeps the codes that it had.")
    return " ".join(note for note in notes if note)


def _left_alone(plan: Plan) -> str:
    nodes = plan.unconverted
    if not nodes:
        return ""
    rows = [[Cell(code(node.label)), text_cell(node.op_type), text_cell(node.text)] for node in nodes]
    counts = "".join(
        f"<li>{sum(node.reason is reason for node in nodes)}: {escape(reason.text)}</li>"
        for reason in plan.reasons
        if any(node.reason is reason for node in nodes)
    )
    return f"<h2>Left alone</h2><ul>{counts}</ul>" + table(["node", "operator", "why"], rows, sortable=True)


def _attention(plan: Plan) -> str:
    if plan.no_attention:
        return f"<h2>Attention</h2><p>{escape(plan.no_attention)}</p>"
    if not plan.attention:
        return ""
    rows = [
        [
            Cell(code(node.node)),
            text_cell(node.op_type),
            text_cell("left alone" if node.action is Action.LEFT_ALONE else "replaced"),
            text_cell(node.text),
        ]
        for node in plan.attention
    ]
    return "<h2>Attention</h2>" + table(["node", "operator", "", "why"], rows, sortable=True)


def _options(plan: Plan) -> str:
    rows = [
        [text_cell(name.replace("_", " ")), Cell(code(value if isinstance(value, str) else json.dumps(value)))]
        for name, value in plan.options.items()
        if value is not None
    ]
    return "<h2>Options</h2>" + table(["option", "value"], rows)


def _plain(number: int | None) -> str:
    return "-" if number is None else str(number)


def _error(node: NodePlan) -> str:
    return "-" if node.error is None else f"{node.error:.4f}"
