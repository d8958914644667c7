"""Converts a model file: reads, plans, rewrites, packs and writes it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from sparamx_onnx.environment import kernels_here
from sparamx_onnx.feeds import CalibrationRuns, read_calibration
from sparamx_onnx.genai_folder import FolderOutput
from sparamx_onnx.graph_passes import pipeline
from sparamx_onnx.graph_passes.fuse_siblings import FuseSiblings
from sparamx_onnx.graph_passes.options import Allocation, AttentionMode, ConvertOptions, Method
from sparamx_onnx.graph_passes.plan import Plan
from sparamx_onnx.graph_passes.prune_pattern import Pattern
from sparamx_onnx.graph_passes.write import Saved, data_path, save
from sparamx_onnx.html_report import report_page
from sparamx_onnx.loading import LoadedModel, load_model
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packing import ScaleType, WeightType
from sparamx_onnx.output import FileOutput, check_report, staging, write_error, write_text
from sparamx_onnx.prediction import Prediction, predict
from sparamx_onnx.progress import Report, byte_report


@dataclasses.dataclass(frozen=True)
class ConversionResult:
    """Result of ``convert``.

    Attributes:
        model: Path of the input.
        output: Path of the model (or folder) that was written, or, in a dry run, would be; None if there is nothing to
            convert.
        data: Path of its external data file, likewise; None if none is needed.
        written: Whether anything was written.
        dry_run: Whether that was asked for.
        already_converted: Whether there is nothing to convert because it has been done.
        bytes_before: Size of the input: the model file and its external data.
        bytes_after: Size of what was written; None if nothing was.
        prediction: In a dry run, how fast the model will be at one row on this machine.
        report: Path of the page that was written about it, or None.
        seconds: Time that it took.
        plan: What happened to every MatMul, Gemm and relative, and why.
        kernels: For every type of packed weights, what runs them on this CPU: by M from which on, the kernel.
    """

    model: str
    output: str | None
    data: str | None
    written: bool
    dry_run: bool
    already_converted: bool
    bytes_before: int
    bytes_after: int | None
    prediction: Prediction | None
    report: str | None
    seconds: float
    plan: Plan
    kernels: Mapping[str, Mapping[str, str]]

    @property
    def nothing_to_do(self) -> str:
        """Why nothing was written, as the rest of a sentence about the model."""
        what = "is converted already" if self.already_converted else "has no linear layer to convert"
        return f"{what}; nothing was written."

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "plan"}
        values["prediction"] = None if self.prediction is None else self.prediction.to_dict()
        return {**values, **self.plan.to_json()}


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "auto",
    sparsity: float | None = None,
    pattern: str | None = None,
    allocation: str = "uniform",
    calibration: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    group_size: int | None = None,
    scale_type: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    fuse_siblings: str = "auto",
    attention: str = "keep",
    k_sparsity: float | None = None,
    v_sparsity: float | None = None,
    sink: int | None = None,
    recent: int | None = None,
    report: str | os.PathLike[str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Report | None = None,
) -> ConversionResult:
    """Rewrites the linear layers of a model as sparse operators and writes the result beside the original.

    Weights are packed one at a time, so that a model of any size fits. If there is nothing to convert, or the model has
    been converted already, nothing is written. An interrupted call leaves no part of an output behind.

    Args:
        model: An ONNX file, or a model folder of onnxruntime-genai.
        output: The file to write; its weights go to the same name with ``.data`` appended. By default
            ``NAME.sparse.onnx`` in the folder of ``NAME.onnx``. For a folder, the folder to write, with the converted
            decoder, the operator library, a ``genai_config.json`` that names it and a copy of everything else; by
            default ``FOLDER.sparse`` beside it.
        method: ``keep`` uses the zeros that are there. ``magnitude`` sets the smallest weights to zero without looking
            at any data, which usually ruins a language model at 50 %. ``wanda`` and ``sparsegpt`` run the model on
            ``calibration`` and prune layer by layer; the latter changes the weights that stay to make up for the
            others, and is what to use. ``auto`` is ``sparsegpt`` with ``calibration``, and ``keep`` without.
        sparsity: Share of zeros that pruning leaves behind, per weight, from 0 to below 1; 0.5 if None. Only for
            methods that prune.
        pattern: ``2:4`` or ``4:8``, in place of a sparsity: of 4 (8) consecutive weights of an output along K at most 2
            (4) are not zero.
        allocation: ``uniform`` gives every pruned weight the same sparsity. ``sensitivity`` measures for which layers
            the outputs suffer less, and gives them more of the zeros; with ``calibration``, without a pattern.
        calibration: Typical inputs: an ``.npz`` file (see ``feeds.read_calibration``), or a folder of them.
        weights: Type of the packed weights: ``bf16``, ``fp32`` (exact), ``int8`` or ``int4``. The last two quantize
            activations to int8 when the model runs: judge int4 on your own data. By default ``bf16``, but weights
            that are quantized already keep their int8 or int4 codes.
        group_size: Only for ``int4``: weights along K that share a scale, one of 16, 32, 64, 128 and 256; 32 if None.
            Smaller groups are more accurate and larger.
        scale_type: Only for ``int4``: type of the scales, ``int8`` (if None), ``fp16`` or ``fp32``.
        include: Regular expressions; if any are given, only layers are converted in whose node's, weight's or module's
            name one of them is found. What pruning spares, such as an output layer, is pruned if it is named here.
        exclude: Regular expressions, likewise; layers, and attention operators, that are found are left alone.
        fuse_siblings: Whether layers with the same input, such as query, key and value, become one operator: ``auto``
            where that is faster, ``always`` or ``never``.
        attention: ``fast`` replaces attention operators over a float cache (docs/attention.md); ``keep`` leaves them.
            ``packed`` replaces the graph's caches, too: keys and values become one tensor of bytes, in bf16 and pruned
            as they grow old. ``DecoderSession`` runs such a model; other hosts find the caches described in its
            metadata.
        k_sparsity: Only for ``packed``: the part of old keys that is pruned, from 0 to below 1; 0.3 if None.
        v_sparsity: Only for ``packed``: the part of old values that is pruned; 0.5 if None.
        sink: Only for ``packed``: so many first tokens are never pruned; 64 if None.
        recent: Only for ``packed``: so many last tokens are not pruned yet; 64 if None.
        report: An HTML file to write about the conversion: sizes, zeros and errors of every layer, and what was left
            alone and why. It is also written in a dry run, and where there is nothing to convert.
        force: Replace the output and the report if they exist.
        dry_run: Plan, predict sizes (from samples of large weights) and speed, and write nothing but the report.
        progress: Called with (done, total, what is going on).

    Raises:
        SparamxError: The model or an option cannot be used, or the output cannot be written. The message is one
            sentence that names what is wrong.
    """
    start = time.monotonic()
    options = ConvertOptions(
        # Strings, as ConvertOptions takes them too: it checks them, in words.
        method=cast(Method, method),
        sparsity=sparsity,
        pattern=cast(Pattern | None, pattern),
        allocation=cast(Allocation, allocation),
        calibrated=calibration is not None,
        weights=cast(WeightType | None, weights),
        group_size=group_size,
        scale_type=cast(ScaleType | None, scale_type),
        include=cast(tuple[str, ...], include),
        exclude=cast(tuple[str, ...], exclude),
        fuse_siblings=cast(FuseSiblings, fuse_siblings),
        attention=cast(AttentionMode, attention),
        k_sparsity=k_sparsity,
        v_sparsity=v_sparsity,
        sink=sink,
        recent=recent,
    )
    destination = _destination(Path(model), None if output is None else Path(output))
    if isinstance(destination, FolderOutput) and options.attention is AttentionMode.PACKED:
        raise SparamxError(
            f"{os.fspath(model)}: onnxruntime-genai has no packed caches; choose the attention fast, "
            "or name the .onnx file in it, for DecoderSession"
        )
    loaded = load_model(model)
    if not dry_run:
        destination.check(loaded, force=force)
    if report is not None:
        files = (loaded.path, *loaded.data_files, destination.model, data_path(destination.model))
        check_report(Path(report), others=files, force=force)
    runs = None if calibration is None else read_calibration(calibration, loaded.model)
    reading = pipeline.Reading.SAMPLES if dry_run else pipeline.Reading.NOTHING
    plan = pipeline.run(loaded.model, options, byte_report(progress, "reading weights"), reading=reading)
    saved = None
    if dry_run:
        pipeline.pack_caches(loaded.model, plan, options)
    elif plan.changes:
        saved = _write(loaded, plan, options, runs, destination, progress)
    result = ConversionResult(
        model=os.fspath(model),
        output=os.fspath(destination.target) if plan.changes else None,
        data=os.fspath(data_path(destination.model)) if plan.changes and (saved is None or saved.data_bytes) else None,
        written=saved is not None,
        dry_run=dry_run,
        already_converted=not plan.changes and bool(plan.already_converted),
        bytes_before=loaded.bytes_on_disk,
        bytes_after=None if saved is None else saved.model_bytes + saved.data_bytes,
        prediction=predict(plan) if dry_run else None,
        report=None if report is None else os.fspath(report),
        seconds=time.monotonic() - start,
        plan=plan,
        kernels=kernels_here(plan),
    )
    if report is not None:
        write_text(Path(report), report_page(result))
    return result


def _write(
    loaded: LoadedModel,
    plan: Plan,
    options: ConvertOptions,
    runs: CalibrationRuns | None,
    destination: FileOutput | FolderOutput,
    progress: Report | None,
) -> Saved:
    """Prunes a rewritten model by calibration runs, if there are any, packs its weights and moves it into place."""
    with staging(destination.target) as folder:
        try:
            if runs is not None:
                pipeline.prune(loaded.model, plan, options, runs, folder, byte_report(progress, "pruning layers"))
            pipeline.pack_caches(loaded.model, plan, options)
            path = destination.model_in(folder)
            saved = save(loaded.model, path, progress=byte_report(progress, "packing weights"))
            destination.commit(folder, loaded)
        except OSError as error:
            raise write_error(destination.target, error) from error
    return saved


def _destination(source: Path, output: Path | None) -> FileOutput | FolderOutput:
    """Where the result goes, by the kind of input."""
    if not source.is_dir():
        return FileOutput(source.with_name(f"{source.stem}.sparse.onnx") if output is None else output)
    named = source if source.name not in ("", "..") else source.resolve()
    return FolderOutput(source, named.with_name(f"{named.name}.sparse") if output is None else output)
