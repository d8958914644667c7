"""Writes a model and one external data file beside it, a tensor at a time, and moves both into place when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import onnx_ir as ir

from sparamx_onnx.graph_passes.mapped import external_range
from sparamx_onnx.graph_passes.packed_weight import PackedTensor
from sparamx_onnx.ops.errors import SparamxError

DATA_SUFFIX: Final = ".data"

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

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def data_path_of(path: str | os.PathLike[str]) -> Path:
    """The external data file of a model that is saved as ``path``."""
    path = Path(path)
    return path.with_name(path.name + DATA_SUFFIX)


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Saved:
    """Saves a model as ``path`` and ``path.data``. The same model gives the same bytes.

    Packed weights are packed one at a time, external tensors are copied, and initializers of more than 1 KiB become
    external. Both files get temporary names in their folder until they are complete; whatever interrupts the writing
    leaves neither of them, nor touches what was there. The model in memory is not changed.

    Args:
        model: The model. External tensors are read from where they are.
        path: The model file to write.
        overwrite: Replace the files if they exist.
        inputs: Files that must never be overwritten, besides the external data of the model: the model's own file.
        progress: Called with the bytes of tensors done and the bytes in total, as they are in the input model.

    Raises:
        SparamxError: The folder is missing or not writable, a file exists or is an input, the disk is full, or a
            tensor cannot be read.
    """
    path = Path(path)
    if not path.name:
        raise SparamxError(f"'{path}' does not name a file to write.")
    data_path = data_path_of(path)
    items = list(_external_items(model))
    _check_destination(path, data_path, overwrite, [*inputs, *_external_files(items)])
    commit = _Commit()
    with contextlib.ExitStack() as stack:
        data_file = stack.enter_context(_Temporary(data_path, commit)) if items else None
        stack.callback(_release, items)
        data_bytes = 0 if data_file is None else _write_data(items, data_file, data_path.name, progress)
        content = _serialize(model, path)
        model_file = stack.enter_context(_Temporary(path, commit))
        with _writing(path):
            model_file.write(content)
        # The data first: the model must never stand beside data that is not its own.
        if data_file is not None:
            data_file.move_into_place()
        model_file.move_into_place()
        commit.done = True
    _sync_folder(path.parent)
    return Saved(path, data_path if items else None, len(content), data_bytes)


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


def _release(items: Iterable[_Item]) -> None:
    for item in items:
        item.release()


def _external_files(items: Iterable[_Item]) -> Iterator[Path]:
    """The files that the tensors are read from."""
    for item in items:
        tensors = [item.tensor]
        if isinstance(item.tensor, PackedTensor):
            tensors = [source.tensor for source in item.tensor.sources]
        for tensor in tensors:
            if isinstance(tensor, ir.ExternalTensor):
                yield Path(tensor.path)


def _check_destination(path: Path, data_path: Path, overwrite: bool, inputs: Iterable[str | os.PathLike[str]]) -> None:
    if not path.parent.is_dir():
        raise SparamxError(f"The folder {path.parent} to write {path.name} into does not exist.")
    read = {_identity(Path(file)) for file in inputs} - {None}
    for target in (path, data_path):
        if target.is_dir():
            raise SparamxError(f"{target} is a folder, not a file to write.")
        if _identity(target) in read:
            raise SparamxError(f"{target} is a file of the input model, which is never overwritten.")
        if not overwrite and (target.exists() or target.is_symlink()):
            raise SparamxError(f"{target} exists already.")


def _identity(path: Path) -> tuple[int, int] | None:
    """What is equal for all names of a file; None if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _write_data(
    items: list[_Item], file: _Temporary, location: str, progress: Callable[[int, int], None] | None
) -> int:
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

    for item in items:
        tensor = item.tensor
        key = _content_key(tensor)
        if key in written:
            advance(_source_bytes(tensor))
        else:
            if isinstance(tensor, PackedTensor):
                blob = tensor.pack()
                offset = _align(end, _LARGE_ALIGNMENT if blob.size >= _LARGE else _PAGE)
                with _writing(file.target):
                    file.write_at(offset, blob.data)
                written[key] = (offset, blob.size)
                del blob
                advance(tensor.source_bytes)
            else:
                offset = _align(end, _alignment(tensor.nbytes))
                for start, chunk in _chunks(tensor):
                    with _writing(file.target):
                        file.write_at(offset + start, chunk)
                    advance(len(chunk))
                written[key] = (offset, tensor.nbytes)
            end = sum(written[key])
        offset, length = written[key]
        # Held at once: a packed weight that is not held any more can be forgotten with its dense weight.
        item.hold(_external(tensor, location, offset, length))
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


def _chunks(tensor: ir.TensorProtocol) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a tensor in pieces, each with its offset; of an external one, without holding all of it."""
    if not isinstance(tensor, ir.ExternalTensor):
        content = memoryview(tensor.tobytes())
        for start in range(0, len(content), _COPY_BYTES):
            yield start, content[start : start + _COPY_BYTES]
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
                yield start, buffer[:count]
                start += count
    except OSError as error:
        raise SparamxError(
            f"The external data of '{tensor.name}' cannot be read from {path}: {error.strerror}."
        ) from error


def _serialize(model: ir.Model, path: Path) -> bytes:
    try:
        content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    except Exception as error:  # protobuf's and onnx_ir's exceptions for a model that cannot be expressed
        raise SparamxError(f"The model cannot be written as {path}: {str(error).splitlines()[0]}") from error
    return content


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns an error of the operating system into a sentence about the file to write."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise SparamxError(f"There is not enough room in {target.parent} to write {target.name}.") from error
        raise SparamxError(f"{target} cannot be written: {error.strerror or error}.") from error


@dataclass
class _Commit:
    """Whether the files are there to stay: one switch for all of them, so that no interruption falls in between."""

    done: bool = False


class _Temporary:
    """A file that has a temporary name until it is moved into place; without a commit, everything is as it was."""

    def __init__(self, target: Path, commit: _Commit) -> None:
        self.target = target
        self._commit = commit
        token = secrets.token_hex(4)
        self._path = target.with_name(f".{target.name}.{token}.partial")
        self._backup = target.with_name(f".{target.name}.{token}.previous")
        self._file: BinaryIO | None = None
        self._moved_over: bool | None = None

    def __enter__(self) -> _Temporary:
        with _writing(self.target):
            self._file = self._path.open("xb")
        return self

    def write(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(content)

    def write_at(self, offset: int, content: bytes | memoryview) -> None:
        assert self._file is not None
        if self._file.tell() != offset:
            self._file.seek(offset)
        self._file.write(content)

    def move_into_place(self) -> None:
        """Makes the file durable and gives it its name, replacing what has that name."""
        assert self._file is not None
        with _writing(self.target):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._moved_over = self.target.exists()
            if self._moved_over:
                # A second name for the old file; where the file system has none, it cannot be brought back.
                with contextlib.suppress(OSError):
                    self._backup.hardlink_to(self.target)
            self._path.replace(self.target)

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            # Closing flushes what is left, which on a full disk fails again.
            with contextlib.suppress(OSError):
                self._file.close()
        if not self._commit.done and self._moved_over is not None:
            with contextlib.suppress(OSError):
                if self._moved_over:
                    self._backup.replace(self.target)
                else:
                    self.target.unlink()
        for leftover in (self._path, self._backup):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the new names durable, where the file system knows how."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
