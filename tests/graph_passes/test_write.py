"""Saving: where tensors stand, what an interruption leaves in memory, and how much memory it takes."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.graph_passes import mapped, pipeline, write
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.ops.errors import SparamxError

K, N = 96, 80
node = helper.make_node


@pytest.fixture
def layers(make_model, sparse) -> onnx.ModelProto:
    """Two layers to pack, one left alone, a table, a vector large enough to move, and small ones that are not."""
    nodes = [
        node("MatMul", ["x", "w0"], ["m0"]),
        node("Add", ["m0", "b0"], ["a0"]),
        node("MatMul", ["a0", "w1"], ["m1"]),
        node("Softsign", ["m1"], ["s"]),
        node("MatMul", ["s", "keep_me"], ["m2"]),
        node("Gather", ["table", "ids"], ["g"]),
        node("Concat", ["m2", "g"], ["y"], axis=0),
        node("Mul", ["table", "large_vector"], ["other"]),
    ]
    rng = np.random.default_rng(0)
    constants = {
        "w0": sparse((K, N)),
        "b0": rng.standard_normal(N, np.float32),
        "w1": sparse((N, 512)),
        "keep_me": sparse((512, K)),
        "table": rng.standard_normal((3000, K), np.float32),
        "ids": np.array([1, 2], np.int64),
        "large_vector": rng.standard_normal((3000, 1), np.float32),
    }
    return make_model(nodes, {"x": (3, K)}, ["y", "other"], constants)


def _rewritten(source: Path) -> ir.Model:
    model = ir.load(source)
    pipeline.run(model, ConvertOptions(exclude=("keep_me",)))
    return model


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _external(path: Path) -> dict[str, dict[str, str]]:
    proto = onnx.load(path, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


@pytest.fixture(params=["inline", "external"])
def source(request, workbench, layers) -> Path:
    if request.param == "external":
        return workbench.save_external(layers, "in.onnx")
    path = workbench.folder / "in.onnx"
    onnx.save(layers, path)
    return path


def _outputs(open_session: Callable, path: Path) -> list[np.ndarray]:
    x = np.random.default_rng(1).standard_normal((3, K)).astype(np.float32)
    return open_session(path).run(None, {"x": x})


# --- what is written ------------------------------------------------------------------------------------------------


def test_layout(source, workbench, layers, open_session) -> None:
    saved = write.save(_rewritten(source), workbench.folder / "out.onnx")
    assert saved.model_path == workbench.folder / "out.onnx"
    assert saved.data_path == workbench.folder / "out.onnx.data"
    assert saved.data_bytes == saved.data_path.stat().st_size
    assert saved.model_bytes == saved.model_path.stat().st_size

    external = _external(saved.model_path)
    inline = source.name == "in.onnx" and not (workbench.folder / "in.onnx.weights").exists()
    moved = {"w0.sparamx", "w1.sparamx", "keep_me", "table", "large_vector"}
    assert set(external) == (moved if inline else moved | {"b0", "ids"})
    content = saved.data_path.read_bytes()
    end = 0
    # In graph order: those of the input first, then the packed ones.
    for name, entry in external.items():
        offset, length = int(entry["offset"]), int(entry["length"])
        assert entry["location"] == "out.onnx.data"
        assert offset >= end
        assert not any(content[end:offset])
        packed = name.endswith(".sparamx")
        alignment = 65536 if length >= 1 << 20 else 4096 if length >= 4096 or packed else 64
        assert offset % alignment == 0, name
        end = offset + length
    assert end == len(content)
    assert int(external["table"]["length"]) > 1 << 20

    originals = {tensor.name: numpy_helper.to_array(tensor) for tensor in layers.graph.initializer}
    loaded = {t.name: numpy_helper.to_array(t) for t in onnx.load(saved.model_path).graph.initializer}
    for name in ("keep_me", "table", "large_vector", "b0", "ids"):
        np.testing.assert_array_equal(loaded[name], originals[name])
    for expected, actual in zip(_outputs(open_session, source), _outputs(open_session, saved.model_path), strict=True):
        np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max())


def test_strings_and_what_functions_hold(workbench, make_model, sparse, open_session) -> None:
    """Strings stay in the model file; a large constant in a body in a function moves."""
    large = numpy_helper.from_array(np.ones((1, 500), np.float32), "large")
    bodies = {}
    for name in ("then_branch", "else_branch"):
        output = helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None)
        inner = node("Identity", ["large"], [f"{name}.out"], name)
        bodies[name] = helper.make_graph([inner], name, [], [output], [large])
    function = helper.make_function(
        "local", "Choice", ["c"], ["r"], [node("If", ["c"], ["r"], "if", **bodies)], [helper.make_opsetid("", 20)]
    )
    nodes = [
        node("Choice", ["c"], ["r"], domain="local"),
        node("MatMul", ["x", "w"], ["m"]),
        node("Add", ["m", "r"], ["y"]),
        node("Identity", ["words"], ["z"]),
    ]
    condition = [helper.make_tensor_value_info("c", TensorProto.BOOL, ())]
    proto = make_model(
        nodes, {"x": (3, K)}, ["y"], {"w": sparse((K, 500))}, functions=[function], extra_inputs=condition
    )
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, (2,), [b"a", b"b" * 2000]))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.STRING, (2,)))
    converted = workbench.convert(proto)
    (saved,) = converted.proto.functions
    holders = [tensor for a in saved.node[0].attribute for tensor in a.g.initializer]
    assert [tensor.data_location for tensor in holders] == [TensorProto.EXTERNAL] * 2
    x = np.random.default_rng(0).standard_normal((3, K)).astype(np.float32)
    y, words = open_session(converted.path).run(None, {"x": x, "c": np.array(True)})
    np.testing.assert_allclose(y, x @ sparse((K, 500)) + 1, rtol=1e-4, atol=1e-4)
    assert list(words) == ["a", "b" * 2000]


def test_a_list_of_external_tensors_is_refused(workbench, make_model, sparse) -> None:
    proto = make_model([node("MatMul", ["x", "w"], ["y"])], {"x": (3, K)}, ["y"], {"w": sparse((K, N))})
    path = workbench.save_external(proto)
    external = ir.load(path)
    tensor = external.graph.initializers["w"].const_value
    model = ir.from_proto(proto)
    model.graph[0].attributes["several"] = ir.AttrTensors("several", [tensor])
    with pytest.raises(SparamxError, match="'several' of the node 'y' is a list of external tensors"):
        write.save(model, workbench.folder / "out.onnx")


@pytest.mark.parametrize("change", ["cut", "folder"])
def test_data_that_changes_while_it_is_read(layers, workbench, monkeypatch, change: str) -> None:
    """Between the check of a data file and the reading of it."""
    model = _rewritten(workbench.save_external(layers))
    checked = mapped.external_range

    def changed(tensor: ir.ExternalTensor) -> tuple[Path, int, int]:
        path, offset, size = checked(tensor)
        return (path, offset, size + (1 << 30)) if change == "cut" else (path.parent, offset, size)

    monkeypatch.setattr(write, "external_range", changed)
    with pytest.raises(SparamxError, match="ends within" if change == "cut" else "cannot be read from"):
        write.save(model, workbench.folder / "out.onnx")
    if change == "folder":
        monkeypatch.setattr(mapped, "external_range", changed)
        with pytest.raises(SparamxError, match="'keep_me' cannot be read from"):
            mapped.read_tensor(model.graph.initializers["keep_me"].const_value)


def test_the_same_input_gives_the_same_bytes(source, workbench) -> None:
    contents = []
    for folder in ("a", "b"):
        (workbench.folder / folder).mkdir()
        write.save(_rewritten(source), workbench.folder / folder / "out.onnx")
        contents.append(_files(workbench.folder / folder))
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"out.onnx", "out.onnx.data"}


def test_the_model_in_memory_is_not_changed(source, workbench) -> None:
    model = _rewritten(source)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    write.save(model, workbench.folder / "first.onnx")
    after = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert all(after[name] is tensor for name, tensor in before.items())
    write.save(model, workbench.folder / "second.onnx")
    first, second = ((workbench.folder / f"{name}.onnx.data").read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_model_without_large_tensors_has_no_data_file(workbench, make_model) -> None:
    model = ir.from_proto(make_model([node("Neg", ["x"], ["y"])], {"x": (2,)}, ["y"], {}))
    saved = write.save(model, workbench.folder / "out.onnx")
    assert (saved.data_path, saved.data_bytes) == (None, 0)
    assert [path.name for path in workbench.folder.iterdir()] == ["out.onnx"]


def test_files_have_the_usual_permissions(source, workbench) -> None:
    usual = workbench.folder / "usual"
    usual.touch()
    saved = write.save(_rewritten(source), workbench.folder / "out.onnx")
    assert stat.S_IMODE(saved.model_path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    assert stat.S_IMODE(saved.data_path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


def test_several_data_files_and_folders(workbench, layers) -> None:
    (workbench.folder / "parts").mkdir()
    path = workbench.folder / "in.onnx"
    onnx.save(layers, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        (location,) = [entry for entry in tensor.external_data if entry.key == "location"]
        (workbench.folder / location.value).rename(workbench.folder / "parts" / location.value)
        location.value = f"parts/{location.value}"
    onnx.save(proto, path)
    saved = write.save(_rewritten(path), workbench.folder / "out.onnx")
    assert {entry["location"] for entry in _external(saved.model_path).values()} == {"out.onnx.data"}


def test_tensors_that_share_a_range_still_share_it(workbench, make_model) -> None:
    path = workbench.save_external(
        make_model(
            [node("Mul", ["a", "b"], ["y"])], {"x": (1,)}, ["y"], {n: np.ones((64, 64), np.float32) for n in "ab"}
        )
    )
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.initializer[1].external_data[:]
    proto.graph.initializer[1].external_data.extend(proto.graph.initializer[0].external_data)
    onnx.save(proto, path)
    saved = write.save(ir.load(path), workbench.folder / "out.onnx")
    external = _external(saved.model_path)
    assert external["a"] == external["b"]
    assert saved.data_bytes == 64 * 64 * 4


def test_external_constants_of_nodes_move_too(workbench, make_model) -> None:
    value = numpy_helper.from_array(np.arange(600, dtype=np.float32), "v")
    proto = make_model([node("Constant", [], ["y"], value=value)], {"x": (1,)}, ["y"], {})
    path = workbench.folder / "in.onnx"
    onnx.save(proto, path, save_as_external_data=True, convert_attribute=True, location="in.data", size_threshold=0)
    saved = write.save(ir.load(path), workbench.folder / "out.onnx")
    written = onnx.load(saved.model_path, load_external_data=False).graph.node[0].attribute[0].t
    assert {entry.key: entry.value for entry in written.external_data}["location"] == "out.onnx.data"
    assert saved.data_path.read_bytes() == value.raw_data


def test_progress(source, workbench) -> None:
    seen: list[tuple[int, int]] = []
    write.save(_rewritten(source), workbench.folder / "out.onnx", progress=lambda *counts: seen.append(counts))
    done = [count for count, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {done[-1]}
    assert len(seen) >= 5


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_there_is_replaced_and_whoever_has_it_open_keeps_it(source, workbench, open_session) -> None:
    path = workbench.folder / "out.onnx"
    write.save(_rewritten(source), path)
    first = open_session(path)
    x = np.ones((3, K), np.float32)
    before = first.run(None, {"x": x})
    model = _rewritten(source)
    del model.graph.outputs[1]
    write.save(model, path)
    for expected, actual in zip(before, first.run(None, {"x": x}), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert len(open_session(path).run(None, {"x": x})) == 1
    write.save(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10), path)
    assert not write.data_path(path).exists()


def test_external_data_that_is_gone(workbench, layers) -> None:
    model = _rewritten(workbench.save_external(layers, "in.onnx"))
    (workbench.folder / "in.onnx.weights").rename(workbench.folder / "elsewhere")
    with pytest.raises(SparamxError, match=r"external data of 'b0' cannot be read from .*in\.onnx\.weights"):
        write.save(model, workbench.folder / "out.onnx")


# --- interruptions --------------------------------------------------------------------------------------------------


class _Interruption(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


def _progress_that_fails_at(step: int) -> Callable[[int, int], None]:
    steps = iter(range(1, 1000))

    def progress(done: int, total: int) -> None:
        if next(steps) == step:
            raise _Interruption

    return progress


def test_an_interruption_leaves_the_model_in_memory_as_it_was(source, workbench, monkeypatch) -> None:
    path = workbench.folder / "out.onnx"
    model = _rewritten(source)
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    for step in range(1, 6):
        with pytest.raises(_Interruption):
            write.save(model, path, progress=_progress_that_fails_at(step))
        assert all(model.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())

    def interrupt(*_: object) -> None:
        raise _Interruption

    with monkeypatch.context() as patch:
        patch.setattr(write, "_serialize", interrupt)
        with pytest.raises(_Interruption):
            write.save(model, path)
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())
    write.save(model, path)
    assert onnx.load(path).graph.node


def test_full_disk(source, workbench) -> None:
    model = _rewritten(source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write.save(model, workbench.folder / "out.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURED_CONVERSION = """
