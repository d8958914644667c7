"""Output files: whole or not at all, and never over something that matters."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparamx_onnx.graph_passes.write import data_path
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.output import check_destination, commit, recover, staging, write_error

Tree = Callable[[Path], dict[str, bytes]]


def _write(folder: Path, output: Path, model: bytes, data: bytes | None) -> None:
    (folder / output.name).write_bytes(model)
    if data is not None:
        (folder / data_path(output).name).write_bytes(data)


def _convert(output: Path) -> None:
    with staging(output) as folder:
        _write(folder, output, b"new model", b"new data")
        commit(folder, output, data_path(output))


def _count_moves(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> list[Path]:
    """What has been moved, which grows; ``before`` gets the number of each move before it happens, from 0."""
    moved: list[Path] = []
    attempts = itertools.count()
    move_for_real = Path.replace

    def replace(self: Path, target: Path) -> None:
        before(next(attempts))
        move_for_real(self, target)
        moved.append(self)

    monkeypatch.setattr(Path, "replace", replace)
    return moved


@contextlib.contextmanager
def _interruptions_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise InterruptedError within the block."""

    def stop(*_: object) -> None:
        raise InterruptedError

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_both_files_appear_and_the_staging_folder_goes(tmp_path: Path, tree: Tree) -> None:
    output = tmp_path / "out.onnx"
    with staging(output) as folder:
        _write(folder, output, b"model", b"data")
        assert not output.exists()
        commit(folder, output, data_path(output))
    assert tree(tmp_path) == {"out.onnx": b"model", "out.onnx.data": b"data"}
    assert len(list(tmp_path.iterdir())) == 2


