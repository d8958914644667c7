"""The tables and charts of docs/quality.md, made of what quality.py and decoder_quality.py measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import plots
from tables import load, table

Cell = dict[str, Any]

METHODS = ("magnitude", "wanda", "sparsegpt")
WEIGHT_TYPES = ("bf16", "int8", "int4")
# Other int4 scales than the default's, as decoder_quality.py names them.
DEFAULT_SCALES = {"scale_type": None, "group_size": None}
INT4_SCALES: dict[str, Cell] = {
    "int4, fp16 scales": {"scale_type": "fp16"},
    "int4, groups of 64": {"group_size": 64},
    "int4, groups of 128": {"group_size": 128},
}
CACHE_KINDS = {"keys": (1, 0), "values": (0, 1), "both": (1, 1)}


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def find(cells: Iterable[Cell], **wanted: Any) -> Cell | None:
    """The cell with these values, and without those that should be None, if it was measured."""
    return next((cell for cell in cells if all(cell.get(key) == value for key, value in wanted.items())), None)


# --- MiniLM -----------------------------------------------------------------------------------------------------------


def minilm_text() -> str:
    """What was judged by how many sentences."""
    common, *results = load("quality")["cells"]
    kept = find(results, method="keep")
    return (
        f"{common['calibration']} sentences to calibrate with and {common['test']} others to judge by are docstrings "
        f"of Python's standard library.\nPacked as {common['weights']} by `convert`; nothing was trained afterwards."
        + (f" Packed without pruning, the mean cosine is {kept['cosine']:.5f}." if kept else "")
    )


def minilm(figure: str) -> str:
    """A figure of every method at every sparsity."""
    results = [cell for cell in load("quality")["cells"] if cell["method"] not in (None, "keep")]
    sparsities = sorted({cell["sparsity"] for cell in results if "sparsity" in cell})
    patterns = sorted({cell["pattern"] for cell in results if "pattern" in cell})
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in results):
        found = [find(results, method=method, sparsity=sparsity, pattern=None) for sparsity in sparsities]
        found += [find(results, method=method, pattern=pattern) for pattern in patterns]
        rows.append([method, *(f"{cell[figure]:.3f}" if cell else "" for cell in found)])
    return table(["", *map(percent, sparsities), *patterns], rows)


def minilm_cosine() -> str:
    """Mean cosine of embeddings."""
    return minilm("cosine")


def minilm_lowest_cosine() -> str:
    """Cosine of the worst sentence."""
    return minilm("lowest_cosine")


def minilm_neighbours() -> str:
    """Neighbours that stay."""
    return minilm("neighbours")


# --- The decoder's weights --------------------------------------------------------------------------------------------


def part(name: str) -> list[Cell]:
    """The results of weights, cache or attention, in the order in which they were asked for."""
    return [cell for cell in load("decoder_quality")["cells"] if cell["part"] == name]


def texts() -> Cell:
    """What all results have in common."""
    [cell] = part("texts")
    return cell


def weight_axis() -> list[dict[str, Any]]:
    """Sparsities in ascending order, then patterns."""
    cells = part("weights")
    sparsities = sorted({cell["sparsity"] for cell in cells if "sparsity" in cell})
    patterns = sorted({cell["pattern"] for cell in cells if "pattern" in cell})
    return [{"sparsity": value, "pattern": None} for value in sparsities] + [{"pattern": value} for value in patterns]


def tinylm_text() -> str:
    """How the model was trained, and how well it does."""
    training = texts()["training"]
    return (
        f"{training['parameters'] / 1e6:.1f} million weights, trained on {training['tokens'] / 1e6:.1f} million "
        f"tokens, each read about once, in {training['cpu_minutes']:g} minutes of one core.\n"
        f"Perplexity on all held-out documents: **{training['held_out_perplexity']:.2f}** a token."
    )


def decoder_texts() -> str:
    """How much text was used for what."""
    common = texts()
    lengths = ", ".join(map(str, common["lengths"]))
    return (
        f"Of the {common['held_out_tokens']:,} held-out tokens in the repository, {common['windows']} windows of "
        f"{common['window']} judge weights, and {common['rows']} of\n{max(common['lengths'])} judge caches (the last "
        f"quarter of the first {lengths} tokens). Calibration: {common['calibration']} windows of 512 tokens of the\n"
        f"training text. On these windows the dense model has a perplexity of {dense()['perplexity']:.2f}."
    )


def dense() -> Cell:
    """The model as it was exported."""
    return next(cell for cell in part("weights") if cell["method"] == "dense")


def decoder_types() -> str:
    """Weight types without pruning, and pruned by half."""
    cells = part("weights")
    rows = [["fp32, ONNX Runtime", f"{dense()['perplexity']:.2f}", f"{dense()['bytes'] / 1e6:.1f}", "", ""]]
    kinds: dict[str, Cell] = {kind: {"weights": kind} for kind in WEIGHT_TYPES}
    kinds |= {name: {"weights": "int4", **scales} for name, scales in INT4_SCALES.items()}
    for name, kind in kinds.items():
        kind = DEFAULT_SCALES | kind
        packed = find(cells, **kind, method="keep")
        pruned = find(cells, **kind, method="sparsegpt", sparsity=0.5)
        if packed or pruned:
            rows.append([name, *(text for cell in (packed, pruned) for text in _perplexity_and_bytes(cell))])
    return table(["weights", "as they are", "MB", "SparseGPT 50 %", "MB"], rows)


def _perplexity_and_bytes(cell: Cell | None) -> list[str]:
    return [f"{cell['perplexity']:.2f}", f"{cell['bytes'] / 1e6:.1f}"] if cell else ["", ""]


def decoder_weights() -> str:
    """Perplexity of every type, method and sparsity."""
    cells, axis = part("weights"), weight_axis()
    rows = []
    for kind in WEIGHT_TYPES:
        for method in METHODS:
            found = [find(cells, weights=kind, method=method, **DEFAULT_SCALES, **case) for case in axis]
            if any(found):
                rows.append([kind, method, *(f"{cell['perplexity']:.2f}" if cell else "" for cell in found)])
    return table(["weights", "method", *(case["pattern"] or percent(case["sparsity"]) for case in axis)], rows)


def decoder_costs() -> str:
    """CPU time of the conversions."""
    cells = part("weights")
    rows = []
    for method in ("keep", *METHODS):
        found = [cell["convert_cpu_seconds"] for cell in cells if cell["method"] == method]
        if found:
            spread = f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"
            rows.append([method, spread, str(len(found))])
    return table(["method", "CPU seconds of `convert`, median (range)", "conversions"], rows)


# --- The decoder's cache ----------------------------------------------------------------------------------------------


def by_sparsity(cell: Cell) -> tuple[bool, bool, float, float]:
    """The order of the rows: without whole ends first, then keys alone, values alone, and both."""
    k, v = cell["k_sparsity"], cell["v_sparsity"]
    return cell["sink"] > 0, k > 0 and v > 0, v, k


def case_of(cell: Cell) -> list[str]:
    """The columns that say which cache it is."""
    ends = f"{cell['sink']}, {cell['recent']}" if cell["sink"] or cell["recent"] else ""
    return [percent(cell["k_sparsity"]), percent(cell["v_sparsity"]), ends]


def decoder_caches() -> str:
    """Bytes, error of the logits and perplexity of every cache."""
    cells = part("cache")
    lengths = [str(length) for length in texts()["lengths"]]
    whole = next(cell for cell in cells if "k_sparsity" not in cell)
    rows = [["fp32", "fp32", "", *_cache_figures(whole, whole, lengths)]]
    for cell in sorted((cell for cell in cells if cell is not whole), key=by_sparsity):
        rows.append([*case_of(cell), *_cache_figures(cell, whole, lengths)])
    head = ["keys", "values", "whole ends", "MB", "error of the logits", "same token", *lengths, ""]
    return table(head, rows)


def _cache_figures(cell: Cell, whole: Cell, lengths: Sequence[str]) -> list[str]:
    last = lengths[-1]
    same = cell is whole
    return [
        f"{cell['cache_bytes'] / 1e6:.1f}",
        "" if same else f"{cell['logits_error'][last]:.4f}",
        "" if same else f"{cell['top1_agreement']:.1%}".replace("%", " %"),
        *(f"{cell['perplexity'][length]:.2f}" for length in lengths),
        "" if same else f"{cell['perplexity'][last] / whole['perplexity'][last] - 1:+z.1%}".replace("%", " %"),
    ]


def decoder_attention() -> str:
    """Error of the attention's output, layer by layer."""
    cells = sorted(part("attention"), key=by_sparsity)
    layers = [f"layer {layer}" for layer in range(len(cells[0]["errors"]))]
    rows = [[*case_of(cell), *(f"{error:.3f}" for error in cell["errors"])] for cell in cells]
    return table(["keys", "values", "whole ends", *layers], rows)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(minilm_text, minilm_cosine, minilm_lowest_cosine, minilm_neighbours, tinylm_text, decoder_texts),
        *(decoder_types, decoder_weights, decoder_costs, decoder_caches, decoder_attention),
    )
}


