"""Distributes zeros over layers: more of them where the model's outputs suffer less."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Sparsities between which a layer's costs are taken for evenly distributed: multiples of 1 / _STEPS.
_STEPS = 50

# How far a layer's sparsity may be from the mean, as a share of its distance from 0 and from 1: what is known of a
# layer was measured at the mean.
_REACH = 0.3

Curve = npt.NDArray[np.float64]


def cost_curve(scores: npt.NDArray[np.float32]) -> Curve:
    """The sum of the smallest scores, for 0, 1, 2 to 50 fiftieths of them.

    Args:
        scores: What setting each weight to zero costs, of any shape; overwritten.

    Returns:
        float64 [51].
    """
    flat = scores.reshape(-1)
    flat.sort()
    ends = [round(step * flat.size / _STEPS) for step in range(_STEPS + 1)]
    parts = [flat[start:end].sum(dtype=np.float64) for start, end in itertools.pairwise(ends)]
    return np.concatenate([[0.0], np.cumsum(parts)])


def allocate(curves: Sequence[Curve], damages: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """The sparsity of each layer, so that the sum of the damages is least.

    The damage that a layer does to the model's outputs at a sparsity is taken to be proportional to its cost curve.

    Args:
        curves: From ``cost_curve``, one per layer.
        damages: The damage that each layer did when it alone had the mean sparsity.
        sizes: Weights of each layer.
        sparsity: The mean sparsity over all weights.

    Returns:
        Sparsities; weighted with the sizes, their mean is the one wanted.
    """
    low, high = sparsity * (1 - _REACH), sparsity + (1 - sparsity) * _REACH
    grid = np.arange(_STEPS + 1) / _STEPS
    points = np.unique(np.concatenate([[low, high], grid[(grid > low) & (grid < high)]]))
    segments: list[tuple[float, int, float]] = []
    for layer, (curve, damage) in enumerate(zip(curves, damages, strict=True)):
        costs = np.interp(points, grid, curve)
        scale = damage / max(float(np.interp(sparsity, grid, curve)), np.finfo(np.float64).tiny)
        lengths = np.diff(points) * sizes[layer]
        segments += [(s, layer, n) for s, n in zip(scale * np.diff(costs) / lengths, lengths, strict=True)]
    # Scores were sorted, so slopes only grow along a curve: taking the cheapest segments first keeps their order.
    budget = (sparsity - low) * sum(sizes)
    zeros = [low * size for size in sizes]
    for _, layer, length in sorted(segments, key=lambda segment: segment[0]):
        taken = min(length, budget)
        zeros[layer] += taken
        budget -= taken
    return [float(count / size) for count, size in zip(zeros, sizes, strict=True)]
