"""The weight shapes [K, N] that the benchmarks go through: the linear layers of models that people run."""

from __future__ import annotations

from typing import Final

Shape = tuple[int, int]


def _decoder(width: int, keys: int, inner: int) -> list[Shape]:
    """Q and o, k and v, gate and up, down."""
    return [(width, width), (width, keys), (width, inner), (inner, width)]


def _encoder(width: int) -> list[Shape]:
    """q, k, v and o, the feed-forward layer's two."""
    return [(width, width), (width, 4 * width), (4 * width, width)]


MODELS: Final[dict[str, list[Shape]]] = {
    "Llama-3-8B": _decoder(4096, 1024, 14336),
    "Llama-3.2-1B": _decoder(2048, 512, 8192),
    "Qwen2.5-7B": _decoder(3584, 512, 18944),
    "encoder 384": _encoder(384),
    "encoder 768": _encoder(768),
    "encoder 1024": _encoder(1024),
}

DISTINCT: Final[list[Shape]] = list(dict.fromkeys(shape for shapes in MODELS.values() for shape in shapes))
ROWS: Final = [1, 2, 4, 8, 16, 32, 64, 128, 512]
"""M: one token to a prompt of 512."""

SPARSITIES: Final = [0.3, 0.5, 0.7, 0.9]


def parse(text: str) -> list[Shape]:
    """``4096x14336,768x768`` as shapes."""
    shapes = []
    for part in text.split(","):
        k, n = part.split("x")
        shapes.append((int(k), int(n)))
    return shapes


def name(shape: Shape) -> str:
    """``4096x14336``."""
    return f"{shape[0]}x{shape[1]}"
