"""The results of all commands as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparamx_onnx.benchmark import Benchmark, Timing
from sparamx_onnx.conversion import ConversionResult
from sparamx_onnx.environment import Environment
from sparamx_onnx.generation_benchmark import GenerationBenchmark, GenerationTiming
from sparamx_onnx.graph_passes.attention_plan import AttentionPlan, AttentionReason
from sparamx_onnx.graph_passes.plan import Action, NodePlan, Plan, Reason
from sparamx_onnx.inspection import Inspection
from sparamx_onnx.ops.packed_cache import BLOCK
from sparamx_onnx.ops.packing import Form
from sparamx_onnx.tables import Column, duration, percent, rate, render, size
from sparamx_onnx.verification import Verification

_LAYERS = (
    Column("layer", shrinks=True),
    Column("K x N", right=True),
    Column("zeros", right=True),
    Column("before", right=True),
    Column("after", right=True),
    Column("packed"),
)
_LEFT_ALONE = (Column("left alone", shrinks=True), Column("operator"), Column("reason"))
# Products without a weight are only counted: there are many, and nothing is to be done about them.
_ONLY_COUNTED = (Reason.TWO_ACTIVATIONS,)


def conversion_text(result: ConversionResult) -> str:
    """What was converted, layer by layer, and where it is."""
    plan = result.plan
    if not plan.changes:
        return _paragraphs(*_left_alone(plan), f"{result.model} {result.nothing_to_do}{_report(result)}")
    what = _both(plan)
    weights = f"weights {size(plan.bytes_before)} -> {size(plan.bytes_after)}" if plan.converted else ""
    if not result.written:
        last = (
            f"{what} would be converted{weights and f': {weights}'}.{_predicted(result)}"
            f"\nThis was a dry run: {result.output} was not written."
        )
    else:
        files = f"files {size(result.bytes_before)} -> {size(result.bytes_after)}"
        last = (
            f"{what} converted: {weights and f'{weights}; '}{files}."
            f"\nWrote {_written(result)} in {duration(result.seconds)}."
        )
    layers = [_layers(plan.converted)] if plan.converted else []
    return _paragraphs(*layers, *_left_alone(plan), last + _report(result) + _on_this_cpu(result.kernels))


def _predicted(result: ConversionResult) -> str:
    return "" if result.prediction is None else f"\n{result.prediction.text}"


def _report(result: ConversionResult) -> str:
    return f"\nReport: {result.report}." if result.report else ""


def _written(result: ConversionResult) -> str:
    """The files, or the folder that holds them."""
    output, data = result.output or "", result.data
    return output if data is None or Path(data).is_relative_to(output) else f"{output} and {data}"


def _both(plan: Plan) -> str:
    """How much of either kind is converted."""
    counts = [
        _count(nodes, what)
        for nodes, what in ((plan.converted, "linear layer"), (plan.converted_attention, "attention operator"))
        if nodes
    ]
    return " and ".join(counts)


def inspection_text(result: Inspection) -> str:
    """What a model is made of."""
    plan = result.plan
    done = plan.already_converted
    parts = [_layers(done)] if done else []
    if plan.converted:
        parts.append(_layers(plan.converted))
    record = ""
    if result.record:
        options = ", ".join(f"{key} {value}" for key, value in result.record.items() if value and key != "version")
        record = f" Converted by sparamx-onnx {result.record['version']} ({options})."
    counts = [
        f"{len(nodes)} {what}"
        for nodes, what in ((done, "converted"), (plan.converted, "convertible"), (plan.unconverted, "left alone"))
        if nodes
    ]
    last = f"{result.model}: {size(result.bytes_on_disk)}; {', '.join(counts) or 'no matrix products'}.{record}"
    last += _caches(result)
    if plan.converted:
        last += f"\nTheir weights, converted by default: {size(plan.bytes_before)} -> {size(plan.bytes_after)}."
    return _paragraphs(*parts, *_left_alone(plan), last + _on_this_cpu(result.kernels))


def _caches(result: Inspection) -> str:
    """How packed caches are pruned and what they take; nothing without them."""
    if not result.caches:
        return ""
    first = result.caches[0]
    packed = sum(cache.kv_heads * cache.layout.packed_bytes / BLOCK for cache in result.caches)
    dense = sum(cache.kv_heads * (cache.key_size + cache.value_size) * 4 for cache in result.caches)
    return (
        f"\nPacked caches: {len(result.caches)}; {first.k_sparsity:.0%} of the keys' numbers and"
        f" {first.v_sparsity:.0%} of the values' are pruned, but for the first {first.sink} and the last"
        f" {first.recent} tokens;"
        f" {size(round(packed))} an old token, {size(dense)} in fp32."
    )


def verification_text(result: Verification) -> str:
    """The figures of every output and the verdict."""
    columns = (
        Column("output", shrinks=True),
        Column("shape"),
        Column("relative error", right=True),
        Column("lowest cosine", right=True),
        Column("same argmax", right=True),
        Column(""),
    )
    rows = [
        [
            output.name,
            "x".join(map(str, output.shape)) or "scalar",
            "-" if output.relative_error is None else f"{output.relative_error:.2e}",
            "-" if output.cosine is None else f"{output.cosine:.6f}",
            percent(output.argmax_agreement),
            "ok" if output.within else output.problem or "past the tolerance",
        ]
        for output in result.outputs
    ]
    failed = sum(not output.within for output in result.outputs)
    verdict = (
        f"{failed} of {len(rows)} outputs past the tolerance of {result.tolerance:g}"
        if failed
        else f"All outputs within the tolerance of {result.tolerance:g}"
    )
    inputs = f"{result.runs} random inputs" if result.inputs == "generated" else f"inputs from {result.inputs}"
    last = f"{verdict} ({inputs})."
    if failed and result.pruned is not None:
        last += (
            f"\n{result.converted} was pruned when it was converted (method {result.pruned}), which changes its outputs"
            " by more than rounding: judge it on your own data."
        )
    if failed and result.layers is None:
        last += "\n--layers shows from which layers the errors come."
    return _paragraphs(_layer_errors(result), render(columns, rows), last)


def _layer_errors(result: Verification) -> str:
    """The errors of the layers, and the worst of them."""
    if result.layers is None:
        return ""
    worst = result.worst_layer
    if worst is None:
        return "There is no sparse operator whose inputs and result both models have."
    columns = (Column("layer", shrinks=True), Column("own error", right=True), Column("error so far", right=True))
    rows = [[layer.layer, _figure(layer.alone), _figure(layer.so_far)] for layer in result.layers]
    return (
        f"{render(columns, rows)}\n\nThe layer with the largest error of its own is {worst.layer}:"
        f" {_figure(worst.alone)} with the inputs that it has in {result.reference}."
    )


def _figure(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.2e}"


def benchmark_text(result: Benchmark) -> str:
    """Times and memory of every model, and the ratio."""
    columns = (
        Column("model", shrinks=True),
        Column("median", right=True),
        Column("quartiles", right=True),
        Column("runs", right=True),
        *_COST,
    )
    rows = [
        [
            timing.model,
            duration(timing.median),
            f"{duration(timing.quartiles[0])} .. {duration(timing.quartiles[1])}",
            str(timing.runs),
            *_cost(timing),
        ]
        for timing in result.timings
    ]
    sizes = [f"{name} {value}" for name, value in (("batch", result.batch), ("length", result.length)) if value]
    if result.past is not None:
        sizes.append(f"after {result.past} in the cache")
    last = _circumstances(sizes, result)
    if result.ratio is not None and result.ratio_quartiles is not None:
        low, high = result.ratio_quartiles
        last = (
            f"{rows[0][0]} is {result.ratio:.2f}x as fast as {rows[1][0]} (quartiles {low:.2f} .. {high:.2f}).\n{last}"
        )
    return _paragraphs(render(columns, rows), last)


def generation_text(result: GenerationBenchmark) -> str:
    """Tokens a second and memory of every decoder, and the ratios."""
    columns = (
        Column("model", shrinks=True),
        Column("first token", right=True),
        Column("prefill tokens/s", right=True),
        Column("step", right=True),
        Column("decode tokens/s", right=True),
        *_COST,
    )
    rows = [
        [
            timing.model,
            "-" if timing.first_token is None else duration(timing.first_token),
            rate(timing.prefill_tokens_per_second),
            "-" if timing.step is None else duration(timing.step),
            rate(timing.decode_tokens_per_second),
            *_cost(timing),
        ]
        for timing in result.timings
    ]
    lines = [
        f"{rows[0][0]} {what} {ratio:.2f}x as fast as {rows[1][0]} (quartiles {spread[0]:.2f} .. {spread[1]:.2f})."
        for what, ratio, spread in (
            ("reads a prompt", result.prefill_ratio, result.prefill_ratio_quartiles),
            ("decodes", result.decode_ratio, result.decode_ratio_quartiles),
        )
        if ratio is not None and spread is not None
    ]
    sizes = [f"batch {result.batch}"]
    sizes += [f"{name} {value}" for name, value in (("prompt", result.prompt), ("context", result.context)) if value]
    lines.append(_circumstances(sizes, result))
    return _paragraphs(render(columns, rows), "\n".join(lines))


# What both benchmarks tell of a model besides its times.
_COST = (Column("load", right=True), Column("PSS", right=True), Column("model's part", right=True))


def _cost(timing: Timing | GenerationTiming) -> tuple[str, ...]:
    return duration(timing.load_seconds), size(timing.pss), size(timing.model_pss)


def _circumstances(sizes: Sequence[str], result: Benchmark | GenerationBenchmark) -> str:
    threads = "one thread per core" if result.threads is None else f"{result.threads} threads"
    return f"{', '.join([*sizes, threads])}; {result.rounds} rounds."


def environment_text(result: Environment) -> str:
    """The installation and the machine."""
    cpu = result.cpu
    levels = [[level["name"], "yes" if level["supported"] else "no", level["reason"]] for level in cpu["levels"]]
    facts = [
        ("sparamx-onnx", result.version),
        ("library", f"{result.library} ({result.library_version})"),
        ("onnxruntime", result.onnxruntime),
        ("python", result.python),
        ("cpu", cpu["cpu"]),
        ("features", ", ".join(cpu["features"])),
        ("level in force", f"{cpu['level'] or 'none'}: {cpu['reason']}"),
        ("kernels", _kernels(cpu["kernels"]) or "none"),
        ("attention", cpu["attention"] or "none"),
        ("packed attention", cpu["packed_attention"] or "none"),
    ]
    width = max(len(name) for name, _ in facts)
    table = render((Column("level"), Column("runs"), Column("why", shrinks=True)), levels)
    return _paragraphs("\n".join(f"{name.ljust(width)}  {value}" for name, value in facts), table)


def _kernels(kernels: Mapping[str, Mapping[str, str]]) -> str:
    """What runs each type, by the number of rows from which on: ``avx512_vbmi2 (amx from 9 rows) for int4 weights``."""
    parts = []
    for kind, paths in kernels.items():
        first, *others = paths.items()
        later = "".join(f" ({path} from {rows} rows)" for rows, path in others)
        parts.append(f"{first[1]}{later} for {kind} weights")
    return ", ".join(parts)


def _on_this_cpu(kernels: Mapping[str, Mapping[str, str]]) -> str:
    return f"\nKernels on this CPU: {_kernels(kernels)}." if kernels else ""


def _layers(nodes: Sequence[NodePlan]) -> str:
    rows = [
        [
            node.label,
            "-" if node.k is None else f"{node.k} x {node.n}",
            _about(node) + percent(node.sparsity),
            size(node.bytes_before),
            _about(node) + size(node.bytes_after),
            _packed(node),
        ]
        for node in nodes
    ]
    if all(node.error is None for node in nodes):
        return render(_LAYERS, rows)
    errors = ["-" if node.error is None else f"{node.error:.4f}" for node in nodes]
    return render(
        (*_LAYERS, Column("error", right=True)), [[*row, error] for row, error in zip(rows, errors, strict=True)]
    )


def _about(node: NodePlan) -> str:
    return "~" if node.estimated else ""


def _packed(node: NodePlan) -> str:
    words = ["dense" if node.form == Form.DENSE else "", node.weight_type or ""]
    if node.group_size is not None:
        words[-1] += f"/{node.group_size}"
    if node.prune_note:
        words.append("not pruned")
    return " ".join(word for word in words if word)


def _left_alone(plan: Plan) -> list[str]:
    """The nodes that stay as they are, and what each of the reasons means."""
    nodes = plan.unconverted
    rows = [
        [node.label, node.op_type, node.reason.value.replace("_", " ")]
        for node in nodes
        if node.reason not in _ONLY_COUNTED
    ]
    meanings = [
        f"Left alone ({reason.value.replace('_', ' ')}): {count}. {reason.text}"
        for reason, count in plan.reasons.items()
        if any(node.reason is reason for node in nodes)
    ]
    return [render(_LEFT_ALONE, rows) if rows else "", "\n".join([*meanings, *_attention_left_alone(plan)])]


def _attention_left_alone(plan: Plan) -> list[str]:
    """Why attention operators, or their caches, stay as they are, a line per reason."""
    counts = Counter(node.reason for node in plan.attention if node.action is Action.LEFT_ALONE)
    if not plan.replaces_attention:
        del counts[AttentionReason.ALREADY_CONVERTED]
    kept_caches = Counter(node.detail for node in plan.converted_attention if node.detail)
    return [
        *(
            f"Attention left alone ({reason.value.replace('_', ' ')}): {counts[reason]}. {reason.text}"
            for reason in AttentionReason
            if counts[reason]
        ),
        *(f"Attention without a packed cache: {count}. {why}" for why, count in kept_caches.items()),
        *([plan.no_attention] if plan.no_attention else []),
    ]


def _count(nodes: Sequence[NodePlan | AttentionPlan], what: str) -> str:
    return f"{len(nodes)} {what}{'' if len(nodes) == 1 else 's'}"


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
