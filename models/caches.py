"""The cache that a benchmark's weights must not fit."""

from __future__ import annotations

import re
from pathlib import Path

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def largest_cache_bytes() -> int:
    """Size of the largest cache that CPU 0 can use, as a rule the L3; 0 if the kernel does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) * _UNITS[found[2]])
    return max(sizes)
