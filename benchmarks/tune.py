#!/usr/bin/env python3
"""Finds the fastest kernel for every weight type and M on this CPU, and writes the table of cpp/runtime/choice.cc.

Times every level's kernels in turn, on a few shapes and sparsities, each in a file of copies of three times the L3.
For every level as the highest that a CPU has, a kernel of another level gets a rule where it is faster, over all shapes
and sparsities (median), by more than noise. So one CPU fills the table of its vendor also for CPUs that have
less; how these differ otherwise, it does not know.

--json keeps what was measured, and a later run goes on from it; --write replaces the vendor's rules in the sources.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import documents
import kernel_timer
import machine
import shapes

from sparamx_onnx.models import caches
from sparamx_onnx.ops import packing

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
TABLES = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}

SHAPES = [(4096, 4096), (2048, 8192), (768, 768)]
SPARSITIES = [0.0, 0.5, 0.8]  # without zeros a matrix is packed dense, for which kernels have a loop of its own
ROWS = [1, 2, 3, 4, 5, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 96, 128, 256, 512]

L3_MULTIPLE = 3
SMALLEST_FILE = 1 << 30
TURNS = 5
TURN_SECONDS = 0.008
# A kernel that takes so many times as long as the fastest is not timed again.
HOPELESS = 3
# A kernel of another level must be this much faster for a rule, and for another rule than that of the next smaller M:
# less is noise.
MARGIN = 1.08

# What each level is called in the sources. The lowest has nothing to choose from.
LEVELS = {
    "avx2": "kAvx2Level",
    "avx512": "kAvx512Level",
    "avx512_vnni": "kAvx512VnniLevel",
    "avx512_vbmi2": "kAvx512Vbmi2Level",
    "avx512_bf16": "kAvx512Bf16Level",
    "amx": "kAmxLevel",
}
# What the products may see of X for a weight type: first the default, then what is at least as exact.
ACTIVATIONS = {"fp32": ["fp32"], "bf16": ["bf16"], "int8": ["int8"], "int4": ["int8", "bf16"]}
_CXX_NAMES = {"fp32": "Fp32", "bf16": "Bf16", "int8": "Int8", "int4": "Int4"}


@dataclass(frozen=True)
class Rule:
    """From M = first to last, a kernel of another level is faster than the own one of the level `best`."""

    best: str
    weights: str
    first: int
    last: int | None
    level: str
    activations: str
    faster: float

    def __str__(self) -> str:
        rows = f"{self.first}, {'kAnyRows' if self.last is None else self.last}"
        default = ACTIVATIONS[self.weights][0]
        return (
            f"// {self.faster:.2f} times as fast at best\n"
            f"{{&{LEVELS[self.best]}, VENDOR, WeightType::k{_CXX_NAMES[self.weights]}, "
            f"Activations::k{_CXX_NAMES[default]}, {rows},\n &{LEVELS[self.level]}, "
            f"Activations::k{_CXX_NAMES[self.activations]}}},"
        )


# --- Measuring --------------------------------------------------------------------------------------------------------


def measure(timer: kernel_timer.Timer, kernels: dict[str, kernel_timer.Kernel], m: int) -> dict[str, float]:
    """Median seconds of a product for every kernel."""
    once = {name: min(timer.run(kernel, m, 1) for _ in range(2)) for name, kernel in kernels.items()}
    fastest = min(once.values())
    turns: dict[str, list[float]] = {name: [] for name, seconds in once.items() if seconds <= HOPELESS * fastest}
    for _ in range(TURNS):
        for name, seconds in turns.items():
            seconds.append(timer.run(kernels[name], m, max(1, round(TURN_SECONDS / once[name]))))
    return once | {name: statistics.median(seconds) for name, seconds in turns.items()}


def measure_all(arguments: argparse.Namespace, levels: Sequence[str], done: documents.Cells) -> bool:
    """Times what is missing; False if the time was over before."""
    stop = time.monotonic() + 60 * arguments.minutes
    random = kernel_timer.Weights(max(k * n for k, n in arguments.shapes))
    capacity = arguments.file_bytes or max(SMALLEST_FILE, L3_MULTIPLE * caches.largest_cache_bytes())
    with kernel_timer.Timer(BUILD, arguments.threads, capacity) as timer:
        for weights in arguments.weights:
            for k, n in arguments.shapes:
                for sparsity in SPARSITIES:
                    matrix = {"weights": weights, "k": k, "n": n, "sparsity": sparsity}
                    rows = [m for m in arguments.m if not done.has(matrix | {"m": m})]
                    if not rows:
                        continue
                    if time.monotonic() > stop:
                        return False
                    options = packing.PackOptions(packing.WeightType(weights))
                    timer.fill(packing.pack(random.draw(k, n, sparsity), options))
                    kernels = {}
                    for level in levels:
                        for activations in ACTIVATIONS[weights]:
                            kernel = timer.kernel(level, activations)
                            if not isinstance(kernel, str):
                                kernels[f"{level} {activations}"] = kernel
                    for m in rows:
                        done.add(matrix | {"m": m, "seconds": measure(timer, kernels, m)})
                    done.save()
                    print(f"{weights} {shapes.name((k, n))} {sparsity:.0%}: {', '.join(kernels)}", flush=True)
    return True


# --- Choosing ---------------------------------------------------------------------------------------------------------


def rules(cells: Iterable[dict[str, Any]], levels: Sequence[str]) -> list[Rule]:
    """The table: for every level as the highest, where it should not run its own kernel."""
    measured = list(cells)
    found = []
    for index, best in enumerate(levels):
        for weights in ACTIVATIONS:
            chosen: list[Rule] = []
            for m in sorted({cell["m"] for cell in measured if cell["weights"] == weights}):
                times = [cell["seconds"] for cell in measured if cell["weights"] == weights and cell["m"] == m]
                name, faster = _fastest(times, levels[: index + 1], weights, _last_choice(chosen))
                level, activations = name.split()
                if chosen and chosen[-1].last is None:
                    last = chosen[-1]
                    if (last.level, last.activations) == (level, activations):
                        chosen[-1] = Rule(best, weights, last.first, None, level, activations, max(faster, last.faster))
                        continue
                    chosen[-1] = Rule(best, weights, last.first, m - 1, last.level, last.activations, last.faster)
                if faster > 1:
                    chosen.append(Rule(best, weights, m, None, level, activations, faster))
            found += chosen
    return found


def _own(times: dict[str, float], levels: Sequence[str], weights: str) -> str:
    """The kernel that the highest of the levels would run: its own, or that of the next lower one that has one."""
    default = ACTIVATIONS[weights][0]
    return next(f"{level} {default}" for level in reversed(levels) if f"{level} {default}" in times)


def _last_choice(chosen: Sequence[Rule]) -> str | None:
    """The kernel of the rule that reaches up to here; None where the own one runs."""
    if not chosen or chosen[-1].last is not None:
        return None
    return f"{chosen[-1].level} {chosen[-1].activations}"


def _fastest(
    times: list[dict[str, float]], levels: Sequence[str], weights: str, before: str | None = None
) -> tuple[str, float]:
    """The kernel to take of these levels, and how much faster it is than the highest one's own, which it may be.

    That is the fastest, unless `before`, what the next smaller M takes, or the own one does about as well; what is
    faster for every matrix is better, however little.
    """
    own = _own(times[0], levels, weights)
    faster = {
        name: statistics.median(cell[own] / cell[name] for cell in times)
        for name in times[0]
        if name.split()[0] in levels
    }
    best = max(faster, key=faster.__getitem__)
    if before is not None and faster[best] < MARGIN * faster[before]:
        best = before
    if faster[best] >= MARGIN or all(cell[best] < cell[own] for cell in times):
        return best, faster[best]
    return own, 1.0


def regret(cells: Iterable[dict[str, Any]], levels: Sequence[str]) -> list[tuple[float, dict[str, Any], str, str]]:
    """Where the choice by M alone is slower than the best choice for that one matrix: by how much, most first."""
    measured = list(cells)
    result = []
    for cell in measured:
        peers = [c["seconds"] for c in measured if (c["weights"], c["m"]) == (cell["weights"], cell["m"])]
        name, _ = _fastest(peers, levels, cell["weights"])
        best = min(cell["seconds"], key=cell["seconds"].__getitem__)
        result.append((cell["seconds"][name] / cell["seconds"][best], cell, name, best))
    return sorted(result, key=lambda entry: -entry[0])


def table(found: Sequence[Rule], about: dict[str, Any], vendor: str, arguments: argparse.Namespace) -> str:
    """The text of the vendor's file."""
    family, model, _ = about["family_model_stepping"]
    lines = [
        f"// Made by `python benchmarks/tune.py --write` on {about['cpu']} (family {family}, model {model}),",
        f"// {arguments.threads} threads: {', '.join(map(shapes.name, arguments.shapes))} with "
        f"{', '.join(f'{sparsity:.0%}' for sparsity in SPARSITIES)} zeros.",
    ]
    lines += [str(rule).replace("VENDOR", f"Vendor::k{vendor.capitalize()}") for rule in found]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=list(ACTIVATIONS), default=list(ACTIVATIONS))
    parser.add_argument("--shapes", type=shapes.parse, default=SHAPES, metavar="KxN,...")
    parser.add_argument("--m", nargs="+", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--file-bytes", type=int, help="size of the file of copies; default: three times the L3")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the times here, and go on from them")
    parser.add_argument("--write", action="store_true", help="replace the rules of this CPU's vendor in the sources")
    arguments = parser.parse_args()
    about = machine.describe()
    print(machine.headline(about))
    if about["vendor"] not in TABLES:
        raise SystemExit(f"tune.py: there is no table for CPUs of {about['vendor']}")
    vendor = TABLES[about["vendor"]]
    levels = [level["name"] for level in about["isa"]["levels"] if level["supported"] and level["name"] in LEVELS]
    done = documents.Cells(arguments.json, about, ("weights", "k", "n", "sparsity", "m"))
    if not measure_all(arguments, levels, done):
        print("stopped after the time given; the same command goes on")
        return
    text = table(rules(done, levels), about, vendor, arguments)
    print(text)
    print("where choosing by M alone costs most on this CPU:")
    for cost, cell, name, best in regret(done, levels)[:8]:
        matrix = f"{cell['weights']} {shapes.name((cell['k'], cell['n']))} {cell['sparsity']:.0%} M {cell['m']}"
        print(f"  {matrix}: {name} takes {cost:.2f} times as long as {best}")
    if arguments.write:
        path = ROOT / "cpp" / "runtime" / f"choice_{vendor}.inc"
        path.write_text(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
