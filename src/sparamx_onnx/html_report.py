"""The result of a conversion as one HTML page that needs no other file and no network.

Without JavaScript everything is there except that the tables can be sorted.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, TypeVar

from sparamx_onnx.graph_passes.attention_plan import AttentionPlan
from sparamx_onnx.graph_passes.plan import Action, NodePlan, Plan, Reason
from sparamx_onnx.tables import duration, percent, size

if TYPE_CHECKING:
    from sparamx_onnx.conversion import ConversionResult

Number = TypeVar("Number", int | None, float | None)

_BINS = 20
_CHART_WIDTH, _CHART_HEIGHT = 760, 170
_LEFT, _BOTTOM, _TOP = 64, 22, 8
_NARROWEST_BAR = 5
_ALIGNMENT = {False: "text", True: "number"}
# By how many bars stand side by side: one, or before and after.
_COLOURS = {1: ("after",), 2: ("before", "after")}

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #d0d7de; --before: #9aa4af; --after: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --faint: #444c56; --before: #768390; --after: #56b4e9; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--faint); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: bold; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
code { font-size: .92em; overflow-wrap: anywhere; unicode-bidi: isolate; }
svg { display: block; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.before { fill: var(--before); } .after { fill: var(--after); } .axis { stroke: var(--faint); }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
""".strip()

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => {
        const cell = row.cells[column];
        return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
      };
      const order = (a, b) => typeof a === "number" ? a - b : a.localeCompare(b);
      body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b))));
    });
  });
}
""".strip()


@dataclass(frozen=True)
class _Cell:
    """A cell of a table.

    Attributes:
        html: What it shows.
        value: What a number is sorted by; None for text. An absent number sorts below all others.
        is_number: Whether it stands at the right.
    """

    html: str
    value: float | None = None
    is_number: bool = False

    def __str__(self) -> str:
        if not self.is_number:
            return f"<td>{self.html}</td>"
        return f'<td class="number" data-value="{-1 if self.value is None else self.value:.9g}">{self.html}</td>'


def report_page(result: ConversionResult) -> str:
    """The page.

    Args:
        result: What ``convert`` returned, also of a dry run or where nothing was converted.
    """
    plan = result.plan
    parts = [
        f"<h1>{_code(result.model)}{f' → {_code(result.output)}' if result.output else ''}</h1>",
        f"<p>{escape(_verdict(result))}</p>",
        _summary(result),
        _charts(plan),
        _layers(plan),
        _left_alone(plan),
        _attention(plan.attention),
        _options(plan),
    ]
    script_hash = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(result.model)}: conversion</title>",
            f"<style>\n{_STYLE}\n</style>\n</head>\n<body>",
            *(part for part in parts if part),
            f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def _verdict(result: ConversionResult) -> str:
    if not result.plan.changes:
        what = "is converted already" if result.already_converted else "has no linear layer to convert"
        return f"The model {what}; nothing was written."
    if result.dry_run:
        sentence = "" if result.prediction is None else f" {result.prediction.text}"
        return f"A dry run: nothing was written, and sizes are predicted.{sentence}"
    return f"Converted in {duration(result.seconds)}."


def _summary(result: ConversionResult) -> str:
    plan = result.plan
    done = plan.converted
    already = sum(node.reason is Reason.ALREADY_CONVERTED for node in plan)
    rows = [
        ("Files", size(result.bytes_before), size(result.bytes_after)),
        ("Weights of the converted layers", size(plan.bytes_before), size(plan.bytes_after)),
        ("Zeros in them", percent(_share(done, "nnz_before")), percent(_share(done, "nnz"))),
        ("Linear layers that are sparse operators", str(already), str(already + len(done))),
        ("Matrix products left alone", "", str(len(plan.left_alone) - already)),
    ]
    if plan.attention:
        rows.append(("Attention operators replaced", "", str(len(plan.converted_attention))))
    body = [
        [_text(name), _Cell(escape(before), 0, True), _Cell(escape(after), 0, True)] for name, before, after in rows
    ]
    return "<h2>The model</h2>" + _table(["", "before", "after"], body)


def _share(nodes: Iterable[NodePlan], name: str) -> float | None:
    """The share of zeros in all weights together, by a count of non-zeros; None where one is unknown."""
    total = nonzero = 0
    for node in nodes:
        count: int | None = getattr(node, name)
        if count is None or node.k is None or node.n is None:
            return None
        total += node.k * node.n
        nonzero += count
    return 1 - nonzero / total if total else None


# --- Charts -----------------------------------------------------------------------------------------------------------


def _charts(plan: Plan) -> str:
    nodes = plan.converted
    parts = []
    known = [node for node in nodes if node.sparsity is not None]
    if known:
        shares = [node.sparsity or 0.0 for node in known]
        counts = [0] * _BINS
        for share in shares:
            counts[min(int(share * _BINS), _BINS - 1)] += 1
        bars = [
            ([float(count)], f"{100 * index // _BINS} to {100 * (index + 1) // _BINS} %: {count} layers")
            for index, count in enumerate(counts)
        ]
        labels = [f"{100 * index // _BINS} %" if index % 2 == 0 else "" for index in range(_BINS)]
        parts.append("<h2>Layers by their share of zeros</h2>" + _bars(bars, "{:.0f}".format, labels))
    if nodes:
        sizes = [
            (
                [float(node.bytes_before or 0), float(node.bytes_after or 0)],
                f"{_name(node)}: {size(node.bytes_before)} → {size(node.bytes_after)}",
            )
            for node in nodes
        ]
        key = '<p><span class="key" style="background: var(--before)"></span>before'
        key += '<span class="key" style="background: var(--after)"></span>after</p>'
        parts.append("<h2>Bytes per layer</h2>" + key + _bars(sizes, lambda value: size(round(value))))
    errors = [([node.error], f"{_name(node)}: {_error(node)}") for node in nodes if node.error is not None]
    if errors:
        parts.append("<h2>Error per layer</h2>" + _ERROR_MEANING + _bars(errors, "{:.2g}".format))
    return "\n".join(parts)


_ERROR_MEANING = "<p>How far pruning moved the layer's result on calibration inputs, relative to the result.</p>"


def _bars(
    bars: Sequence[tuple[Sequence[float], str]], label: Callable[[float], str], below: Sequence[str] | None = None
) -> str:
    """A bar chart: for each place the values side by side and what a pointer on them is told."""
    slot = max((_CHART_WIDTH - _LEFT) / len(bars), _NARROWEST_BAR * len(bars[0][0]) + 1)
    slot = min(slot, 60.0)
    width = _LEFT + slot * len(bars)
    height = _CHART_HEIGHT - _TOP - _BOTTOM
    top = max((value for values, _ in bars for value in values), default=0.0) or 1.0
    marks = []
    for part in (0.0, 0.5, 1.0):
        y = _TOP + (1 - part) * height
        marks.append(f'<line class="axis" x1="{_LEFT}" x2="{width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label(part * top))}</text>')
    for index, (values, title) in enumerate(bars):
        bar = 0.85 * slot / len(values)
        rects = "".join(
            f'<rect class="{_COLOURS[len(values)][number]}"'
            f' x="{_LEFT + index * slot + number * bar:.1f}" width="{bar:.1f}"'
            f' y="{_TOP + (1 - value / top) * height:.1f}" height="{value / top * height:.1f}"/>'
            for number, value in enumerate(values)
        )
        marks.append(f"<g><title>{escape(title)}</title>{rects}</g>")
        if below is not None and below[index]:
            marks.append(f'<text x="{_LEFT + index * slot:.1f}" y="{_CHART_HEIGHT - 6}">{escape(below[index])}</text>')
    return (
        f'<div class="wide"><svg role="img" width="{width:.0f}" height="{_CHART_HEIGHT}"'
        f' viewBox="0 0 {width:.0f} {_CHART_HEIGHT}">{"".join(marks)}</svg></div>'
    )


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
            _Cell(_code(_name(node))),
            _text(node.op_type),
            _number(node.k, _plain),
            _number(node.n, _plain),
            _number(node.sparsity_before, percent),
            _number(node.sparsity, percent),
            _number(node.bytes_before, size),
            _number(node.bytes_after, size),
            _text(_packed(node)),
        ]
        if calibrated:
            row.append(_Cell(_error(node), node.error, True))
        rows.append([*row, _text(_notes(node))])
    return "<h2>Converted layers</h2>" + _table([*heads, "notes"], rows, sortable=True)


def _packed(node: NodePlan) -> str:
    words = [node.weight_type or ""]
    if node.group_size is not None:
        words.append(f"in groups of {node.group_size}")
    words.append("dense" if node.action is Action.PACKED_DENSE else "sparse")
    return " ".join(words)


def _notes(node: NodePlan) -> str:
    notes = [node.text if node.action is Action.PACKED_DENSE else node.detail]
    if node.prune_note:
        notes.append(f"Not pruned: {node.prune_note}")
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
    nodes = [node for node in plan.left_alone if node.reason is not Reason.ALREADY_CONVERTED]
    if not nodes:
        return ""
    rows = [[_Cell(_code(_name(node))), _text(node.op_type), _text(node.text)] for node in nodes]
    counts = "".join(
        f"<li>{sum(node.reason is reason for node in nodes)}: {escape(reason.text)}</li>"
        for reason in plan.reasons
        if any(node.reason is reason for node in nodes)
    )
    return f"<h2>Left alone</h2><ul>{counts}</ul>" + _table(["node", "operator", "why"], rows, sortable=True)


def _attention(plans: Sequence[AttentionPlan]) -> str:
    if not plans:
        return ""
    rows = [
        [
            _Cell(_code(node.node)),
            _text(node.op_type),
            _text("left alone" if node.action is Action.LEFT_ALONE else "replaced"),
            _text(node.text),
        ]
        for node in plans
    ]
    return "<h2>Attention</h2>" + _table(["node", "operator", "", "why"], rows, sortable=True)


def _options(plan: Plan) -> str:
    rows = [
        [_text(name.replace("_", " ")), _Cell(_code(value if isinstance(value, str) else json.dumps(value)))]
        for name, value in plan.options.items()
        if value is not None
    ]
    return "<h2>Options</h2>" + _table(["option", "value"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[_Cell]], *, sortable: bool = False) -> str:
    numbers = [bool(rows) and rows[0][index].is_number for index in range(len(heads))]
    head = "".join(
        f'<th class="{_ALIGNMENT[number]}">{escape(title)}</th>' for title, number in zip(heads, numbers, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(str, row))}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _text(text: str) -> _Cell:
    return _Cell(escape(text))


def _number(value: Number, show: Callable[[Number], str]) -> _Cell:
    return _Cell(escape(show(value)), value, True)


def _plain(number: int | None) -> str:
    return "-" if number is None else str(number)


def _error(node: NodePlan) -> str:
    return "-" if node.error is None else f"{node.error:.4f}"


def _name(node: NodePlan) -> str:
    return node.scope or node.node or node.weight or "?"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
