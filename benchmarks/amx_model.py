"""Predicts what bounds the AMX kernels on a CPU that is not at hand: a model, not a measurement.

Cycles of one core per packed tile, by unit, from the instruction counts that docs/amx.md states and the tests count,
times published throughputs; units work side by side, so the busiest decides. Against it stands the time that memory
needs for the packed bytes. Left out: the packing of X, scaling and epilogues of bf16 and int8, cold starts, other
misses; so real times are longer, most of all for many rows. `python benchmarks/kernels.py` replaces all of it by
measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator

TYPES = ("bf16", "int8", "int4")
GROUP = 32  # weights along K that share a scale of int4


@dataclasses.dataclass(frozen=True)
class Cpu:
    """Throughputs in cycles per instruction or tile, of one core, and memory in GB/s.

    Attributes:
        product: TDPBF16PS or TDPBS*D.
        load: TILELOADD from the L1.
        load_l2: TILELOADD from the L2: 1 KiB at 48 bytes a cycle.
        expand: 16 rows of a sparse tile (kmov, vpexpand) on port 5.
        int4_rows: of a tile of int4 with up to 4 rows, expansion included: those run without tiles.
        int4_scale: scaling the sums of a tile of int4, all groups, up to 16 rows.
        int4_to_bf16: two bf16 tiles of one tile of int4 codes: 9 on port 5 for every row.
    """

    name: str
    clock_ghz: float
    cores: tuple[int, ...]
    socket_gb_s: float
    core_gb_s: float
    product: float
    load: float
    load_l2: float
    expand: float
    int4_rows: float
    int4_scale: float
    int4_to_bf16: float


CPUS = {
    "sapphire-rapids": Cpu(
        # TDP* 16 and TILELOADD 8: Intel's optimization manual. Expansion: llvm-mca 19, -mcpu=sapphirerapids. Eight
        # channels of DDR5-4800: 307 GB/s. What one core can read is taken over from Granite Rapids.
        "Sapphire Rapids, 56 cores, 3.0 GHz under AMX",
        clock_ghz=3.0,
        cores=(1, 8, 28, 56),
        socket_gb_s=307,
        core_gb_s=16,
        product=16,
        load=8,
        load_l2=21,
        expand=48,
        int4_rows=64,
        int4_scale=64,
        int4_to_bf16=144,
    ),
    "granite-rapids-2": Cpu(
        # Measured there: docs/amx.md.
        "Granite Rapids, a virtual machine of 2 CPUs, 3.5 GHz",
        clock_ghz=3.5,
        cores=(1, 2),
        socket_gb_s=31.6,
        core_gb_s=16,
        product=18,
        load=9,
        load_l2=21,
        expand=55,
        int4_rows=65,
        int4_scale=65,
        int4_to_bf16=144,
    ),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One product X[m, k] W[k, n]: milliseconds by unit, and the one that is busy longest."""

    weights: str
    sparsity: float
    m: int
    cores: int
    products_ms: float
    loads_ms: float
    expansion_ms: float
    memory_ms: float

    @property
    def bound(self) -> str:
        parts = {
            "memory": self.memory_ms,
            "tile products": self.products_ms,
            "tile loads": self.loads_ms,
            "expansion": self.expansion_ms,
        }
        return max(parts, key=lambda name: parts[name])

    @property
    def milliseconds(self) -> float:
        return max(self.memory_ms, self.products_ms, self.loads_ms, self.expansion_ms)


def tile_products(weights: str, m: int, k: int, n: int) -> int:
    """How many products of tiles run: the formulas of docs/amx.md."""
    blocks = math.ceil(m / 16) * math.ceil(n / 16)
    if weights == "bf16":
        return blocks * math.ceil(k / 32)
    factor = 1 if weights == "int8" else 2 if m > 23 else max(1, 64 // GROUP)
    return blocks * math.ceil(k / 64) * factor


def packed_bytes(weights: str, sparsity: float, k: int, n: int) -> float:
    """Bytes of the packed weight, sparse form: values, one bit a weight, and the scales of int4."""
    per_weight = {"bf16": 2 * (1 - sparsity), "int8": 1 - sparsity, "int4": (1 - sparsity) / 2 + 2 / GROUP}[weights]
    return k * n * (per_weight + 1 / 8)


def predict(cpu: Cpu, weights: str, sparsity: float, m: int, k: int, n: int, cores: int) -> Prediction:
    products = tile_products(weights, m, k, n)
    # A product needs its tile of weights, and one of X for every two strips; from two row tiles on also one of weights
    # for every two row tiles.
    weight_loads = products / (2 if m > 16 else 1)
    # Up to 32 rows, X stays in the L1; more come from the L2 for every pair of strips. int4 begins every group anew.
    loads = weight_loads * cpu.load + products / 2 * (cpu.load_l2 if m > 32 else cpu.load)
    tiles = math.ceil(n / 16) * math.ceil(k / (32 if weights == "bf16" else 64))
    passes = math.ceil(m / 512)
    expansion = tiles * passes * cpu.expand
    if weights == "int4" and m <= 4:
        products, loads, expansion = 0, 0, tiles * cpu.int4_rows
    elif weights == "int4":
        expansion += tiles * (passes * cpu.int4_to_bf16 if m > 23 else math.ceil(m / 16) * cpu.int4_scale)
    milliseconds = 1 / (cpu.clock_ghz * 1e6 * cores)
    bandwidth = min(cpu.socket_gb_s, cpu.core_gb_s * cores)
    return Prediction(
        weights,
        sparsity,
        m,
        cores,
        products_ms=products * cpu.product * milliseconds,
        loads_ms=loads * milliseconds,
        expansion_ms=expansion * milliseconds,
        memory_ms=packed_bytes(weights, sparsity, k, n) / bandwidth / 1e6,
    )


def predictions(cpu: Cpu, rows: list[int], sparsities: list[float], k: int, n: int) -> Iterator[Prediction]:
    for weights in TYPES:
        for sparsity in sparsities:
            for m in rows:
                for cores in cpu.cores:
                    yield predict(cpu, weights, sparsity, m, k, n, cores)


def table(cpu: Cpu, found: list[Prediction]) -> str:
    """Markdown: a line for each type, sparsity and M; a column for each number of cores."""
    lines = [
        "| weights | zeros | M | "
        + " | ".join(f"{cores} cores" if cores > 1 else "1 core" for cores in cpu.cores)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(cpu.cores),
    ]
    for at in range(0, len(found), len(cpu.cores)):
        row = found[at : at + len(cpu.cores)]
        cells = " | ".join(f"{one.milliseconds:.3g} ms, {one.bound}" for one in row)
        lines.append(f"| {row[0].weights} | {row[0].sparsity:.0%} | {row[0].m} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", choices=CPUS, default="sapphire-rapids")
    parser.add_argument("--shape", default="4096x14336", metavar="KxN")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    cpu = CPUS[arguments.cpu]
    k, n = (int(size) for size in arguments.shape.split("x"))
    found = list(predictions(cpu, arguments.m, arguments.sparsity, k, n))
    if arguments.json:
        rows = [dataclasses.asdict(one) | {"bound": one.bound, "ms": one.milliseconds} for one in found]
        print(json.dumps({"model": dataclasses.asdict(cpu), "k": k, "n": n, "predictions": rows}, indent=2))
    else:
        print(f"A model, not a measurement: {cpu.name}, {k} x {n}\n\n{table(cpu, found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
