"""What a figure must be published with: the machine that it was measured on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnxruntime

import sparamx_onnx
from sparamx_onnx.models import caches
from sparamx_onnx.ops import library


def available_bytes() -> int:
    """Memory that can be used without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def describe() -> dict[str, Any]:
    """CPU, caches, and the versions that took part."""
    cpu = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, separator, value = line.partition(":")
        if not separator:
            break  # the end of the first CPU
        cpu[key.strip()] = value.strip()
    info = library.cpu_info()
    return {
        "cpu": cpu.get("model name", "unknown"),
        "vendor": cpu.get("vendor_id", "unknown"),
        "family_model_stepping": [int(cpu.get(key, -1)) for key in ("cpu family", "model", "stepping")],
        "cores": os.cpu_count(),
        "l3_bytes": caches.largest_cache_bytes(),
        "isa": info,
        "onnxruntime": onnxruntime.__version__,
        "sparamx_onnx": sparamx_onnx.__version__,
    }


def headline(machine: dict[str, Any]) -> str:
    """One line for the terminal."""
    family, model, stepping = machine["family_model_stepping"]
    return (
        f"{machine['cpu']} (family {family}, model {model}, stepping {stepping}), {machine['cores']} cores, "
        f"L3 {machine['l3_bytes'] / 2**20:.0f} MiB, onnxruntime {machine['onnxruntime']}"
    )
