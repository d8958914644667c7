"""Writes a model and one external data file beside it, a tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from sparamx_onnx.graph_passes.mapped import external_range
from sparamx_onnx.graph_passes.packed_weight import PackedTensor
from sparamx_onnx.ops.errors import SparamxError, in_one_sentence

# Initializers in memory up to this size stay in the model file: shapes and scalars, which ONNX Runtime reads while it
# builds the graph. It is the limit of the onnx package too.
_INLINE_BYTES = 1024

# Offsets of small tensors; of those that fill a page, so that they can be mapped; and of large ones, which is what
# mapping asks for on systems with other page sizes.
_SMALL_ALIGNMENT = 64
_PAGE = 4096
_LARGE_ALIGNMENT = 64 * 1024
_LARGE = 1 << 20

_COPY_BYTES = 4 << 20


@dataclass(frozen=True)
class Saved:
    """What was written.

    Attributes:
        model_path: The model file.
        data_path: Its external data file; None if no tensor is external.
        model_bytes: Size of the model file.
        data_bytes: Size of the external data file.
    """

    model_path: Path
    data_path: Path | None
    model_bytes: int
    data_bytes: int


@dataclass
class _Item:
    """A tensor that goes to the external data file, and how its holder is told where it stands there."""

    tensor: ir.TensorProtocol
    hold: Callable[[ir.TensorProtocol], None]
    release: Callable[[], None]


def data_path(model: Path) -> Path:
    """The external data file that belongs to a model file."""
    return model.with_name(model.name + ".data")


def save(model: ir.Model, path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> Saved:
    """Writes a model as ``path`` and ``path.data``, in the place of what is there. The same model gives the same bytes.

    Packed weights are packed one at a time, external tensors are copied, and initializers of more than 1 KiB become
    external. The model in memory is not changed. What interrupts the writing leaves incomplete files: where that
    matters, ``path`` is in a folder of its own, from which complete files are moved.

    Args:
        model: The model. External tensors are read from where they are, which is neither of the files to write.
        path: The model file to write.
        progress: Called with the bytes of tensors done and the bytes in total, as they are in the input model.

    Raises:
        SparamxError: A tensor cannot be read, packed or expressed.
        OSError: A file cannot be written.
    """
    path = Path(path)
    data = data_path(path)
    items = list(_external_items(model))
    # Others may have mapped the old files: these are replaced, not overwritten.
    for old in (path, data):
        old.unlink(missing_ok=True)
    try:
        data_bytes = _write_data(items, data, progress) if items else 0
        content = _serialize(model)
    finally:
        for item in items:
            item.release()
    path.write_bytes(content)
    return Saved(path, data if items else None, len(content), data_bytes)


def _external_items(model: ir.Model) -> Iterator[_Item]:
    """The tensors for the data file, in graph order."""
    for value in _initializers(model):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            continue
        if isinstance(tensor, PackedTensor | ir.ExternalTensor) or tensor.nbytes > _INLINE_BYTES:
            yield _initializer_item(value, tensor)
    for node, attribute in _attributes(model):
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if isinstance(tensor, ir.ExternalTensor):
                yield _attribute_item(node, attribute, tensor)
        elif attribute.type == ir.AttributeType.TENSORS and any(
            isinstance(tensor, ir.ExternalTensor) for tensor in attribute.as_tensors()
        ):
            raise SparamxError(
                f"The attribute '{attribute.name}' of the node '{node.name}' is a list of external tensors, "
                "which cannot be written."
            )


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()
    for function in model.functions.values():
        for graph in function.subgraphs():
            yield from graph.initializers.values()


def _attributes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Attr]]:
    roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in roots:
        for node in ir.traversal.RecursiveGraphIterator(root):
            for attribute in node.attributes.values():
                if not attribute.is_ref():
                    yield node, attribute


def _initializer_item(value: ir.Value, tensor: ir.TensorProtocol) -> _Item:
    def hold(external: ir.TensorProtocol) -> None:
        value.const_value = external
        if isinstance(tensor, PackedTensor):
            value.shape = tensor.shape

    def release() -> None:
        value.const_value = tensor

    return _Item(tensor, hold, release)


def _attribute_item(node: ir.Node, attribute: ir.Attr, tensor: ir.TensorProtocol) -> _Item:
    def hold(external: ir.TensorProtocol) -> None:
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, external, attribute.doc_string)

    def release() -> None:
        node.attributes[attribute.name] = attribute

    return _Item(tensor, hold, release)


def _write_data(items: list[_Item], path: Path, progress: Callable[[int, int], None] | None) -> int:
    """Writes all tensors, and tells their holders where they stand; returns the size of the file."""
    total = sum(_source_bytes(item.tensor) for item in items)
    done = 0
    written: dict[object, tuple[int, int]] = {}
    end = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with path.open("wb") as file:
        for item in items:
            tensor = item.tensor
            key = _content_key(tensor)
            if key in written:
                advance(_source_bytes(tensor))
            elif isinstance(tensor, PackedTensor):
                blob = tensor.pack()
                written[key] = file.seek(_align(end, _LARGE_ALIGNMENT if blob.size >= _LARGE else _PAGE)), blob.size
                file.write(blob.data)
                del blob
                advance(tensor.source_bytes)
            else:
                written[key] = file.seek(_align(end, _alignment(tensor.nbytes))), tensor.nbytes
                for chunk in _chunks(tensor):
                    file.write(chunk)
                    advance(len(chunk))
            offset, length = written[key]
            end = max(end, offset + length)
            # Held at once: a packed weight that is not held any more can be forgotten with its dense weight.
            item.hold(_external(tensor, path.name, offset, length))
    return end


def _source_bytes(tensor: ir.TensorProtocol) -> int:
    return tensor.source_bytes if isinstance(tensor, PackedTensor) else tensor.nbytes


def _content_key(tensor: ir.TensorProtocol) -> object:
    """Equal for tensors with the same content, where that is known without reading it."""
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset or 0, tensor.nbytes)
    return id(tensor)


def _external(tensor: ir.TensorProtocol, location: str, offset: int, length: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _alignment(size: int) -> int:
    return _LARGE_ALIGNMENT if size >= _LARGE else _PAGE if size >= _PAGE else _SMALL_ALIGNMENT


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces; of an external one, without holding all of it."""
    if not isinstance(tensor, ir.ExternalTensor):
        content = memoryview(tensor.tobytes())
        for start in range(0, len(content), _COPY_BYTES):
            yield content[start : start + _COPY_BYTES]
        return
    path, offset, size = external_range(tensor)
    buffer = memoryview(bytearray(min(size, _COPY_BYTES)))
    try:
        with path.open("rb") as source:
            source.seek(offset)
            start = 0
            while start < size:
                count = source.readinto(buffer[: min(size - start, _COPY_BYTES)])
                if not count:
                    raise SparamxError(f"The external data file {path} ends within '{tensor.name}'.")
                yield buffer[:count]
                start += count
    except OSError as error:
        raise SparamxError(
            f"The external data of '{tensor.name}' cannot be read from {path}: {error.strerror}."
        ) from error


def _serialize(model: ir.Model) -> bytes:
    with in_one_sentence("The model cannot be written"):
        content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content