import json, sys, threading, time
import numpy, onnx_ir
from sparamx_onnx.graph_passes import mapped, pipeline, write
from sparamx_onnx.graph_passes.options import ConvertOptions

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)

source, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = onnx_ir.load(source)
plan = pipeline.run(model, ConvertOptions(**options))
write.save(model, target)
running = False
thread.join()
print(json.dumps({"growth": peak - before, "converted": len(plan.converted)}))
"""

LARGE_K, LARGE_N, LARGE_LAYERS = 4096, 4608, 8


@pytest.fixture(scope="module")
def large(tmp_path_factory, make_model) -> Path:
    """Eight layers of 75 MB each (40 with SPARAMX_TEST_FULL), half of the weights zero, every second one transposed."""
    folder = tmp_path_factory.mktemp("large")
    layers = LARGE_LAYERS * (5 if os.environ.get("SPARAMX_TEST_FULL") else 1)
    w = np.random.default_rng(0).standard_normal((LARGE_K, LARGE_N), np.float32)
    w[w < 0] = 0
    nodes, tensors, value = [], [], "x"
    with (folder / "weights").open("wb") as data:
        for layer in range(layers):
            up = layer % 2 == 0
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
            tensor.dims.extend([LARGE_K, LARGE_N])
            for key, entry in {"location": "weights", "offset": data.tell(), "length": w.nbytes}.items():
                tensor.external_data.add(key=key, value=str(entry))
            tensors.append(tensor)
            w.tofile(data)
            nodes.append(node("Gemm", [value, f"w{layer}"], [f"m{layer}"], transB=0 if up else 1))
            nodes.append(node("Softsign", [f"m{layer}"], [f"s{layer}"]))
            value = f"s{layer}"
    proto = make_model(nodes, {"x": (1, LARGE_K)}, [value], {})
    proto.graph.initializer.extend(tensors)
    onnx.save(proto, folder / "in.onnx")
    return folder / "in.onnx"


@pytest.mark.parametrize("options", [{"method": "keep"}, {"method": "magnitude", "sparsity": 0.7}], ids=str)
def test_memory_is_that_of_one_matrix(large, tmp_path, options) -> None:
    matrix = LARGE_K * LARGE_N * 4
    command = [sys.executable, "-c", MEASURED_CONVERSION, str(large), str(tmp_path / "out.onnx"), json.dumps(options)]
    # One arena and no caching of freed blocks: what is measured is what the conversion holds.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    measured = json.loads(result.stdout)
    assert measured["converted"] >= LARGE_LAYERS
    # The packed weight takes little more than half of 2 bytes for each of 4; pruning holds a copy of the weight too.
    allowed = 0.4 * matrix if options["method"] == "keep" else 1.4 * matrix
    assert measured["growth"] < allowed + 30e6, (
        f"{measured['growth'] / 1e6:.0f} MB for matrices of {matrix / 1e6:.0f} MB"
    )
    (tmp_path / "out.onnx.data").unlink()
