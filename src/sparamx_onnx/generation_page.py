"""The result of a decoder's benchmark as one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING

from sparamx_onnx.html_page import Cell, bar_chart, code, number_cell, page, table
from sparamx_onnx.tables import duration, rate, size

if TYPE_CHECKING:
    from sparamx_onnx.generation_benchmark import GenerationBenchmark, GenerationTiming


def generation_page(result: GenerationBenchmark) -> str:
    """The page: what was compared, charts of tokens a second and memory, and all figures."""
    names = " against ".join(code(timing.model) for timing in result.timings)
    parts = [f"<h1>{names}</h1>", f"<p>{escape(_circumstances(result))}</p>", *_verdicts(result)]
    if result.prompt is not None:
        title = f"Tokens a second, prompts of {result.prompt}"
        parts.append(_chart(result, title, lambda timing: timing.prefill_tokens_per_second, rate))
    if result.context is not None:
        title = f"Tokens a second, after {result.context}"
        parts.append(_chart(result, title, lambda timing: timing.decode_tokens_per_second, rate))
    parts.append(_chart(result, "Memory (PSS)", lambda timing: timing.pss, lambda value: size(round(value))))
    return page("Generation", [*parts, _figures(result)])


def _circumstances(result: GenerationBenchmark) -> str:
    threads = "one thread per core" if result.threads is None else f"{result.threads} threads"
    return f"Batch {result.batch}, {threads}, medians of {result.rounds} interleaved rounds."


def _verdicts(result: GenerationBenchmark) -> list[str]:
    ratios = (
        ("Prompts are read", result.prefill_ratio, result.prefill_ratio_quartiles),
        ("Tokens are decoded", result.decode_ratio, result.decode_ratio_quartiles),
    )
    return [
        f"<p>{what} {ratio:.2f} times as fast (quartiles {spread[0]:.2f} to {spread[1]:.2f}).</p>"
        for what, ratio, spread in ratios
        if ratio is not None and spread is not None
    ]


def _chart(
    result: GenerationBenchmark,
    title: str,
    figure: Callable[[GenerationTiming], float | None],
    show: Callable[[float], str],
) -> str:
    """One bar a model."""
    values = [figure(timing) or 0.0 for timing in result.timings]
    places = [([value], f"{timing.model}: {show(value)}") for timing, value in zip(result.timings, values, strict=True)]
    below = [PurePath(timing.model).name for timing in result.timings]
    if len(set(below)) < len(below):  # the decoders of two folders have one name
        below = [PurePath(timing.model).parent.name for timing in result.timings]
    return f"<h2>{escape(title)}</h2>" + bar_chart(places, show, below)


def _figures(result: GenerationBenchmark) -> str:
    heads = [
        "model",
        "first token",
        "prefill tokens/s",
        "step",
        "decode tokens/s",
        "load",
        "cache",
        "PSS",
        "of the model",
    ]
    rows = [
        [
            Cell(code(timing.model)),
            number_cell(timing.first_token, _time),
            number_cell(timing.prefill_tokens_per_second, rate),
            number_cell(timing.step, _time),
            number_cell(timing.decode_tokens_per_second, rate),
            number_cell(timing.load_seconds, _time),
            number_cell(timing.cache_bytes, size),
            number_cell(timing.pss, size),
            number_cell(timing.model_pss, size),
        ]
        for timing in result.timings
    ]
    return "<h2>Figures</h2>" + table(heads, rows)


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)
