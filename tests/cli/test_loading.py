"""Model files that cannot be read, and external data that is not what it should be: one sentence each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from sparamx_onnx.loading import load_model
from sparamx_onnx.ops.errors import SparamxError

Save = Callable[..., Path]
Mlp = Callable[..., onnx.ModelProto]


def test_a_model_with_inline_weights(dense: Path) -> None:
    loaded = load_model(dense)
    assert loaded.data_files == ()
    assert loaded.bytes_on_disk == dense.stat().st_size
    assert not loaded.is_converted
    assert not loaded.imports_our_domain
    assert len(loaded.model.graph.initializers) == 4


def test_external_data_stays_where_it_is_and_can_be_read(tmp_path: Path, mlp: Mlp, save: Save) -> None:
    (tmp_path / "weights").mkdir()
    path = save(mlp(), tmp_path / "m.onnx", external="weights/all.bin")
    loaded = load_model(path)
    assert loaded.data_files == (tmp_path.resolve() / "weights" / "all.bin",)
    assert loaded.bytes_on_disk == path.stat().st_size + (tmp_path / "weights" / "all.bin").stat().st_size
    inline = load_model(save(mlp(), tmp_path / "inline.onnx"))
    for name, value in loaded.model.graph.initializers.items():
        expected = inline.model.graph.initializers[name].const_value
        assert value.const_value is not None
        assert expected is not None
        assert value.const_value.tobytes() == expected.tobytes()


def test_the_cache_of_a_hub_is_full_of_links(tmp_path: Path, mlp: Mlp, save: Save) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save(mlp(), blobs / "m.onnx", external="m.onnx_data")
    (blobs / "m.onnx").rename(blobs / "1111")
    (blobs / "m.onnx_data").rename(blobs / "2222")
    (snapshot / "m.onnx").symlink_to("../../blobs/1111")
    (snapshot / "m.onnx_data").symlink_to("../../blobs/2222")
    loaded = load_model(snapshot / "m.onnx")
    assert loaded.data_files == ((blobs / "2222").resolve(),)
    weight = loaded.model.graph.initializers["layer0.weight"].const_value
    assert weight is not None
    assert weight.numpy().shape == (48, 64)


def _refused(path: Path, *parts: str) -> None:
    with pytest.raises(SparamxError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("text", ["hello\nworld\n", "# Notes\n" * 5000, "ä" * 2047 + "öü" * 3000, "{}", "\n"])
def test_a_text_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.onnx"
    path.write_text(text, encoding="utf-8")
    _refused(path, "is a text file, not an ONNX model")


def test_an_empty_file_a_folder_a_pointer_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    _refused(tmp_path / "empty.onnx", "is empty")
    _refused(tmp_path, "is a folder")
    (tmp_path / "genai_config.json").mkdir()
    with pytest.raises(SparamxError, match=r"genai_config\.json: cannot be read: Is a directory"):
        load_model(tmp_path)
    (tmp_path / "lfs.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    _refused(tmp_path / "lfs.onnx", "Git LFS pointer", "git lfs pull")
    _refused(tmp_path / "missing.onnx", "cannot be read: No such file")


def test_a_file_beyond_what_protobuf_reads(tmp_path: Path) -> None:
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(2**31)  # of no blocks on disk
    _refused(tmp_path / "large.onnx", "larger than 2 GiB")


def test_tensors_everywhere_are_looked_at(tmp_path: Path, dense: Path) -> None:
    """In initializers, attributes, bodies, functions; as raw bytes, as numbers, as strings; dense and sparse."""
    path = tmp_path / "odd.onnx"

    def tensor(name: str, kind: int = TensorProto.FLOAT, numbers: int = 2) -> onnx.TensorProto:
        return helper.make_tensor(name, kind, [2], [b"a"] * 2 if kind == TensorProto.STRING else [1] * numbers)

    def model(odd: onnx.TensorProto, where: str) -> onnx.ModelProto:
        made = onnx.load(dense)
        made.graph.initializer.append(tensor("words", TensorProto.STRING))
        body = helper.make_graph([], "body", [], [], [odd])
        attribute = {
            "attribute": helper.make_attribute("t", odd),
            "list": helper.make_attribute("ts", [odd]),
            "body": helper.make_attribute("g", body),
            "bodies": helper.make_attribute("gs", [body]),
        }.get(where)
        holder = helper.make_node("Odd", [], ["odd"], "odd")
        holder.attribute.extend([attribute] if attribute is not None else [])
        if where == "function":
            holder.attribute.append(helper.make_attribute("t", odd))
            made.functions.append(helper.make_function("local", "F", [], [], [holder], []))
        elif where in ("values", "indices"):
            other = tensor("other", TensorProto.INT64)
            pair = (odd, other) if where == "values" else (other, odd)
            made.graph.sparse_initializer.append(helper.make_sparse_tensor(*pair, [9]))
        elif where == "initializer":
            made.graph.initializer.append(odd)
        else:
            made.graph.node.append(holder)
        return made

    for kind in (TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.DOUBLE, TensorProto.INT4):
        path.write_bytes(model(tensor("odd", kind), "initializer").SerializeToString())
        assert "odd" in load_model(path).model.graph.initializers
    for where in ("initializer", "attribute", "list", "body", "bodies", "function", "values", "indices"):
        short = tensor("odd")
        short.float_data.pop()
        path.write_bytes(model(short, where).SerializeToString())
        _refused(path, "tensor 'odd' holds 4 bytes, but its type and shape need 8")


def test_an_attribute_that_refers_to_a_function_s_where_there_is_none(tmp_path: Path, dense: Path) -> None:
    model = onnx.load(dense)
    inner = helper.make_node("Relu", ["x"], ["inner"], "inside")
    inner.attribute.add(name="alpha", ref_attr_name="outer", type=onnx.AttributeProto.FLOAT)
    body = helper.make_graph([inner], "body", [], [])
    for name, value in (("g", body), ("gs", [body])):
        made = onnx.ModelProto.FromString(model.SerializeToString())
        made.graph.node.append(helper.make_node("Odd", [], ["odd"], **{name: value}))
        (tmp_path / "ref.onnx").write_bytes(made.SerializeToString())
        _refused(tmp_path / "ref.onnx", "'alpha' of node 'inside' refers to one of a function's")


def test_cut_and_foreign_files(tmp_path: Path, dense: Path) -> None:
    content = dense.read_bytes()
    for keep in (len(content) - 1, len(content) // 2, 100, 10):
        path = tmp_path / f"cut{keep}.onnx"
        path.write_bytes(content[:keep])
        _refused(path, "damaged, or not an ONNX model")
    (tmp_path / "zeros.onnx").write_bytes(bytes(100))
    _refused(tmp_path / "zeros.onnx", "not an ONNX model")
    (tmp_path / "graphless.onnx").write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
    _refused(tmp_path / "graphless.onnx", "holds no graph")


@pytest.mark.parametrize("name", ["layer0/MatMul", "layer0.weight", "Relu", "mlp"])
def test_names_that_are_no_text(dense: Path, name: str) -> None:
    dense.write_bytes(dense.read_bytes().replace(name.encode(), b"\xff" * len(name)))
    with pytest.raises(SparamxError, match=r"damaged: a name in it, b'.*\\xff', is no text in UTF-8"):
        load_model(dense)


@pytest.fixture
def split(tmp_path: Path, mlp: Mlp, save: Save) -> Path:
    folder = tmp_path / "split"
    folder.mkdir()
    return save(mlp(), folder / "m.onnx", external="m.bin")


def _set(path: Path, key: str, value: str) -> None:
    """Changes an entry of the external data of every tensor."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    path.write_bytes(model.SerializeToString())


