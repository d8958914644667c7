#!/usr/bin/env python3
"""Writes tables and charts of docs/performance.md, generation.md and quality.md from what is in benchmarks/measured/.

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`; what is between them is replaced. Charts go
to docs/plots/. With --check nothing is written, and the exit status says whether everything is up to date.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attention_page
import costs_page
import generation_page
import plots
import quality_page
import rotation
import shapes
import tune
from tables import MEASURED, load, table

import models

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("performance", "attention", "generation", "quality")]
PLOTS = ROOT / "docs" / "plots"

TYPES = ["fp32", "bf16", "int8", "int4"]
# Below so many packed bytes the start of every product shows, above it only memory should.
LARGE, MEDIUM = 4 << 20, 1 << 20
SLOWER = 0.95
ENGINE_NAMES = {
    "ort-fp32": "ONNX Runtime fp32",
    "ort-int8": "ONNX Runtime dynamic int8",
    "ort-int4": "ONNX Runtime MatMulNBits",
    "openvino-bf16": "OpenVINO bf16",
    "openvino-f32": "OpenVINO fp32",
    "deepsparse": "DeepSparse",
    "packed-fp32": "packed fp32",
    "packed-bf16": "packed bf16",
    "packed-int8": "packed int8",
    "packed-int4": "packed int4",
}

Cell = dict[str, Any]


# --- Models against peers ---------------------------------------------------------------------------------------------


def seconds(cell: Cell, engine: str) -> float | None:
    """Median time of an engine; None where it was not there."""
    times = cell["engines"].get(engine)
    return None if times is None else float(times["seconds"])


def ratio(cell: Cell, engine: str, against: str) -> tuple[float, tuple[float, float]] | None:
    """How many times as fast an engine is as another, and the quartiles of the turns' ratios."""
    if engine not in cell["engines"] or against not in cell["engines"]:
        return None
    mine, other = cell["engines"][engine], cell["engines"][against]
    turns = [b / a for a, b in zip(mine["turns"], other["turns"], strict=True)]
    return other["seconds"] / mine["seconds"], rotation.quartiles(turns)


def find(cells: Iterable[Cell], **wanted: Any) -> Cell | None:
    """The cell with these values, if it was measured."""
    return next((cell for cell in cells if all(cell[key] == value for key, value in wanted.items())), None)


def peers(document: str = "models") -> str:
    """Milliseconds a layer of every engine."""
    cells = [cell for cell in load(document)["cells"] if cell["sparsity"] == 0.5]
    rows = []
    for engine, name in ENGINE_NAMES.items():
        times = [seconds(cell, engine) for cell in cells]
        if any(times):
            values = [
                "not installed" if time is None else f"{time / cell['layers'] * 1e3:.3f}"
                for time, cell in zip(times, cells, strict=True)
            ]
            rows.append([name, *values])
    return table(["ms a layer", *(f"M = {cell['m']}" for cell in cells)], rows)


# What a packed model should at least do: M, sparsity, packed type, against whom, how many times as fast.
TARGETS: list[tuple[list[int], float, str, str, float]] = [
    ([1], 0.5, "bf16", "ort-fp32", 3.3),
    ([1], 0.5, "bf16", "openvino-bf16", 1.75),
    ([1], 0.5, "bf16", "deepsparse", 3.4),
    ([1], 0.5, "int8", "ort-int8", 1.55),
    ([1], 0.5, "int4", "ort-int4", 1.6),
    ([1], 0.7, "int4", "ort-int4", 1.9),
    ([16], 0.5, "bf16", "ort-fp32", 2.8),
    ([16], 0.5, "bf16", "openvino-bf16", 1.2),
    ([16], 0.5, "int8", "ort-int8", 1.3),
    ([16], 0.5, "int8", "ort-int4", 1.5),
    ([16], 0.5, "int4", "ort-int8", 1.3),
    ([16], 0.5, "int4", "ort-int4", 1.5),
    ([128], 0.5, "bf16", "ort-fp32", 1.8),
    ([512], 0.5, "bf16", "ort-fp32", 1.65),
    ([128, 512], 0.5, "bf16", "openvino-bf16", 0.95),
    ([128, 512], 0.5, "int8", "ort-int8", 0.95),
]


def targets(document: str = "models") -> str:
    """The targets, what was seen, and whether that is enough."""
    cells = load(document)["cells"]
    rows = []
    for ms, sparsity, kind, against, least in TARGETS:
        for m in ms:
            case = [str(m), f"{sparsity:.0%}", kind, ENGINE_NAMES[against], f"{least:g}x"]
            cell = find(cells, m=m, sparsity=sparsity)
            seen = ratio(cell, f"packed-{kind}", against) if cell else None
            if seen is None:
                rows.append([*case, "not measured", ""])
                continue
            value, (low, high) = seen
            verdict = "reached" if value >= least else f"missed by {1 - value / least:.0%}"
            rows.append([*case, f"{value:.2f}x ({low:.2f} to {high:.2f})", verdict])
    return table(["M", "zeros", "packed", "against", "at least", "seen", ""], rows)