# --- Charts -----------------------------------------------------------------------------------------------------------


def axis_around(title: str, values: Iterable[float], ticks: Sequence[float]) -> plots.Axis:
    """A logarithmic axis with those of the ticks that all values lie between; one that is beyond them all is an end."""
    found = list(values)
    low = max((tick for tick in ticks if tick <= min(found)), default=min(found))
    high = min((tick for tick in ticks if tick >= max(found)), default=max(found))
    if low == high:
        high = low * 1.1
    return plots.Axis(title, low, high, [tick for tick in ticks if low <= tick <= high], logarithmic=True)


def sparsity_axis(title: str, sparsities: Sequence[float]) -> plots.Axis:
    margin = 0.02
    return plots.Axis(title, min(sparsities) - margin, max(sparsities) + margin, sparsities, label=percent)


def weights_chart() -> str:
    """Perplexity against zeros: every method as bf16, the best one as int8 and int4, too."""
    cells = [cell for cell in part("weights") if "sparsity" in cell and not cell.keys() & DEFAULT_SCALES]
    drawn = [("bf16", method, False) for method in METHODS] + [(kind, "sparsegpt", True) for kind in ("int8", "int4")]
    lines = {
        (kind, method, dashed): [
            (cell["sparsity"], cell["perplexity"])
            for cell in sorted(cells, key=lambda cell: float(cell["sparsity"]))
            if (cell["weights"], cell["method"]) == (kind, method)
        ]
        for kind, method, dashed in drawn
    }
    values = [dense()["perplexity"], *(value for points in lines.values() for _, value in points)]
    chart = plots.Chart(
        "Held-out perplexity of tinylm, pruned",
        sparsity_axis("zeros in every pruned layer", sorted({cell["sparsity"] for cell in cells})),
        axis_around("perplexity", values, (16, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 400, 1000, 10000)),
    )
    for ((kind, method, dashed), points), colour in zip(lines.items(), plots.COLOURS, strict=False):
        if points:
            chart.line(f"{method}, {kind}", points, colour, dashed)
    chart.rule(dense()["perplexity"], "dense, fp32")
    return chart.svg()


