"""A conversion that is interrupted half-way: nothing broken, nothing lost, and the next run just works."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparamx_onnx

Mlp = Callable[..., onnx.ModelProto]
Save = Callable[..., Path]
Tree = Callable[[Path], dict[str, bytes]]

SIZE = 2048
INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, mlp: Mlp, save: Save) -> Path:
    """A model that takes seconds to prune and pack: six weights of 16 MB."""
    folder = tmp_path_factory.mktemp("large")
    return save(mlp(sizes=[SIZE] * 7, sparsity=0.0), folder / "large.onnx", external="large.onnx.data")


@pytest.fixture
def model(large: Path, tmp_path: Path) -> Path:
    """The large model in a folder of its own, to be changed by nobody."""
    for path in large.parent.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    return tmp_path / large.name


def _convert(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "sparamx_onnx", "convert", str(model), "--method", "magnitude", *options]


def _bytes_in_progress(folder: Path) -> int:
    """Bytes in files below hidden folders: a conversion at work."""
    total = 0
    with contextlib.suppress(OSError):  # files come and go
        for path in folder.glob(".*/**/*"):
            if path.is_file():
                total += path.stat().st_size
    return total


def _interrupt(command: list[str], folder: Path, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Runs the command and sends it the signal when the first weights have been written."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        try:
            deadline = time.monotonic() + 60
            while _bytes_in_progress(folder) < SIZE * SIZE:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("number", list(INTERRUPTED), ids=lambda number: number.name)
def test_an_interrupted_conversion_leaves_no_output_and_the_next_one_works(
    model: Path, tree: Tree, number: signal.Signals
) -> None:
    before = tree(model.parent)
    result = _interrupt(_convert(model), model.parent, number)
    assert result.returncode == INTERRUPTED[number]
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    after = tree(model.parent)
    left = {name: content for name, content in after.items() if name not in before}
    assert {name: after[name] for name in before} == before
    if number == signal.SIGKILL:
        # Nobody could clean up, but what is left is hidden and is no model.
        assert all(Path(name).parts[0].startswith(".") for name in left)
        assert not list(model.parent.glob("large.sparse.onnx*"))
    else:
        assert left == {}
        assert len(list(model.parent.iterdir())) == len(before)
    if number == signal.SIGINT:
        assert result.stderr.splitlines()[-1] == "error: interrupted."

    again = subprocess.run(_convert(model), capture_output=True, text=True, check=True, timeout=120)
    assert "6 linear layers converted" in again.stdout
    expected = {*before, "large.sparse.onnx", "large.sparse.onnx.data"}
    assert {path.name for path in model.parent.iterdir()} == expected  # also what the killed run left is gone
    session = sparamx_onnx.InferenceSession(model.with_name("large.sparse.onnx"))
    assert np.isfinite(session.run(None, {"x": np.ones((1, SIZE), np.float32)})[0]).all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_replacement_leaves_the_old_output(model: Path, tree: Tree, number: signal.Signals) -> None:
    small = sparamx_onnx.convert(model, include=["layer0"]).output
    assert small is not None
    before = tree(model.parent)
    result = _interrupt(_convert(model, "--force"), model.parent, number)
    assert result.returncode == INTERRUPTED[number]
    after = tree(model.parent)
    assert {name: after[name] for name in before} == before
    sparamx_onnx.InferenceSession(small)  # it is whole: it loads


def test_two_conversions_at_once_do_not_disturb_each_other(model: Path) -> None:
    processes = [
        subprocess.Popen(
            _convert(model, "-o", str(model.with_name(f"{name}.onnx"))), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name in ("a", "b")
    ]
    for process in processes:
        process.communicate(timeout=240)
        assert process.returncode == 0
    files = [model.with_name(f"{name}.onnx.data").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def _on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Runs a command with a terminal as its stderr; the exit code and what the terminal showed."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True, env=environment) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while chunk := os.read(controller, 65536):
                shown += chunk
        process.communicate(timeout=60)
    os.close(controller)
    return process.returncode, shown.decode()


def test_progress_is_shown_on_a_terminal_and_only_for_what_takes_time(
    model: Path, mlp: Mlp, save: Save, tmp_path: Path
) -> None:
    # What takes "time" is up to the machine; here, everything does.
    script = "from sparamx_onnx import cli, progress; progress.PATIENCE_SECONDS = 0.0; cli.main()"
    code, shown = _on_a_terminal([sys.executable, "-P", "-c", script, *_convert(model)[3:]])
    assert code == 0
    assert "packing weights" in shown
    assert "100%" in shown
    small = str(save(mlp(), tmp_path / "small.onnx"))
    code, shown = _on_a_terminal([sys.executable, "-m", "sparamx_onnx", "inspect", small])
    assert (code, shown) == (0, "")
    command = [sys.executable, "-P", "-c", script, *_convert(model, "--force")[3:]]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stderr.startswith("warning: ")
    assert result.stderr.count("\n") == 1