def model_streaming(document: str = "models") -> str:
    """Share of the streaming loops' bandwidth, of whole models."""
    cells = [cell for cell in load(document)["cells"] if cell["streams"] and cell["sparsity"] == 0.5]
    rows = []
    for kind in TYPES:
        for cell in cells:
            engine = f"packed-{kind}"
            if engine not in cell["streams"]:
                continue
            rate = cell["packed_bytes"][engine] / cell["engines"][engine]["seconds"]
            found = models.shares(cell, engine)
            rows.append([kind, str(cell["m"]), f"{rate / 1e9:.1f}", *(f"{found[loop]:.0%}" for loop in models.LOOPS)])
    return table(["weights", "M", "GB/s", "of the plain loop", "of the prefetched loop"], rows)


# --- Every listed shape -----------------------------------------------------------------------------------------------


def shape_ratios(cells: Iterable[Cell], kind: str, m: int) -> list[float]:
    """Of every shape, how many times as fast as ONNX Runtime's MatMul of the dense model."""
    found = [ratio(cell, f"packed-{kind}", models.BASELINE) for cell in cells if cell["m"] == m]
    return [value for value, _ in filter(None, found)]


def all_shapes() -> str:
    """Lowest, median and highest ratio over the shapes by type and M."""
    cells = load("shapes")["cells"]
    rows = []
    for kind in TYPES:
        for m in shapes.ROWS:
            values = shape_ratios(cells, kind, m)
            below = sum(value < SLOWER for value in values)
            spread = f"{min(values):.2f}x", f"{statistics.median(values):.2f}x", f"{max(values):.2f}x"
            rows.append([kind, str(m), *spread, f"{below} of {len(values)}"])
    return table(["weights", "M", "lowest", "median", "highest", f"below {SLOWER:g}x"], rows)


def slower_shapes() -> str:
    """Every combination that falls short of ONNX Runtime's own MatMul."""
    rows = []
    for cell in load("shapes")["cells"]:
        for kind in TYPES:
            seen = ratio(cell, f"packed-{kind}", models.BASELINE)
            if seen is not None and seen[0] < SLOWER:
                value, (low, high) = seen
                layer = seconds(cell, f"packed-{kind}") or 0.0
                case = [shapes.name((cell["k"], cell["n"])), str(cell["m"]), kind, f"{cell['sparsity']:.0%}"]
                figures = [f"{value:.2f}x ({low:.2f} to {high:.2f})", f"{layer / cell['layers'] * 1e6:.1f}"]
                rows.append([*case, *figures])
    if not rows:
        return "None."
    return table(["shape", "M", "weights", "zeros", "seen", "microseconds a layer"], rows)


# --- Kernels ----------------------------------------------------------------------------------------------------------


def kernel_shares(cells: Iterable[Cell], kind: str, sparsity: float, m: int, size: range, loop: str) -> list[float]:
    """Bandwidth by that of a loop, of every shape with so many packed bytes."""
    return [
        cell["blob_bytes"] / cell["seconds"] / cell[f"{loop}_bytes_per_second"]
        for cell in cells
        if (cell["weights"], cell["sparsity"], cell["m"]) == (kind, sparsity, m) and cell["blob_bytes"] in size
    ]


def decode() -> str:
    """Medians and lowest shares at M = 1, 2 and 4, over large and medium matrices."""
    cells = load("kernels")["cells"]
    large, medium = range(LARGE, 1 << 40), range(MEDIUM, LARGE)
    rows = []
    for kind in TYPES:
        for sparsity in sorted({cell["sparsity"] for cell in cells}):
            row = [kind, f"{sparsity:.0%}"]
            for m in (1, 2, 4):
                plain = kernel_shares(cells, kind, sparsity, m, large, "plain")
                fast = kernel_shares(cells, kind, sparsity, m, large, "prefetched")
                row.append(
                    f"{statistics.median(plain):.0%} / {statistics.median(fast):.0%} ({min(plain):.0%})"
                    if plain
                    else ""
                )
            smaller = kernel_shares(cells, kind, sparsity, 1, medium, "plain")
            row.append(f"{statistics.median(smaller):.0%} ({min(smaller):.0%})" if smaller else "")
            rows.append(row)
    return table(["weights", "zeros", "M = 1", "M = 2", "M = 4", "M = 1, 1 to 4 MiB"], rows)


