"""Puts a model and all that belongs to it in place whole, or not at all.

An output, two files or a folder, is written into a hidden folder beside the destination and moved from there when it is
complete. Whatever ends the run before that, the destination is as it was; a folder that a killed run left behind is
removed by the next run for the same destination, which first puts back what had been moved aside.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sparamx_onnx.graph_passes.write import data_path
from sparamx_onnx.loading import LoadedModel
from sparamx_onnx.ops.errors import SparamxError

# Within a staging folder.
_LOCK, _REPLACED, _NAMES = ".lock", ".replaced", ".names"
# A folder without a lock that nobody has changed for so long belongs to no running conversion.
_SECONDS_WITHOUT_LOCK = 60


class FileOutput:
    """A model file and its data file as the output of a conversion.

    Attributes:
        target: The model file to write.
    """

    def __init__(self, target: Path) -> None:
        self.target = target

    @property
    def model(self) -> Path:
        """Where the model will lie."""
        return self.target

    def check(self, loaded: LoadedModel, *, force: bool) -> None:
        """As ``check_destination``; ``loaded`` is the input."""
        check_destination(self.target, inputs=(loaded.path, *loaded.data_files), force=force)

    def model_in(self, staging: Path) -> Path:
        """Where in a staging folder the model has to be written."""
        return staging / self.target.name

    def commit(self, staging: Path, loaded: LoadedModel) -> None:
        """As ``commit``, once the model has been written."""
        commit(staging, self.target, data_path(self.target))


def check_destination(output: Path, *, inputs: tuple[Path, ...], force: bool) -> None:
    """Refuses a destination that cannot be written or would destroy something, before any work is done.

    Args:
        output: The model file to write; its data file goes beside it.
        inputs: Files that are being read.
        force: Whether existing files may be replaced.

    Raises:
        SparamxError: Says which file is in the way, or what is wrong with the folder.
    """
    check_place(output)
    recover(output)
    real_inputs = {path.resolve() for path in inputs}
    for path in (output, data_path(output)):
        if path.is_dir():
            raise SparamxError(f"{path}: is a folder; name a file to write to")
        if path.resolve() in real_inputs or any(path.exists() and path.samefile(other) for other in inputs):
            raise SparamxError(f"{path}: is a file of the input model; choose another output")
        if not force and (path.exists() or path.is_symlink()):
            raise SparamxError(f"{path}: exists already; use --force (force=True) to replace it")
        if path.exists() and not path.is_file():
            raise SparamxError(f"{path}: is not a regular file")


def check_place(output: Path) -> None:
    """Refuses a destination without a name or without a folder to lie in.

    Raises:
        SparamxError: Says what is wrong.
    """
    if output.name in ("", ".."):
        raise SparamxError(f"{output}: is no name for an output")
    if not output.parent.is_dir():
        what = "is not a folder" if output.parent.exists() else "does not exist"
        raise SparamxError(f"{output}: cannot be written: {output.parent} {what}")


def check_report(path: Path, *, others: tuple[Path, ...], force: bool) -> None:
    """Refuses a page that cannot be written or would destroy something, before any work is done.

    Args:
        path: The page to write.
        others: Files that are being read or will be written.
        force: Whether an existing file may be replaced.

    Raises:
        SparamxError: Says what is wrong.
    """
    if path.is_dir() or not path.name:
        raise SparamxError(f"{path}: is a folder; name a file to write the report to")
    if not path.parent.is_dir():
        raise SparamxError(f"{path}: cannot be written: {path.parent} does not exist or is no folder")
    if path.resolve() in {other.resolve() for other in others}:
        raise SparamxError(f"{path}: is a file of the model; choose another report")
    if not force and (path.exists() or path.is_symlink()):
        raise SparamxError(f"{path}: exists already; use --force (force=True) to replace it")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, in the place of what is there.

    Raises:
        SparamxError: It cannot be written.
    """
    with staging(path) as folder:
        try:
            # A path may hold bytes that are no text.
            (folder / path.name).write_text(text, encoding="utf-8", errors="replace")
            (folder / path.name).replace(path)
        except OSError as error:
            raise write_error(path, error) from error