def test_replacing_leaves_no_data_of_the_model_before(tmp_path: Path, tree: Tree) -> None:
    output = tmp_path / "out.onnx"
    _write(tmp_path, output, b"old model", b"old data")
    with staging(output) as folder:
        _write(folder, output, b"new model", None)
        commit(folder, output, data_path(output))
    assert tree(tmp_path) == {"out.onnx": b"new model"}


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, tree: Tree) -> None:
    output = tmp_path / "out.onnx"
    _write(tmp_path, output, b"old model", b"old data")
    with contextlib.suppress(KeyboardInterrupt), staging(output) as folder:
        _write(folder, output, b"half", b"half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"out.onnx": b"old model", "out.onnx.data": b"old data"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("move", range(4))
def test_an_interruption_between_two_moves_waits_for_the_last(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, move: int
) -> None:
    output = tmp_path / "out.onnx"
    _write(tmp_path, output, b"old model", b"old data")
    with _interruptions_raise():
        moves = _count_moves(monkeypatch, lambda index: signal.raise_signal(number) if index == move else None)
        handler = signal.getsignal(number)
        with pytest.raises(InterruptedError):
            _convert(output)
        assert signal.getsignal(number) is handler
    assert len(moves) == 4
    assert tree(tmp_path) == {"out.onnx": b"new model", "out.onnx.data": b"new data"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("move", range(4))
def test_a_move_that_fails_brings_back_what_was_replaced(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, move: int
) -> None:
    output = tmp_path / "out.onnx"
    _write(tmp_path, output, b"old model", b"old data")

    def fail(index: int) -> None:
        if index == move:
            raise OSError("no")

    _count_moves(monkeypatch, fail)
    with pytest.raises(OSError, match="no"):
        _convert(output)
    assert tree(tmp_path) == {"out.onnx": b"old model", "out.onnx.data": b"old data"}
    assert len(list(tmp_path.iterdir())) == 2


_DIES_IN_COMMIT = """
import os, signal, sys
from pathlib import Path
from sparamx_onnx.output import commit, staging

output, moves, replace = Path(sys.argv[1]), int(sys.argv[2]), Path.replace

def replace_or_die(self, target):
    global moves
    if moves == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    moves -= 1
    return replace(self, target)

Path.replace = replace_or_die
with staging(output) as folder:
    new, data = folder / output.name, Path(str(output) + ".data")
    if output.is_dir():
        new.mkdir()
        (new / "model").write_bytes(b"new")
        commit(folder, output)
    else:
        new.write_bytes(b"new")
        (folder / data.name).write_bytes(b"new data")
        commit(folder, output, data)
"""


@pytest.mark.parametrize(("kind", "moves"), [("files", 1), ("files", 2), ("files", 3), ("folder", 1)])
def test_what_a_killed_run_had_moved_aside_is_back_before_the_next_begins(
    tmp_path: Path, tree: Tree, kind: str, moves: int
) -> None:
    output = tmp_path / "out.onnx"
    if kind == "files":
        _write(tmp_path, output, b"old model", b"old data")
    else:
        output.mkdir()
        (output / "model").write_bytes(b"old")
    before = tree(tmp_path)
    killed = subprocess.run([sys.executable, "-c", _DIES_IN_COMMIT, output, str(moves)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    recover(output)
    assert tree(tmp_path) == before
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_a_killed_run_that_replaced_nothing_leaves_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    subprocess.run([sys.executable, "-c", _DIES_IN_COMMIT, output, "1"], check=False, timeout=60)
    recover(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx.data"]


def test_a_model_does_not_come_back_without_its_data(tmp_path: Path) -> None:
    """A run was killed when it had moved the model aside, and somebody has removed the data since."""
    output = tmp_path / "out.onnx"
    _write(tmp_path, output, b"old model", b"old data")
    subprocess.run([sys.executable, "-c", _DIES_IN_COMMIT, output, "1"], check=False, timeout=60)
    data_path(output).unlink()
    recover(output)
    assert list(tmp_path.iterdir()) == []


def test_what_a_complete_run_replaced_never_comes_back(tmp_path: Path) -> None:
    """Not even if the run was killed before it had removed all of it."""
    output = tmp_path / "out.onnx"
    _write(tmp_path, output, b"old model", b"old data")
    with staging(output) as folder:
        _write(folder, output, b"new model", b"new data")
        commit(folder, output, data_path(output))
        (left,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
        shutil.copytree(left, tmp_path / f"{left.name}copy")
    output.unlink()
    recover(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx.data"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_the_staging_folder_goes_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    rmtree = shutil.rmtree

    def interrupted(folder: Path, **options: bool) -> None:
        signal.raise_signal(number)
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with _interruptions_raise(), pytest.raises(InterruptedError):
        _convert(tmp_path / "out.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]


_HOLDS_STAGING = """
import sys, time
from pathlib import Path
from sparamx_onnx.output import staging
with staging(Path(sys.argv[1])) as folder:
    (folder / "big").write_bytes(bytes(1000))
    print("staged", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_is_cleaned_up_by_the_next_but_a_running_one_is_not(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    with subprocess.Popen([sys.executable, "-c", _HOLDS_STAGING, output], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "staged\n"
            (theirs,) = tmp_path.iterdir()
            with staging(output):
                assert (theirs / "big").exists()
            assert (theirs / "big").exists()
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
    assert theirs.exists()
    with staging(tmp_path / "other.onnx"):
        assert theirs.exists()
    with staging(output):
        assert not theirs.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_lock_goes_when_it_is_old(tmp_path: Path) -> None:
    """A run that was killed before it took the lock, or while it was cleaning up."""
    output = tmp_path / "out.onnx"
    old, young = (tmp_path / f".out.onnx.sparamx-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
        (folder / "out.onnx.data").write_bytes(bytes(1000))
    os.utime(old, (0, 0))
    with staging(output):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [young.name]


@pytest.mark.parametrize("existing", ["out.onnx", "out.onnx.data"])
def test_either_file_is_protected_without_force(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_bytes(b"precious")
    with pytest.raises(SparamxError, match=f"{existing}: exists already"):
        check_destination(tmp_path / "out.onnx", inputs=(), force=False)
    check_destination(tmp_path / "out.onnx", inputs=(), force=True)


def test_a_dangling_link_is_protected_too(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SparamxError, match="exists already"):
        check_destination(tmp_path / "out.onnx", inputs=(), force=False)


@pytest.mark.parametrize("folder", ["out.onnx", "out.onnx.data"])
def test_a_folder_in_the_way_is_refused_even_with_force(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    with pytest.raises(SparamxError, match=f"{folder}: is a folder"):
        check_destination(tmp_path / "out.onnx", inputs=(), force=True)


@pytest.mark.parametrize("how", ["name", "symlink", "hard link", "dots"])
@pytest.mark.parametrize("which", ["model.onnx", "model.onnx.data"])
def test_a_file_of_the_input_is_refused_even_with_force(tmp_path: Path, how: str, which: str) -> None:
    inputs = (tmp_path / "model.onnx", tmp_path / "model.onnx.data")
    for path in inputs:
        path.write_bytes(b"original")
    output = {"name": tmp_path / "model.onnx", "dots": tmp_path / "sub" / ".." / "model.onnx"}.get(
        how, tmp_path / "alias.onnx"
    )
    (tmp_path / "sub").mkdir()
    alias = tmp_path / f"alias{which.removeprefix('model')}"
    if how == "symlink":
        alias.symlink_to(tmp_path / which)
    elif how == "hard link":
        alias.hardlink_to(tmp_path / which)
    with pytest.raises(SparamxError, match="is a file of the input model"):
        check_destination(output, inputs=inputs, force=True)


def test_a_missing_folder_and_a_file_as_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SparamxError, match=r"missing does not exist"):
        check_destination(tmp_path / "missing" / "out.onnx", inputs=(), force=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SparamxError, match=r"file is not a folder"):
        check_destination(tmp_path / "file" / "out.onnx", inputs=(), force=False)


def test_an_unwritable_folder_is_named() -> None:
    # /proc refuses new files to everyone, the superuser included.
    with pytest.raises(SparamxError, match=r"^/proc/out\.onnx: cannot be written"), staging(Path("/proc/out.onnx")):
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError("401408 requested and 72672 written"), "the disk is full"),  # what numpy.save raises
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
)
def test_the_sentence_says_why_a_file_cannot_be_written(error: OSError, reason: str) -> None:
    assert str(write_error(Path("out.onnx"), error)) == f"out.onnx: cannot be written: {reason}"