def arithmetic() -> str:
    """Dense-equivalent TFLOP/s of large matrices at large M."""
    cells = load("kernels")["cells"]
    rows = []
    for kind in TYPES:
        for sparsity in sorted({cell["sparsity"] for cell in cells}):
            row = [kind, f"{sparsity:.0%}"]
            for m in (16, 32, 64, 128, 512):
                rates = [
                    2 * m * cell["k"] * cell["n"] / cell["seconds"] / 1e12
                    for cell in cells
                    if (cell["weights"], cell["sparsity"], cell["m"]) == (kind, sparsity, m)
                    and cell["blob_bytes"] >= LARGE
                ]
                row.append(f"{statistics.median(rates):.2f}" if rates else "")
            rows.append(row)
    return table(["weights", "zeros", *(f"M = {m}" for m in (16, 32, 64, 128, 512))], rows)


LEVELS = ["avx2", "avx512", "avx512_vnni", "avx512_vbmi2", "avx512_bf16", "amx"]


def levels() -> str:
    """Time of every level's own kernel over that of avx512_vbmi2, at half zeros."""
    cells = [cell for cell in load("choice")["cells"] if cell["sparsity"] == 0.5]
    rows = []
    for kind, (default, *_) in tune.ACTIVATIONS.items():
        for level in LEVELS:
            row = [kind, level]
            for m in (1, 4, 16, 128, 512):
                found = [
                    cell["seconds"][f"avx512_vbmi2 {default}"] / cell["seconds"][f"{level} {default}"]
                    for cell in cells
                    if (cell["weights"], cell["m"]) == (kind, m)
                    and {f"{level} {default}", f"avx512_vbmi2 {default}"} <= cell["seconds"].keys()
                ]
                row.append(f"{statistics.geometric_mean(found):.2f}x" if found else "")
            if any(row[2:]):
                rows.append(row)
    return table(["weights", "level", *(f"M = {m}" for m in (1, 4, 16, 128, 512))], rows)


# Levels that this machine does not choose, lowest first.
OTHER_LEVELS = LEVELS[:4]


def other_levels() -> str:
    """Packed layers at forced levels against ONNX Runtime fp32; at M = 1 also the share of a plain streaming loop."""
    rows = []
    for level in OTHER_LEVELS:
        for cell in load(f"models_{level}")["cells"]:
            row = [level, str(cell["m"])]
            for kind in TYPES:
                engine = f"packed-{kind}"
                seen = ratio(cell, engine, models.BASELINE)
                row.append("" if seen is None else f"{seen[0]:.2f}x")
                streams = cell["streams"].get(engine)
                if streams:
                    read = cell["streamed_bytes"][engine] / streams["plain"]["seconds"]
                    share = cell["packed_bytes"][engine] / cell["engines"][engine]["seconds"] / read
                    row[-1] += f" ({share:.0%})"
            rows.append(row)
    return table(["level", "M", *TYPES], rows)


def choice() -> str:
    """The rules that the measurements make, and what choosing by M alone costs."""
    document = load("choice")
    names = [level["name"] for level in document["machine"]["isa"]["levels"] if level["name"] in LEVELS]
    rows = []
    for rule in tune.rules(document["cells"], names):
        rows_of_x = f"{rule.first} and more" if rule.last is None else f"{rule.first} to {rule.last}"
        kernel = f"{rule.level}, X as {rule.activations}"
        rows.append([rule.best, rule.weights, rows_of_x, kernel, f"{rule.faster:.2f}x"])
    costs = [cost for cost, *_ in tune.regret(document["cells"], names)]
    share = sum(cost > 1.1 for cost in costs) / len(costs)
    return table(["highest level", "weights", "M", "kernel instead of its own", "faster, at best"], rows) + (
        f"\n\nFor {len(costs)} matrices and M, the kernel chosen by M alone takes at most {max(costs):.2f} times as "
        f"long as the best one for that matrix, and more than 1.1 times as long for {share:.0%} of them."
    )


def cpu(document: str = "models") -> str:
    """Where the figures are from."""
    machine = load(document)["machine"]
    family, model, stepping = machine["family_model_stepping"]
    return (
        f"{machine['cpu']}, family {family}, model {model}, stepping {stepping}; {machine['cores']} cores; "
        f"L3 {machine['l3_bytes'] >> 20} MiB; {', '.join(machine['isa']['features'])}; "
        f"ONNX Runtime {machine['onnxruntime']}."
    )


