"""Reads ONNX files, and says in one sentence why one cannot be read.

The weights stay on disk: external data is mapped when a tensor is first used, and every file it needs is checked here.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from sparamx_onnx.genai_config import model_file
from sparamx_onnx.ops.definitions import DOMAIN
from sparamx_onnx.ops.errors import SparamxError, in_one_sentence

_LARGEST_PROTOBUF = 2**31 - 1
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in memory, its weights still on disk.

    Attributes:
        path: The file that was asked for; in a folder, the one that the folder stands for.
        model: Its content; external tensors are lazy and carry absolute paths.
        data_files: The external data files that it refers to, links followed, in order of first use.
        bytes_on_disk: Size of the model file and of its external data files.
    """

    path: Path
    model: ir.Model
    data_files: tuple[Path, ...]
    bytes_on_disk: int

    @property
    def is_converted(self) -> bool:
        """Whether it holds operators of ours."""
        return any(node.domain == DOMAIN for graph in self.model.graphs() for node in graph)

    @property
    def imports_our_domain(self) -> bool:
        """Whether ONNX Runtime needs our library to load it."""
        return DOMAIN in self.model.opset_imports or self.is_converted


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """Reads a model file and checks that all of its external data is there.

    Args:
        path: An ONNX file (protobuf), or a model folder of onnxruntime-genai, which stands for its decoder.

    Raises:
        SparamxError: The file is missing, unreadable, no ONNX model or damaged, or its external data is missing, too
            short or outside of the model's folder.
    """
    path = model_file(Path(path))
    proto = _parse(path)
    _check_names(path, proto)
    _check_types(path, proto)
    _check_sparse(path, proto)
    folders = {_real(path.parent), _real(path).parent}
    sizes: dict[Path, int] = {}
    for tensor in tensors_of(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _resolve_external(path, folders, tensor, sizes)
        else:
            _check_inline(path, tensor)
    _check_references(path, proto)
    with in_one_sentence(f"{path}: not a valid ONNX model"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of them is checked, and refused in one sentence
        model = ir.serde.deserialize_model(proto)
    total = _size(path) + sum(sizes.values())
    return LoadedModel(path, model, tuple(sizes), total)


def _parse(path: Path) -> onnx.ModelProto:
    try:
        if path.stat().st_size > _LARGEST_PROTOBUF:
            raise SparamxError(f"{path}: larger than 2 GiB, which an ONNX file (without its external data) cannot be")
        content = path.read_bytes()
    except OSError as error:
        raise SparamxError(f"{path}: cannot be read: {error.strerror}") from error
    if not content:
        raise SparamxError(f"{path}: is empty, not an ONNX model")
    if content.startswith(_LFS_POINTER):
        raise SparamxError(f"{path}: is a Git LFS pointer, not the model itself; run 'git lfs pull'")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError, which has no types to import it with
        what = "is a text file, not an ONNX model" if _is_text(content) else "damaged, or not an ONNX model"
        raise SparamxError(f"{path}: {what}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        what = "is a text file, not an ONNX model" if _is_text(content) else "not an ONNX model (it holds no graph)"
        raise SparamxError(f"{path}: {what}")
    return proto


def _is_text(content: bytes) -> bool:
    head = content[:4096]
    try:
        text = head.decode("utf-8", errors="strict" if len(content) <= len(head) else "ignore")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\n\r\f" for character in text)


def _check_names(path: Path, proto: onnx.ModelProto) -> None:
    """Refuses names that are no text; of such protobuf gives the bytes."""
    for name in _names_of(proto):
        if isinstance(name, bytes):
            raise SparamxError(f"{path}: damaged: a name in it, {name!r}, is no text in UTF-8")


def _check_types(path: Path, proto: onnx.ModelProto) -> None:
    """Refuses what onnx_ir cannot represent: maps, as of labels to probabilities, and opaque types."""
    graph = proto.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = _innermost_kind(value.type)
        if kind in ("map", "opaque"):
            raise SparamxError(
                f"{path}: '{value.name}' is of {kind} type, which is not supported; export the model without it"
                " (skl2onnx: zipmap=False)"
            )


def _check_sparse(path: Path, proto: onnx.ModelProto) -> None:
    """Refuses sparse defaults of inputs, which onnx_ir drops; those of other values are missed where they are read."""
    inputs = {value.name for value in proto.graph.input}
    for sparse in proto.graph.sparse_initializer:
        if sparse.values.name in inputs:
            raise SparamxError(
                f"{path}: the default of the input '{sparse.values.name}' is a sparse initializer, which is not"
                " supported"
            )


def _innermost_kind(type_proto: onnx.TypeProto) -> str:
    """What a type is, or what the elements of a sequence or an optional value are."""
    kind = (type_proto.WhichOneof("value") or "").removesuffix("_type")
    if kind in ("sequence", "optional"):
        return _innermost_kind(getattr(type_proto, f"{kind}_type").elem_type)
    return kind


def _names_of(proto: onnx.ModelProto) -> Iterator[str | bytes]:
    """The names of tensors, inputs and outputs, and what nodes consist of."""
    yield proto.graph.name
    for value in (*proto.graph.input, *proto.graph.output, *tensors_of(proto)):
        yield value.name
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in _nodes_of(nodes):
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)


def _resolve_external(path: Path, folders: set[Path], tensor: onnx.TensorProto, sizes: dict[Path, int]) -> None:
    """Checks where an external tensor lies and makes its location absolute; notes the file's size in ``sizes``.

    A location may be a link, as in the cache of huggingface_hub, as long as it ends in the model's folder or in the
    folder where the model file really is.
    """
    entries = {entry.key: entry for entry in tensor.external_data}
    if "location" not in entries or not entries["location"].value:
        raise SparamxError(f"{path}: the external data of tensor '{tensor.name}' names no file")
    location = entries["location"].value
    if Path(location).is_absolute() or ".." in Path(location).parts:
        raise SparamxError(f"{path}: tensor '{tensor.name}' refers to external data outside of its folder: {location}")
    target = _real(path.parent / location)
    if target not in sizes:
        if not any(target.is_relative_to(folder) for folder in folders):
            raise SparamxError(f"{path}: external data {location} is a link that leaves the model's folder")
        if not _exists(target):
            raise SparamxError(f"{path}: its external data file {path.parent / location} is missing")
        if not target.is_file() or not os.access(target, os.R_OK):
            raise SparamxError(f"{path}: its external data file {path.parent / location} cannot be read")
        sizes[target] = _size(target)
    offset, length = (_number(path, tensor, entries.get(key)) for key in ("offset", "length"))
    needed = length or _dense_bytes(path, tensor)
    if offset + needed > sizes[target]:
        raise SparamxError(
            f"{path}: its external data file {path.parent / location} is too short: tensor '{tensor.name}' needs"
            f" {offset + needed} bytes, the file has {sizes[target]}"
        )
    if length and length < _dense_bytes(path, tensor):
        raise SparamxError(f"{path}: the external data of tensor '{tensor.name}' is shorter than its shape needs")
    entries["location"].value = os.fspath(target)


def _check_inline(path: Path, tensor: onnx.TensorProto) -> None:
    """Checks that a tensor holds as many elements as its shape says."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return
    needed = _dense_bytes(path, tensor)
    if tensor.HasField("raw_data"):
        stored = len(tensor.raw_data)
    else:
        bits = int(ir.DataType(tensor.data_type).bitwidth)
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        # An entry holds one element, or one byte of elements that are smaller; complex numbers take two entries.
        is_complex = tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
        stored = max(map(len, fields)) * max(1, bits // (16 if is_complex else 8))
    if stored != needed:
        raise SparamxError(
            f"{path}: tensor '{tensor.name}' holds {stored} bytes, but its type and shape need {needed}; the file is"
            " damaged"
        )


def _check_references(path: Path, proto: onnx.ModelProto) -> None:
    """Refuses attributes that refer to those of a function where there is none, and bodies that a caller would give."""
    bodies = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    for graph, in_function in [(proto.graph, False), *((function, True) for function in proto.functions)]:
        for node in _nodes_of(graph.node):
            for attribute in node.attribute:
                if attribute.ref_attr_name and (attribute.type in bodies or not in_function):
                    raise SparamxError(
                        f"{path}: the attribute '{attribute.name}' of node '{node.name}' refers to one of a function's,"
                        " which it cannot have"
                    )


def _nodes_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of their bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes_of(attribute.g.node)
            for graph in attribute.graphs:
                yield from _nodes_of(graph.node)


def _number(path: Path, tensor: onnx.TensorProto, entry: onnx.StringStringEntryProto | None) -> int:
    if entry is None or not entry.value:
        return 0
    if not entry.value.isdecimal():
        raise SparamxError(f"{path}: tensor '{tensor.name}' has an external data {entry.key} that is no number")
    return int(entry.value)


def _dense_bytes(path: Path, tensor: onnx.TensorProto) -> int:
    """Bytes that a tensor of this type and shape takes."""
    elements = 1
    for dimension in tensor.dims:
        if dimension < 0:
            raise SparamxError(f"{path}: tensor '{tensor.name}' has a negative dimension")
        elements *= dimension
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError) as error:
        raise SparamxError(f"{path}: tensor '{tensor.name}' has an unknown or unusable element type") from error
    return (elements * int(bits) + 7) // 8


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a model, wherever they stand."""
    yield from _tensors_of_graph(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _tensors_of_node(node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        yield from _tensors_of_node(node)


def _tensors_of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _tensors_of_graph(attribute.g)
        for graph in attribute.graphs:
            yield from _tensors_of_graph(graph)


def _real(path: Path) -> Path:
    # Not Path.resolve: that raises for a loop of links, which is a missing file like others.
    return Path(os.path.realpath(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or holds what none can
        return False


def _size(path: Path) -> int:
    return path.stat().st_size
