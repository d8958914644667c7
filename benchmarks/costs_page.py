"""The tables of docs/performance.md about what packing, memory, a node and fusing siblings cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tables import load, table

MB, GB = 1e6, 1e9


def siblings() -> str:
    """How many times as fast one operator for all siblings is, by M."""
    cells = load("siblings")["cells"]
    ms = sorted({cell["m"] for cell in cells})
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        names = "q, k, v" if len(cell["widths"]) == 3 else "gate, up"
        shape = f"{names}: {cell['k']} x ({', '.join(map(str, cell['widths']))})"
        low, high = cell["faster_quartiles"]
        row = rows.setdefault((shape, cell["weights"]), [""] * len(ms))
        row[ms.index(cell["m"])] = f"{cell['faster']:.2f}x ({low:.2f} to {high:.2f})"
    return table(["siblings", "weights", *(f"M = {m}" for m in ms)], ([*key, *row] for key, row in rows.items()))


def overhead() -> str:
    """Processor time of a layer so small that the node is all it costs."""
    document = load("overhead")
    rows = []
    for result in document["results"]:
        low, high = (value * 1e6 for value in result["quartiles"])
        name = f"packed {result['layer']}" if result["layer"] != "MatMul" else "ONNX Runtime's MatMul, fp32"
        rows.append([name, f"{result['median_seconds'] * 1e6:.2f} ({low:.2f} to {high:.2f})"])
    return table(["layer", "us"], rows)


def packing() -> str:
    """GB of fp32 weights a second, medians of the turns."""
    results = load("packing")["results"]
    columns = list(dict.fromkeys(result["what"] for result in results))
    rates = {(result["weights"], result["what"]): f"{result['gb_per_second']:.1f}" for result in results}
    kinds = dict.fromkeys(result["weights"] for result in results)
    return table(["weights", *columns], ([kind, *(rates[kind, what] for what in columns)] for kind in kinds))


def memory() -> str:
    """What converting a large model takes, and what two processes that run the result have resident."""
    document: dict[str, Any] = load("memory")
    conversion, (one, other) = document["conversion"], document["two_processes"]
    return table(
        ["what", "seen"],
        [
            ["the dense model", f"{document['dense_bytes'] / GB:.2f} GB"],
            ["the packed model", f"{document['packed_bytes'] / MB:.0f} MB"],
            ["conversion, time", f"{conversion['seconds']:.1f} s"],
            ["conversion, memory beyond the mapped input", f"at most {conversion['peak_beyond_input'] / MB:.0f} MB"],
            ["two processes, resident each", f"{max(one['Rss'], other['Rss']) / MB:.0f} MB"],
            ["two processes, proportional share (PSS) each", f"{max(one['Pss'], other['Pss']) / MB:.0f} MB"],
            ["two processes, of their own each", f"{max(one['Anonymous'], other['Anonymous']) / MB:.0f} MB"],
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (siblings, overhead, packing, memory)
}
