"""Damages models and converts them, or damages converted models and runs them; dies where the product would.

Arguments: `convert` or `run`, a folder to work in, the first number and the number after the last. A number determines
the model, the damage and the options. For each it prints a line of JSON before each stage, and one with the outcome.

Of a damaged model that is converted through the command line:

``refused``: exit code 2 and one sentence, and nothing written. ``same``: the converted model gives what the damaged one
gives. ``unusable``: ONNX Runtime does not run the damaged model, so there is nothing to compare with.

Of a damaged converted model that a session opens and runs: ``refused``, with a message, or ``ran``.

Anything else begins with ``WRONG``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx import cli

K, N = 40, 24
TOLERANCE = 1e-4
# The original has one scale of activations for all rows.
DYNAMIC_TOLERANCE = 0.05
node = helper.make_node


# --- models -----------------------------------------------------------------------------------------------------------


def _weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * (rng.random(shape) < 0.5)).astype(np.float32)


def _model(
    nodes: list, initializers: dict[str, np.ndarray], inputs: dict[str, list], **more: object
) -> onnx.ModelProto:
    for index, one in enumerate(nodes):
        one.name = one.name or f"n{index}"
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(n, TensorProto.BOOL if n == "c" else TensorProto.FLOAT, s)
            for n, s in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=imports, **more)


def _mlp(rng: np.random.Generator) -> onnx.ModelProto:
    nodes = [
        node("Transpose", ["w0"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["m"]),
        node("Add", ["m", "b0"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Gemm", ["r", "w1", "b1"], ["g"], transB=1, alpha=0.5),
        node("Cast", ["w2"], ["c2"], to=TensorProto.FLOAT),
        node("MatMul", ["g", "c2"], ["y"]),
    ]
    weights = {"w0": _weights(rng, N, K), "b0": _weights(rng, N), "w1": _weights(rng, K, N), "b1": _weights(rng, K)}
    weights["w2"] = _weights(rng, K, N).astype(np.float16)
    return _model(nodes, weights, {"x": [3, K]})


def _bodies(rng: np.random.Generator) -> onnx.ModelProto:
    bodies = []
    for name in ("then", "else"):
        inner = [
            node("MatMul", ["x", "w"], [f"{name}.m"], f"{name}.m"),
            node("Add", ["b", f"{name}.m"], [f"{name}.y"], name),
        ]
        output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        bodies.append(helper.make_graph(inner, name, [], [output]))
    choice = node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    return _model([choice], {"w": _weights(rng, K, N), "b": _weights(rng, N)}, {"x": [3, K], "c": []})


def _quantized(rng: np.random.Generator) -> onnx.ModelProto:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "q", "xz", "qz"], ["i"]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["xs", "qs"], ["s"]),
        node("Mul", ["f", "s"], ["m"]),
        node("DequantizeLinear", ["v", "vs"], ["d"], axis=0),
        node("Gemm", ["m", "d"], ["h"], transB=1),
        node("MatMulNBits", ["h", "p", "ps"], ["y"], domain="com.microsoft", K=K, N=N, bits=4, block_size=16),
    ]
    weights = {
        "q": rng.integers(0, 256, (K, N)).astype(np.uint8), "qz": np.array(128, np.uint8),
        "qs": rng.random(N).astype(np.float32), "v": rng.integers(-127, 128, (K, N)).astype(np.int8),
        "vs": rng.random(K).astype(np.float32), "p": rng.integers(0, 256, (N, 3, 8)).astype(np.uint8),
        "ps": rng.random(N * 3).astype(np.float32),
    }  # fmt: skip
    return _model(nodes, weights, {"x": [3, K]})


def _fused(rng: np.random.Generator) -> onnx.ModelProto:
    function = helper.make_function(
        "local",
        "Linear",
        ["a", "b"],
        ["o"],
        [node("MatMul", ["a", "b"], ["o"], "inner")],
        [helper.make_opsetid("", 21)],
    )
    nodes = [
        node("Attention", ["x", "qkv", "qkv.b"], ["a"], domain="com.microsoft", num_heads=4),
        node("FusedMatMul", ["a", "w"], ["m"], domain="com.microsoft", transB=1, alpha=2.0),
        node("Einsum", ["m", "e"], ["h"], equation="bsk,kn->bsn"),
        node("Linear", ["h", "f"], ["y"], domain="local"),
    ]
    weights = {
        "qkv": _weights(rng, K, 96), "qkv.b": _weights(rng, 96), "w": _weights(rng, K, 32), "e": _weights(rng, K, N),
        "f": _weights(rng, N, K),
    }  # fmt: skip
    return _model(nodes, weights, {"x": [2, 3, K]}, functions=[function])


def _decoder(rng: np.random.Generator) -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w"], ["qkv"]),
        node(
            "GroupQueryAttention", ["qkv", "", "", "past.key", "past.value", "last", "total", "cos", "sin"],
            ["a", "present.key", "present.value"], domain="com.microsoft", num_heads=4, kv_num_heads=2, do_rotary=1,
        ),
        node("MatMul", ["a", "v"], ["y"]),
    ]  # fmt: skip
    weights = {
        "w": _weights(rng, K, 128), "v": _weights(rng, 64, N), "last": np.array([4, 4], np.int32),
        "total": np.array(5, np.int32), "cos": rng.random((9, 8)).astype(np.float32),
        "sin": rng.random((9, 8)).astype(np.float32),
    }  # fmt: skip
    cache = ["batch", 2, "past", 16]
    model = _model(nodes, weights, {"x": [2, 5, K], "past.key": cache, "past.value": cache})
    for name in ("present.key", "present.value"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return model


MODELS = [_mlp, _bodies, _quantized, _fused]
OPTIONS = [
    *[["--weights", "fp32"]] * 4,
    [],
    ["--weights", "int8"],
    ["--weights", "int4", "--group-size", "16"],
    ["--dry-run"],
]

# What converted models are made from, with which options.
CONVERTED = [
    *((make, ["--weights", weights]) for make in MODELS for weights in ("fp32", "bf16", "int8", "int4")),
    *((_decoder, ["--weights", "bf16", "--attention", attention]) for attention in ("fast", "packed") * 4),
]


# --- damage -----------------------------------------------------------------------------------------------------------


def _graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    bodies = [a.g for n in model.graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [model.graph, *bodies]


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for graph in _graphs(model) for n in graph.node] + [n for f in model.functions for n in f.node]


def _names(model: onnx.ModelProto) -> list[str]:
    names = [name for n in _nodes(model) for name in (*n.input, *n.output)]
    return [*names, *(t.name for t in model.graph.initializer), "", "nobody"]


def _tensor(model: onnx.ModelProto, rng: random.Random) -> onnx.TensorProto:
    return rng.choice(list(model.graph.initializer))


def _drop_initializer(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.initializer.remove(_tensor(model, rng))


def _drop_node(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = rng.choice(_graphs(model))
    graph.node.remove(rng.choice(list(graph.node)))


def _rewire(model: onnx.ModelProto, rng: random.Random) -> None:
    """Another input: of another shape, of a later node (a cycle), none, or one that nobody defines."""
    one = rng.choice([n for n in _nodes(model) if n.input])
    one.input[rng.randrange(len(one.input))] = rng.choice(_names(model))


def _input_count(model: onnx.ModelProto, rng: random.Random) -> None:
    one = rng.choice([n for n in _nodes(model) if n.input])
    if rng.random() < 0.5:
        del one.input[rng.randrange(len(one.input)) :]
    else:
        one.input.extend(rng.choices(_names(model), k=rng.randrange(1, 4)))


def _rename_output(model: onnx.ModelProto, rng: random.Random) -> None:
    """A name that is taken, or none; or outputs that are missing or too many."""
    one = rng.choice(_nodes(model))
    match rng.randrange(3):
        case 0:
            one.output[0] = rng.choice(_names(model))
        case 1:
            del one.output[:]
        case 2:
            one.output.append("extra")


def _shape(model: onnx.ModelProto, rng: random.Random) -> None:
    dims = _tensor(model, rng).dims
    match rng.randrange(6):
        case 0 if dims:
            dims[rng.randrange(len(dims))] = rng.choice([0, 1, -1, 2**31, 2**62, -(2**63), 7])
        case 1:
            dims.append(rng.choice([1, 2, 2**40]))
        case 2 if dims:
            del dims[0]
        case 3:
            dims.reverse() if len(set(dims)) > 1 else dims.append(1)
        case 4:
            del dims[:]
        case _:
            dims.extend([2**31, 2**31])


def _consistent_shape(model: onnx.ModelProto, rng: random.Random) -> None:
    """Another shape of as many elements, or values cut to another shape: only the graph is wrong then."""
    tensor = _tensor(model, rng)
    array = numpy_helper.to_array(tensor)
    shapes = [array.reshape(-1), array[None], array[..., None], array[:0], array.T, array.reshape(-1)[:1], array[:-1]]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rng.choice(shapes)), tensor.name))


def _type(model: onnx.ModelProto, rng: random.Random) -> None:
    _tensor(model, rng).data_type = rng.choice([*range(28), 99, -1])


def _values(model: onnx.ModelProto, rng: random.Random) -> None:
    """Other types with values of that type, and values that are not finite."""
    tensor = _tensor(model, rng)
    array = numpy_helper.to_array(tensor)
    if array.dtype.kind == "f" and rng.random() < 0.5:
        array = array.copy()
        array.reshape(-1)[: max(1, array.size // 50)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-42])
    else:
        array = array.astype(rng.choice([np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64]))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _raw(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    tensor.raw_data = rng.choice(
        [b"", tensor.raw_data[:-1], tensor.raw_data * 2, tensor.raw_data[: len(tensor.raw_data) // 2]]
    )


def _attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    one = rng.choice([n for n in _nodes(model) if n.attribute] or _nodes(model))
    if one.attribute and rng.random() < 0.3:
        one.attribute.remove(rng.choice(list(one.attribute)))
        return
    known = [a.name for a in one.attribute] + [
        "axis",
        "transA",
        "transB",
        "alpha",
        "beta",
        "perm",
        "block_size",
        "to",
        *("K", "N", "splits", "epilogue", "roles", "num_heads", "cache", "k_sparsity", "recent"),
    ]
    value = rng.choice(
        [0, 1, -1, 2, 5, 2**40, -(2**63), 0.0, 1.5, float("nan"), "text", "", [], [1, 0], [0, 0, 5], [1.5], b"\xff"]
    )
    name = rng.choice(known)
    for attribute in [a for a in one.attribute if a.name == name]:
        one.attribute.remove(attribute)
    if value == []:
        one.attribute.append(onnx.AttributeProto(name=name, type=onnx.AttributeProto.INTS))
    else:
        one.attribute.append(helper.make_attribute(name, value))


def _reference_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    one = rng.choice(_nodes(model))
    kind = rng.choice([onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT, onnx.AttributeProto.GRAPH])
    names = [a.name for a in one.attribute] or ["axis"]
    name = rng.choice(names)
    for attribute in [a for a in one.attribute if a.name == name]:
        one.attribute.remove(attribute)
    one.attribute.append(onnx.AttributeProto(name=name, type=kind, ref_attr_name="outer"))


def _operator(model: onnx.ModelProto, rng: random.Random) -> None:
    one = rng.choice(_nodes(model))
    operators = [
        "MatMul",
        "Gemm",
        "Transpose",
        "Identity",
        "Cast",
        "DequantizeLinear",
        "MatMulInteger",
        "QLinearMatMul",
        "If",
        "Loop",
        "Einsum",
        "Constant",
        "",
        "Linear",
    ]
    if rng.random() < 0.8:
        one.op_type = rng.choice(operators)
    else:
        one.domain = rng.choice(["com.microsoft", "com.sparamx", "local", "ai.onnx", "nobody"])
    if rng.random() < 0.3:
        one.domain, one.op_type = (
            "com.microsoft",
            rng.choice(
                ["QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "FusedGemm", "Attention", "MatMulNBits"]
            ),
        )


def _order(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = list(model.graph.node)
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _repeat(model: onnx.ModelProto, rng: random.Random) -> None:
    """The same node, initializer or input twice, or an initializer that is an input too."""
    match rng.randrange(4):
        case 0:
            model.graph.node.append(rng.choice(list(model.graph.node)))
        case 1:
            model.graph.initializer.append(_tensor(model, rng))
        case 2:
            model.graph.input.append(model.graph.input[0])
        case 3:
            tensor = _tensor(model, rng)
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _versions(model: onnx.ModelProto, rng: random.Random) -> None:
    match rng.randrange(4):
        case 0:
            model.ir_version = rng.choice([0, 1, 3, 4, 7, 99, 2**40])
        case 1:
            model.opset_import[0].version = rng.choice([0, 1, 6, 9, 10, 13, 19, 99, -1])
        case 2:
            del model.opset_import[rng.randrange(len(model.opset_import)) :]
        case 3:
            model.opset_import.add(domain="", version=rng.choice([7, 22]))


def _interface(model: onnx.ModelProto, rng: random.Random) -> None:
    match rng.randrange(5):
        case 0:
            del model.graph.input[:]
        case 1:
            del model.graph.output[:]
        case 2:
            model.graph.output[0].name = rng.choice(_names(model))
        case 3:
            model.graph.input[0].ClearField("type")
        case 4:
            dims = model.graph.input[0].type.tensor_type.shape.dim
            dims[-1].dim_value = rng.choice([0, -5, 7, 2**50])


def _functions(model: onnx.ModelProto, rng: random.Random) -> None:
    """A function that calls itself, that lies about its inputs, or whose output nobody computes."""
    body = [node(rng.choice(["Linear", "MatMul"]), ["a", "b"], ["o"], "inner", domain=rng.choice(["", "local"]))]
    outputs = rng.choice([["o"], ["a"], [], ["nobody"]])
    function = helper.make_function(
        "local", rng.choice(["Linear", "Other"]), rng.choice([["a", "b"], ["a"], []]), outputs, body,
        [helper.make_opsetid("", rng.choice([21, 20, 1])), helper.make_opsetid("local", 1)],
    )  # fmt: skip
    model.functions.append(function)
    model.graph.node[-1].op_type, model.graph.node[-1].domain = function.name, "local"


def _sparse(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    model.graph.initializer.remove(tensor)
    values = numpy_helper.from_array(np.ones(2, np.float32), tensor.name)
    indices = numpy_helper.from_array(np.array([0, rng.choice([1, 5, 2**40])]), "")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, tensor.dims))


Damage = Callable[[onnx.ModelProto, random.Random], None]
DAMAGES: list[Damage] = [
    _drop_initializer, _drop_node, _rewire, _rewire, _input_count, _rename_output, _shape, _consistent_shape,
    _consistent_shape, _type, _values, _values, _raw, _attribute, _attribute, _attribute, _reference_attribute,
    _operator, _order, _repeat, _versions, _interface, _functions, _sparse,
]  # fmt: skip


def _damage_external(path: Path, rng: random.Random) -> None:
    """Data that lies elsewhere, is too short, or is described by nonsense."""
    model = onnx.load(path, load_external_data=False)
    data = path.with_name("m.bin")
    entry = rng.choice([e for t in model.graph.initializer for e in t.external_data])
    match rng.randrange(4):
        case 0:
            content = data.read_bytes()
            data.write_bytes(content[: rng.randrange(len(content))])
        case 1:
            data.unlink()
            if rng.random() < 0.5:
                data.symlink_to("/etc/passwd")
        case 2:
            entry.value = rng.choice(
                ["../m.bin", "/etc/passwd", "", "m.onnx", "-1", "99999999999999999999", "0", "1", "x" * 5000]
            )
        case 3:
            entry.key = rng.choice(["location", "offset", "length", "nobody"])
    path.write_bytes(model.SerializeToString())


def _damage_bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 6)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    path.write_bytes(bytes(content))


def write_damaged(number: int, path: Path) -> str:
    """Writes the model of a number; returns what was done to it."""
    rng = random.Random(number)
    make = rng.choice(MODELS)
    return f"{make.__name__} {damage(make(np.random.default_rng(number)), path, number, rng)}"


def damage(model: onnx.ModelProto, path: Path, number: int, rng: random.Random) -> str:
    """Writes a model with damage; returns which."""
    if number % 8 == 0:
        onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=0)
        _damage_external(path, rng)
        return "external"
    if number % 8 == 1:
        onnx.save(model, path)
        _damage_bytes(path, rng)
        return "bytes"
    damages = rng.choices(DAMAGES, k=rng.choice([1, 1, 1, 2, 3]))
    done = []
    for one in damages:
        # A model that is damaged already may lack what the next damage looks for.
        with contextlib.suppress(LookupError, ValueError, TypeError, OverflowError, AttributeError):
            one(model, rng)
            done.append(one.__name__)
    path.write_bytes(model.SerializeToString())
    return " ".join(done)


# --- what becomes of it -----------------------------------------------------------------------------------------------


def _run(session: onnxruntime.InferenceSession) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) and 0 <= d < 1000 else 2 for d in value.shape]
        kind = {"tensor(bool)": np.bool_, "tensor(float)": np.float32, "tensor(uint8)": np.uint8}.get(value.type)
        if kind is None:
            raise ValueError(value.type)
        if kind is np.uint8:
            shape[-1:] = [0]  # a packed cache without tokens
        feeds[value.name] = (
            rng.standard_normal(shape) > -9 if kind is np.bool_ else rng.standard_normal(shape)
        ).astype(kind)
    with np.errstate(all="ignore"):
        return session.run(None, feeds)


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Without fusions: those of quantized weights quantize the activations too.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _convert(folder: Path, arguments: list[str]) -> str | None:
    """Converts; None if there is an output, otherwise the outcome."""
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        code = cli.run(["convert", str(folder / "m.onnx"), *arguments])
    sentence = errors.getvalue()
    if code == 2:
        if not re.fullmatch(r"error: [^\n]+\.\n", sentence) or "bug in" in sentence:
            return f"WRONG: {sentence}"
        if {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} != before:
            return f"WRONG: refused, but wrote: {sentence}"
        return f"refused: {sentence}"
    if code != 0 or sentence:
        return f"WRONG: exit code {code}: {sentence}"
    return None if (folder / "m.sparse.onnx").exists() else "unusable: nothing to convert"


def _compare(folder: Path, tolerance: float | None, stage: Callable[[str], None]) -> str:
    try:
        stage("running the original")
        expected = _run(onnxruntime.InferenceSession(folder / "m.onnx", _options(), providers=["CPUExecutionProvider"]))
    except Exception as error:
        return f"unusable: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    stage("running the converted")
    try:
        actual = _run(sparamx_onnx.InferenceSession(folder / "m.sparse.onnx", _options()))
    except Exception as error:
        return f"WRONG: the original runs, but not the converted: {error}"
    for one, other in itertools.zip_longest(expected, actual):
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            return "WRONG: outputs of another type or shape"
        finite = np.isfinite(one)
        if tolerance is None or not finite.all():
            continue
        if not np.abs(one - other).max(initial=0.0) <= tolerance * max(np.abs(one).max(initial=0.0), 1e-30):
            return f"WRONG: {np.abs(one - other).max()} off {np.abs(one).max()}"
    return "same"


def attempt(folder: Path, number: int, stage: Callable[[str], None]) -> str:
    """What becomes of the model of a number."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    what = write_damaged(number, folder / "m.onnx")
    stage(what)
    arguments = OPTIONS[number // 8 % len(OPTIONS)]
    outcome = _convert(folder, arguments)
    if outcome is not None:
        return outcome
    tolerance = DYNAMIC_TOLERANCE if what.startswith("_quantized") else TOLERANCE
    return _compare(folder, tolerance if "fp32" in arguments else None, stage)


def attempt_run(folder: Path, number: int, stage: Callable[[str], None]) -> str:
    """What becomes of the converted model of a number."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rng = random.Random(number)
    make, options = rng.choice(CONVERTED)
    onnx.save(make(np.random.default_rng(number)), folder / "m.onnx")
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.run(["convert", str(folder / "m.onnx"), *options]) == 0
    damaged = folder / "damaged.onnx"
    what = damage(onnx.load(folder / "m.sparse.onnx"), damaged, number, rng)
    stage(f"{make.__name__} {' '.join(options)}: {what}")
    try:
        session = sparamx_onnx.InferenceSession(damaged, _options())
        stage("running the damaged")
        _run(session)
    except Exception as error:
        return f"refused: {error}" if str(error) else f"WRONG: {type(error).__name__} without a word"
    return "ran"


def main() -> None:
    attempt_one = {"convert": attempt, "run": attempt_run}[sys.argv[1]]
    folder, first, end = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for number in range(first, end):

        def stage(what: str, number: int = number) -> None:
            print(json.dumps([number, "stage", what]), flush=True)

        print(json.dumps([number, "outcome", attempt_one(folder / "work", number, stage)]), flush=True)


if __name__ == "__main__":
    main()