TABLES: dict[str, Callable[[], str]] = (
    {
        function.__name__: function
        for function in (
            *(cpu, targets, peers, model_streaming, all_shapes, slower_shapes, decode, arithmetic),
            *(levels, other_levels, choice),
        )
    }
    | {
        f"{function.__name__}_zen5": partial(function, "models_zen5")
        for function in (cpu, targets, peers, model_streaming)
    }
    | attention_page.TABLES
    | costs_page.TABLES
    | generation_page.TABLES
    | quality_page.TABLES
)


# --- Charts -----------------------------------------------------------------------------------------------------------


def _rows_axis(rows: Sequence[int]) -> plots.Axis:
    return plots.Axis("M (rows of X)", rows[0] / 1.15, rows[-1] * 1.15, rows, logarithmic=True)


def decode_chart() -> str:
    """Share of the streaming bandwidth at M = 1."""
    cells = load("kernels")["cells"]
    x = plots.Axis("", -0.5, len(TYPES) - 0.5, range(len(TYPES)), label=lambda index: TYPES[int(index)])
    y = plots.Axis("share of a plain streaming loop", 0, 1.2, [0, 0.2, 0.4, 0.6, 0.8, 1], label="{:.0%}".format)
    chart = plots.Chart("Decode (M = 1): packed bytes read, by what a streaming loop reads", x, y)
    series: dict[str, list[float | None]] = {}
    for sparsity in shapes.SPARSITIES:
        found = [kernel_shares(cells, kind, sparsity, 1, range(LARGE, 1 << 40), "plain") for kind in TYPES]
        series[f"{sparsity:.0%} zeros"] = [statistics.median(values) if values else None for values in found]
    chart.bars(series)
    chart.rule(0.95, "95 %")
    return chart.svg()


def fp32_chart() -> str:
    """Every listed shape against ONNX Runtime's fp32 MatMul."""
    cells = [cell for cell in load("shapes")["cells"] if cell["sparsity"] == 0.5]
    y = plots.Axis("times as fast", 0.5, 32, [0.5, 1, 2, 4, 8, 16, 32], logarithmic=True)
    chart = plots.Chart(
        "Half zeros, against ONNX Runtime fp32: median and range of all shapes", _rows_axis(shapes.ROWS), y
    )
    for index, kind in enumerate(TYPES):
        values = [(m, shape_ratios(cells, kind, m)) for m in shapes.ROWS]
        chart.band([(m, max(min(found), y.low), min(max(found), y.high)) for m, found in values], plots.COLOURS[index])
        chart.line(f"packed {kind}", [(m, statistics.median(found)) for m, found in values], plots.COLOURS[index])
    chart.rule(1, "as fast")
    return chart.svg()


def peers_chart() -> str:
    """Every engine at 4096 x 4096."""
    cells = [cell for cell in load("models")["cells"] if cell["sparsity"] == 0.5]
    y = plots.Axis("times as fast as ONNX Runtime fp32", 0.25, 16, [0.25, 0.5, 1, 2, 4, 8, 16], logarithmic=True)
    rows = [cell["m"] for cell in cells]
    chart = plots.Chart("Layers 4096 x 4096, half zeros, by engine", _rows_axis(rows), y)
    for index, (engine, name) in enumerate(ENGINE_NAMES.items()):
        found = [(cell["m"], ratio(cell, engine, models.BASELINE)) for cell in cells]
        points = [(float(m), min(max(seen[0], y.low), y.high)) for m, seen in found if seen is not None]
        if points:
            chart.line(name, points, plots.COLOURS[index], dashed=not engine.startswith("packed"))
    return chart.svg()


# The document that each chart is drawn from; a chart whose document has not been measured is left out.
CHARTS = {"decode": ("kernels", decode_chart), "fp32": ("shapes", fp32_chart), "peers": ("models", peers_chart)}
CHARTS |= quality_page.CHARTS


# --- The pages --------------------------------------------------------------------------------------------------------


def fill(page: Path) -> str:
    """The page's text with its tables replaced."""

    def replace(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise SystemExit(f"page.py: {page} asks for a table {match[1]!r}; there are {', '.join(TABLES)}")
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, page.read_text(), flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is out of date")
    arguments = parser.parse_args()
    files = {page: fill(page) for page in PAGES}
    for name, (document, make) in CHARTS.items():
        if (MEASURED / f"{document}.json").exists():
            files[PLOTS / f"{name}.svg"] = make()
        else:
            print(f"no chart {name!r}: {document}.json is not in {MEASURED.relative_to(ROOT)}")
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'out of date' if arguments.check else 'wrote'}: {path.relative_to(ROOT)}")
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
    sys.exit(1 if stale and arguments.check else 0)


if __name__ == "__main__":
    main()