@contextlib.contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A folder on the destination's file system to write in; it is gone afterwards, with everything left in it.

    Raises:
        SparamxError: Nothing can be written beside the destination.
    """
    recover(output)
    folder = None
    try:
        with _interruptions_wait():
            folder = _make_folder(output)
        # Held until the end of the process or of this block: a lock that can be taken marks an abandoned folder.
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        if folder is not None:
            _remove(folder)


def _remove(folder: Path) -> None:
    try:
        with _interruptions_wait():
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # an interruption that came at the end, or before it could wait
        with _interruptions_wait():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def commit(folder: Path, output: Path, *others: Path) -> None:
    """Moves an output from a staging folder into place.

    An output that is being replaced goes first and the new one comes last: at no moment does a model file stand beside
    the data of another. Between the two there are only renames, for which interruptions wait: what is replaced is moved
    aside, as removing it takes its time, and goes with the folder.

    Args:
        folder: The staging folder; holds what is named like ``output`` and perhaps some of the others.
        output: Where the model, or the folder of a model, goes.
        others: Files beside it that belong to it.

    Raises:
        OSError: Something cannot be moved; what was replaced is back.
    """
    new = [path for path in (*others, output) if (folder / path.name).exists()]
    sync(*(folder / path.name for path in new))
    old = [path for path in (output, *others) if os.path.lexists(path)]
    (folder / _NAMES).write_bytes(b"\0".join(os.fsencode(path.name) for path in old))
    replaced = folder / _REPLACED
    replaced.mkdir()
    with _interruptions_wait():
        try:
            for path in old:
                path.replace(replaced / path.name)
            for path in new:
                (folder / path.name).replace(path)
            replaced.rename(folder / f"{_REPLACED}.done")  # from here on it is not to be put back
        except OSError:
            _put_back(replaced, output)
            raise
    sync(output.parent)


def _put_back(replaced: Path, output: Path) -> None:
    # The output itself comes last, for the same reason as a new one does.
    for path in sorted(replaced.iterdir(), key=lambda path: path.name == output.name):
        path.replace(output.with_name(path.name))


@contextlib.contextmanager
def _interruptions_wait() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end of the block. Only the main thread ever sees them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for one in came:
            signal.raise_signal(one)


def sync(*paths: Path) -> None:
    """Makes the content of files durable, and the names in folders where that can be done; absent ones are no error."""
    for path in filter(Path.exists, paths):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if path.is_file():
                raise
        finally:
            os.close(descriptor)


def _make_folder(output: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
    except OSError as error:
        raise write_error(output, error) from error


def _prefix(output: Path) -> str:
    # Cut, because a file name may be as long as the file system allows.
    return f".{output.name[:100]}.sparamx-"


def recover(output: Path) -> None:
    """Removes what killed runs for this destination left beside it, and puts back what they had moved aside."""
    prefix = _prefix(output)
    with contextlib.suppress(OSError):
        for folder in output.parent.iterdir():
            if folder.name.startswith(prefix) and folder.is_dir() and not folder.is_symlink():
                _recover_if_unlocked(folder, output)


def _recover_if_unlocked(folder: Path, output: Path) -> None:
    with contextlib.suppress(OSError):
        if not (folder / _LOCK).exists():
            # Killed before it had the lock or while it was cleaning up; or it is just about to take the lock.
            if time.time() - folder.stat().st_mtime > _SECONDS_WITHOUT_LOCK:
                shutil.rmtree(folder, ignore_errors=True)
            return
        with (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / _REPLACED).exists() and _can_come_back(folder, output):
                _put_back(folder / _REPLACED, output)
            shutil.rmtree(folder, ignore_errors=True)


def _can_come_back(folder: Path, output: Path) -> bool:
    """Whether a killed commit left no output, and all that it was to replace is still there, aside or in place."""
    names = [os.fsdecode(name) for name in (folder / _NAMES).read_bytes().split(b"\0") if name]
    places = [(folder / _REPLACED / name, output.with_name(name)) for name in names]
    return (
        output.name in names and not os.path.lexists(output) and all(any(map(os.path.lexists, pair)) for pair in places)
    )


def write_error(output: Path, error: OSError) -> SparamxError:
    """The sentence for a failed write of ``output``."""
    # NumPy gives no number where the disk takes a part of an array only: "400 requested and 70 written".
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error))
    reason = "the disk is full" if is_full else error.strerror or str(error)
    return SparamxError(f"{output}: cannot be written: {reason}")