def test_an_input_with_a_sparse_default(dense: Path) -> None:
    model = onnx.load(dense)
    default = model.graph.sparse_initializer.add()
    default.values.CopyFrom(helper.make_tensor("x", TensorProto.FLOAT, [1], [1.0]))
    default.indices.CopyFrom(helper.make_tensor("places", TensorProto.INT64, [1], [0]))
    default.dims.extend([2, 64])
    model.graph.input[0].name = "x"
    onnx.save(model, dense)
    _refused(dense, str(dense), "the default of the input 'x' is a sparse initializer")


def test_maps_are_named(dense: Path) -> None:
    """As the classifiers of skl2onnx return them: a sequence of maps from label to probability."""
    model = onnx.load(dense)
    number = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, number))
    model.graph.output.append(helper.make_value_info("probabilities", maps))
    onnx.save(model, dense)
    _refused(dense, str(dense), "'probabilities' is of map type", "zipmap=False")


def test_missing_external_data_is_named(split: Path) -> None:
    (split.parent / "m.bin").unlink()
    _refused(split, str(split.parent / "m.bin"), "is missing")


def test_external_data_that_is_cut_is_named(split: Path) -> None:
    data = split.parent / "m.bin"
    data.write_bytes(data.read_bytes()[:-1])
    _refused(split, str(data), "is too short", "layer1.bias")


