"""The tables of docs/generation.md, made of what generation.py measured, on one CPU with AMX and on one without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import generation
from tables import load, table

DECODER_NAMES = {
    generation.DENSE: "ONNX Runtime fp32",
    generation.DYNAMIC: "ONNX Runtime dynamic int8",
    generation.NBITS: "ONNX Runtime MatMulNBits",
    generation.LLAMA_CPP: "llama.cpp Q4_0",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
    "int4" + generation.GROUPS_OF_64: "int4, groups of 64",
    "int4" + generation.HUGE_PAGES: "int4 in huge pages",
    "int4" + generation.PACKED_CACHE: "int4, packed caches",
}


def speeds(document: str, what: str) -> str:
    """Tokens per second of every pair: decode steps ("context") or prompts ("prompt")."""
    cells = load(document)["cells"]
    rows = []
    for pair in generation.PAIRS:
        for cell in cells:
            if (cell["ours"], cell["theirs"], cell["what"]) != (pair.ours, pair.theirs, what):
                continue
            ours, theirs = cell["tokens_per_second"]
            low, high = cell["faster_quartiles"]
            least = pair.target(what)
            verdict = f"{least:g}x: {'reached' if cell['faster'] >= least else 'missed'}" if least else ""
            names = [DECODER_NAMES[pair.ours], DECODER_NAMES[pair.theirs]]
            figures = [f"{ours:.1f}", f"{theirs:.1f}", f"{cell['faster']:.2f}x ({low:.2f} to {high:.2f})"]
            rows.append([f"{cell['tokens']:,}", *names, *figures, verdict])
    return table(["tokens", "packed", "against", "tokens/s", "theirs", "faster", "at least"], rows)


def memory(document: str) -> str:
    """PSS of one process and of each of several."""
    cells = load(document)["cells"]
    steps = [cell for cell in cells if cell["what"] == "context"]
    shared = {cell["ours"]: cell for cell in cells if cell["what"] == "processes"}
    rows = []
    for name, title in DECODER_NAMES.items():
        alone = [(cell["tokens"], cell["pss"][name], cell) for cell in steps if name in cell["pss"]]
        if not alone:
            continue
        tokens, pss, cell = min(alone, key=lambda found: found[0])
        row = [title, f"{tokens:,}", f"{pss / 1e6:.0f}", "", "", ""]
        if cell["ours"] == name:
            row[3] = f"{cell['file_bytes'] / 1e6:.0f}"
        if name in shared:
            each = [process["pss"] / 1e6 for process in shared[name]["processes"]]
            row[4:] = [f"{len(each)} x {max(each):.0f}", f"{sum(each):.0f}"]
        rows.append(row)
    return table(["", "tokens", "PSS, MB", "file, MB", "several processes, MB", "together, MB"], rows)


TABLES: dict[str, Callable[[], str]] = {}
for _document in ("generation", "generation_zen5"):
    TABLES |= {
        f"{_document}_decode": partial(speeds, _document, "context"),
        f"{_document}_prompts": partial(speeds, _document, "prompt"),
        f"{_document}_memory": partial(memory, _document),
    }
