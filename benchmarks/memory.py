#!/usr/bin/env python3
"""What a large model costs in memory: while it is converted, and while two processes run it.

The model is a synthetic one (3 GB by default, external data). The conversion runs in a process of its own whose
memory is sampled; "beyond the mapped input" is its resident memory without the pages that map the input's files,
which the system can drop at any time. Then two processes load the converted model and run it once: pages that both
share count half in each one's PSS (proportional set size).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import linear_stack
import machine
import rotation

BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
SAMPLE_SECONDS = 0.01
K, N = 4096, 14336
# The first line of a mapping: its address range, ... and its file.
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)$")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.0, help="size of the dense weights")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    parser.add_argument("--folder", type=Path, default=BUILD)
    arguments = parser.parse_args()
    rotation.clean_up_when_terminated()
    about = machine.describe()
    print(machine.headline(about))
    layers = max(1, round(arguments.gb * 1e9 / (K * N * 4)))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        dense, packed = Path(folder) / "dense.onnx", Path(folder) / "packed.onnx"
        linear_stack.write(dense, K, N, layers, 0.5)
        dense_bytes = _files_bytes(dense)
        conversion = convert(dense, packed, arguments.weights)
        packed_bytes = _files_bytes(packed)
        print(f"dense model {dense_bytes / 1e9:.2f} GB, {layers} matrices of {K * N * 4 / 1e6:.0f} MB")
        print(
            f"converting took {conversion['seconds']:.1f} s and at most {conversion['peak_beyond_input'] / 1e6:.0f} MB "
            f"beyond the mapped input ({conversion['peak_anonymous'] / 1e6:.0f} MB anonymous)"
        )
        sharing = share(packed)
    for index, memory in enumerate(sharing):
        print(
            f"process {index + 1} of 2 on the converted model ({packed_bytes / 1e6:.0f} MB): "
            + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in memory.items())
        )
    if arguments.json:
        document = {
            "machine": about,
            "dense_bytes": dense_bytes,
            "packed_bytes": packed_bytes,
            "conversion": conversion,
            "two_processes": sharing,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


def convert(dense: Path, packed: Path, weights: str) -> dict[str, Any]:
    """Runs the converter and watches it; bytes and seconds."""
    command = [sys.executable, "-m", "sparamx_onnx", "convert", str(dense), "-o", str(packed)]
    command += ["--method", "keep", "--weights", weights]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"peak_beyond_input": 0, "peak_anonymous": 0, "peak_resident": 0}
    while process.poll() is None:
        for name, size in sample(process.pid, dense).items():
            peaks[name] = max(peaks[name], size)
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"memory.py: the conversion ended with status {process.returncode}")
    return {"seconds": time.monotonic() - start, **peaks}


def sample(pid: int, dense: Path) -> dict[str, int]:
    """The present memory of a process, the input's mapped files told apart; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    resident = anonymous = of_input = 0
    is_input = False
    for line in lines:
        mapping = _MAPPING.match(line)
        if mapping:
            is_input = mapping[1].startswith(str(dense))
        elif line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
            resident += size
            of_input += size if is_input else 0
        elif line.startswith("Anonymous:"):
            anonymous += int(line.split()[1]) * 1024
    return {"peak_beyond_input": resident - of_input, "peak_anonymous": anonymous, "peak_resident": resident}


def share(packed: Path) -> list[dict[str, int]]:
    """Memory of two processes that have run the same model, measured while both are alive."""
    job = {"engine": "sparamx", "model": str(packed), "threads": 1, "seed": 0, "stream": None}
    with rotation.Worker(job) as one, rotation.Worker(job) as other:
        for worker in (one, other, one, other):  # the second time, as a system may take pages that rest for a while
            worker.ask({"run": 1, "m": 1})
        found = []
        for worker in (one, other):
            sizes = {}
            for line in Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()[1:]:
                name, _, rest = line.partition(":")
                sizes[name] = int(rest.split()[0]) * 1024
            found.append({name: sizes[name] for name in ("Rss", "Pss", "Anonymous")})
        return found


def _files_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.parent.glob(model.name + "*"))


if __name__ == "__main__":
    main()