def test_external_data_that_is_a_folder(split: Path) -> None:
    (split.parent / "m.bin").unlink()
    (split.parent / "m.bin").mkdir()
    _refused(split, str(split.parent / "m.bin"), "cannot be read")


@pytest.mark.parametrize("location", ["/etc/hostname", "../outside.bin", "sub/../../outside.bin"])
def test_external_data_outside_of_the_folder(split: Path, location: str) -> None:
    (split.parent.parent / "outside.bin").write_bytes(bytes(100_000))
    _set(split, "location", location)
    _refused(split, "outside of its folder", location)


def test_a_link_that_leaves_the_folder(split: Path) -> None:
    data = split.parent / "m.bin"
    data.rename(split.parent.parent / "outside.bin")
    data.symlink_to(split.parent.parent / "outside.bin")
    _refused(split, "m.bin is a link that leaves the model's folder")


def test_a_name_that_no_file_can_have(split: Path) -> None:
    _set(split, "location", "n" * 300)
    _refused(split, "is missing")


def test_external_data_without_an_offset_begins_with_the_file(split: Path) -> None:
    model = onnx.load(split, load_external_data=False)
    for tensor in model.graph.initializer:
        entries = [entry for entry in tensor.external_data if entry.key == "location"]
        del tensor.external_data[:]
        tensor.external_data.extend(entries)
    split.write_bytes(model.SerializeToString())
    assert load_model(split).data_files


def test_a_loop_of_links(split: Path) -> None:
    data = split.parent / "m.bin"
    data.unlink()
    data.symlink_to(data)
    _refused(split, "m.bin")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("location", "", "names no file"),
        ("offset", "-4", "no number"),
        ("offset", "1e3", "no number"),
        ("offset", "99999999999999999999", "too short"),
        ("length", "4", "shorter than its shape needs"),
        ("length", "99999999999999999999", "too short"),
    ],
)
def test_nonsense_in_the_description_of_external_data(split: Path, key: str, value: str, words: str) -> None:
    _set(split, key, value)
    _refused(split, words)


def test_a_tensor_of_absurd_shape_or_type(split: Path) -> None:
    model = onnx.load(split, load_external_data=False)
    model.graph.initializer[0].dims[0] = -1
    split.write_bytes(model.SerializeToString())
    _refused(split, "negative dimension")
    model.graph.initializer[0].dims[0] = 2**62
    split.write_bytes(model.SerializeToString())
    _refused(split, "shorter than its shape needs")
    model.graph.initializer[0].dims[0] = 1
    model.graph.initializer[0].data_type = 999
    split.write_bytes(model.SerializeToString())
    _refused(split, "element type")
