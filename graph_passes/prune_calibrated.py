"""Prunes the layers of a model one after the other, by what enters them when the layers before are pruned already."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.allocate_sparsity import Curve, allocate, cost_curve
from sparamx_onnx.graph_passes.calibration import Activations, LayerGroup, Runs, Visit, calibrate, layer_groups
from sparamx_onnx.graph_passes.packed_weight import PackedWeight
from sparamx_onnx.graph_passes.prune_pattern import Pattern
from sparamx_onnx.graph_passes.prune_sparsegpt import SparseGpt
from sparamx_onnx.graph_passes.prune_wanda import Wanda
from sparamx_onnx.graph_passes.sensitivity import OutputProbe
from sparamx_onnx.ops.errors import SparamxError

# Pieces of rows on which the error of a layer is measured, and outputs that are computed together.
_ERROR_PIECES = 2
_ERROR_COLUMNS = 512

# Runs on which the outputs are looked at to measure sensitivity: each costs a run of the whole model for each layer.
_PROBED_RUNS = 2

Weight = npt.NDArray[np.generic]


class CalibratedPruner:
    """Prunes a weight as calibration has decided; until then, the weight stays as it is.

    Attributes:
        sparsity: The share of zeros that the weight shall get.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self._path: Path | None = None

    def __call__(self, w: Weight) -> Weight:
        """The pruned weight in the place of ``w``, [K, N]."""
        if self._path is None:
            return w
        pruned: Weight = np.load(self._path, mmap_mode="r", allow_pickle=False)
        return pruned

    def decide(self, pruned: Weight, path: Path) -> None:
        """Keeps the pruned weight in a file, from which it is mapped when it is packed."""
        # bfloat16 is no type that a .npy file knows.
        np.save(path, np.asarray(pruned, np.float32), allow_pickle=False)
        self._path = path


class CalibratedPruning:
    """Wanda or SparseGPT, layer by layer.

    Rules:

    1. Layers with the same input are pruned together: they share what is gathered from it.
    2. A group is pruned by what enters it when the groups before it run as they will in the converted model: pruned,
       and with their weights in the type that was asked for.
    3. A weight that several groups use is pruned by the inputs of the first.
    4. By sensitivity, a first pass prunes each layer alone in the unpruned model and measures how much the outputs of
       the model change; the zeros are distributed accordingly.
    """

    def __init__(
        self,
        model: ir.Model,
        runs: Runs,
        folder: Path,
        *,
        updates: bool,
        pattern: Pattern | None = None,
        by_sensitivity: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Describes the pruning; runs nothing.

        Args:
            model: A model after ``RewriteMatMulPass``; weights with a ``CalibratedPruner`` are pruned.
            runs: The inputs. They are gone through once; with ``by_sensitivity`` repeatedly.
            folder: Where pruned weights are kept, for as long as the model is in use, and intermediate results.
            updates: SparseGPT, which changes the weights that stay; otherwise Wanda.
            pattern: N:M instead of unstructured zeros.
            by_sensitivity: Distribute the zeros by measured sensitivity.
            progress: Called with steps done and steps in total.
        """
        self._model = model
        self._runs = runs
        self._folder = folder
        self._updates = updates
        self._pattern = pattern
        self._by_sensitivity = by_sensitivity
        self._progress = progress
        self._errors: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Prunes.

        Returns:
            For each packed weight by name: the error of the layer's result on (a part of) the calibration inputs,
            relative to the result, as a ratio of Euclidean norms.

        Raises:
            SparamxError: The model cannot be run on the inputs, or a weight cannot be read or pruned.
        """
        groups = layer_groups(self._model, lambda weight: isinstance(weight.pruner, CalibratedPruner))
        if not groups:
            return {}
        if self._by_sensitivity:
            self._allocate(groups)
        self._calibrate(groups, self._prune_group, last=True)
        return self._errors

    def _calibrate(self, groups: list[LayerGroup], visit: Visit, *, last: bool = False) -> None:
        passes = 2 if self._by_sensitivity else 1
        before = passes - 1 if last else 0

        def report(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(before * total + done, passes * total)

        calibrate(self._model, groups, self._runs, self._folder, visit, progress=report)

    def _allocate(self, groups: list[LayerGroup]) -> None:
        """Prunes each layer alone in the unpruned model, measures what that does to the outputs, and allocates."""
        count = sum(1 for _ in self._runs)
        chosen = {count * (2 * index + 1) // (2 * _PROBED_RUNS) for index in range(_PROBED_RUNS)}
        sample = {index: run for index, run in enumerate(self._runs) if index in chosen}
        probe = OutputProbe(self._model, groups, sample, self._folder)
        curves: list[Curve] = []
        damages: list[float] = []

        def measure(group: LayerGroup, activations: Activations) -> None:
            method = self._method_for(group, activations)
            for packed in group.weights:
                damages.append(
                    probe.damage(group, packed, np.asarray(self._prune(packed, method), np.float32), activations)
                )
                curves.append(cost_curve(method.costs(packed.source())))

        self._calibrate(groups, measure)
        weights = [weight for group in groups for weight in group.weights]
        sizes = [weight.weight.shape[0] * weight.weight.shape[1] for weight in weights]
        sparsities = allocate(curves, damages, sizes, _pruner(weights[0]).sparsity)
        for weight, sparsity in zip(weights, sparsities, strict=True):
            _pruner(weight).sparsity = sparsity

    def _prune_group(self, group: LayerGroup, activations: Activations) -> None:
        method = self._method_for(group, activations)
        for packed in group.weights:
            pruned = self._prune(packed, method)
            self._errors[packed.name or ""] = _relative_error(
                packed.source(), pruned, itertools.islice(activations, _ERROR_PIECES)
            )
            _pruner(packed).decide(pruned, self._folder / f"pruned{len(self._errors)}.npy")

    def _method_for(self, group: LayerGroup, activations: Activations) -> Wanda | SparseGpt:
        try:
            return SparseGpt(activations, group.k) if self._updates else Wanda(activations, group.k)
        except SparamxError as error:
            raise SparamxError(f"The weight '{group.weights[0].weight.name}' cannot be pruned: {error}") from error

    def _prune(self, packed: PackedWeight, method: Wanda | SparseGpt) -> Weight:
        try:
            return method.prune(packed.source(), _pruner(packed).sparsity, self._pattern)
        except SparamxError as error:
            raise SparamxError(f"The weight '{packed.weight.name}' cannot be pruned: {error}") from error


def _pruner(weight: PackedWeight) -> CalibratedPruner:
    assert isinstance(weight.pruner, CalibratedPruner)
    return weight.pruner


def _relative_error(before: Weight, after: Weight, rows: Iterable[npt.NDArray[np.float32]]) -> float:
    """How far the results ``x before`` and ``x after`` are apart, relative to the former."""
    error = reference = 0.0
    for x in rows:
        for start in range(0, before.shape[1], _ERROR_COLUMNS):
            part = slice(start, start + _ERROR_COLUMNS)
            wanted = np.asarray(before[:, part], np.float32)
            reference += float(np.square(x @ wanted).sum(dtype=np.float64))
            error += float(np.square(x @ (wanted - np.asarray(after[:, part], np.float32))).sum(dtype=np.float64))
    return float(np.sqrt(error / reference)) if reference > 0 else 0.0