def sparsity_lines(cells: Sequence[Cell], figure: Callable[[Cell], float]) -> dict[str, list[plots.Point]]:
    """A figure against the sparsity of keys, of values and of both; ends are not kept whole."""
    open_ended = [cell for cell in cells if cell.get("recent") == 0]
    sparsities = sorted({cell["k_sparsity"] for cell in open_ended} - {0.0})
    lines = {}
    for name, (k, v) in CACHE_KINDS.items():
        found = [(s, find(open_ended, k_sparsity=k * s, v_sparsity=v * s)) for s in sparsities]
        lines[name] = [(s, figure(cell)) for s, cell in found if cell is not None]
    return lines


def caches_chart() -> str:
    """Perplexity at the longest length, relative to that with a float cache."""
    cells = part("cache")
    length = str(max(texts()["lengths"]))
    whole = next(cell for cell in cells if "k_sparsity" not in cell)["perplexity"][length]
    lines = sparsity_lines(cells, lambda cell: float(cell["perplexity"][length] / whole - 1))
    values = [value for points in lines.values() for _, value in points]
    step = 0.02 if max(values) < 0.2 else 0.1
    ticks = [step * index for index in range(-1, int(max(values) / step) + 2)]
    chart = plots.Chart(
        f"Perplexity after {length} tokens with a packed cache",
        sparsity_axis("pruned", sorted({s for points in lines.values() for s, _ in points})),
        plots.Axis(
            "more than with an fp32 cache",
            min(*ticks, *values),
            ticks[-1],
            ticks,
            label=percent,
        ),
    )
    for (name, points), colour in zip(lines.items(), plots.COLOURS, strict=False):
        chart.line(name, points, colour, dashed=name == "both")
    return chart.svg()


def errors_chart() -> str:
    """Errors of logits and of the attention's output against sparsity."""
    length = str(max(texts()["lengths"]))
    logits = sparsity_lines(part("cache"), lambda cell: float(cell["logits_error"][length]))
    outputs = sparsity_lines(part("attention"), lambda cell: statistics.fmean(cell["errors"]))
    values = [value for lines in (logits, outputs) for points in lines.values() for _, value in points]
    chart = plots.Chart(
        "Relative error with a packed cache",
        sparsity_axis("pruned", sorted({s for points in logits.values() for s, _ in points})),
        axis_around("root mean square error", values, (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)),
    )
    for name, colour in zip(CACHE_KINDS, plots.COLOURS, strict=False):
        chart.line(f"attention, {name}", outputs[name], colour)
        chart.line(f"logits, {name}", logits[name], colour, dashed=True)
    return chart.svg()


# The document that each chart is drawn from.
CHARTS = {
    "decoder_weights": ("decoder_quality", weights_chart),
    "decoder_caches": ("decoder_quality", caches_chart),
    "decoder_errors": ("decoder_quality", errors_chart),
}
