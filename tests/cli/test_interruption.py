"""A conversion that is interrupted half-way: nothing broken, nothing lost, and the next run just works."""

from __future__ import annotations

import contextlib
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections import Counter
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
# How many conversions are killed at random moments.
KILLS = int(os.environ.get("SPARAMX_TEST_COUNT") or 5)
LONG = 600  # seconds that no conversion takes, however busy the machine is
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


def _wait_for(process: subprocess.Popen[str], moment: Callable[[], bool], seconds: float) -> None:
    """Until it is the moment, the time is over or the process has ended."""
    deadline = time.monotonic() + seconds
    while not moment() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.0002)


def _kill_at_random(command: list[str], target: Path, whole_seconds: float, rng: random.Random) -> int:
    """Starts a conversion and ends it: at any time, at any time of its writing, or while it puts its files in place."""
    data = target.with_name(target.name + ".data")
    inode = data.stat().st_ino if data.exists() else None
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        try:
            match rng.randrange(3):
                case 0:
                    _wait_for(process, lambda: False, rng.uniform(0, 1.1 * whole_seconds))
                case 1:
                    _wait_for(process, lambda: any(target.parent.glob(".*")), LONG)
                    _wait_for(process, lambda: False, rng.uniform(0, 0.5 * whole_seconds))
                case _:
                    _wait_for(process, lambda: data.exists() and data.stat().st_ino != inode, LONG)
            process.send_signal(number)
            _, errors = process.communicate(timeout=LONG)
        finally:
            process.kill()
    # Before the program has begun, Python itself says what has happened.
    began = "init_import_site" not in errors
    assert not began or process.returncode in (0, INTERRUPTED[number], -number), errors
    return process.returncode


def test_conversions_killed_at_any_moment_leave_all_or_nothing(
    mlp: Mlp, save: Save, tree: Tree, tmp_path: Path
) -> None:
    """Whatever is there afterwards is what was there before, or the whole new model, or no model."""
    rng = random.Random(0)
    model = save(mlp(sizes=[SIZE // 2] * 5, sparsity=0.0), tmp_path / "model.onnx", external="model.onnx.data")
    target = model.with_name("model.sparse.onnx")
    names = (target.name, target.name + ".data")
    commands = {share: _convert(model, "--force", "--sparsity", share) for share in ("0.5", "0.7")}
    inputs = tree(model.parent)
    contents = {}
    for share, command in commands.items():
        start = time.monotonic()
        subprocess.run(command, capture_output=True, check=True, timeout=LONG)
        whole_seconds = time.monotonic() - start
        contents[share] = tuple(target.with_name(name).read_bytes() for name in names)

    outcomes: Counter[str] = Counter()
    for _ in range(KILLS):
        before = tuple(path.read_bytes() if path.exists() else None for path in (model.with_name(n) for n in names))
        hidden_before = {path.name for path in model.parent.glob(".*")}
        aside = any((folder / ".replaced" / target.name).exists() for folder in model.parent.glob(".*"))
        share = rng.choice(sorted(commands))
        code = _kill_at_random(commands[share], target, whole_seconds, rng)
        after = tree(model.parent)
        assert {name: after[name] for name in inputs} == inputs
        found = tuple(after.get(name) for name in names)
        hidden = {path.name for path in model.parent.glob(".*")} - hidden_before
        assert set(after) - set(inputs) - set(names) == {name for name in after if name.startswith(".")}
        if found == contents[share]:
            outcome = "new model"
        elif found == before:
            outcome = "as before"
        elif aside and found in contents.values():
            outcome = "as before the last kill"
        else:
            assert found in ((None, before[1]), (None, contents[share][1])), "half a model"
            outcome = "no model, but data"
        assert outcome == "new model" or code != 0
        # What a kill leaves behind goes with the next conversion that begins to write; the others clean up themselves.
        assert len(hidden) <= (code == -signal.SIGKILL), f"{code}: {hidden} is left of what gave the {outcome}"
        outcomes[f"{outcome}{', a hidden folder' if hidden else ''}"] += 1
        if rng.random() < 0.3:
            for name in names:
                target.with_name(name).unlink(missing_ok=True)
    for folder in model.parent.glob(".*"):
        if not (folder / ".lock").exists():
            os.utime(folder, (0, 0))  # killed before it had its lock or after: gone only when it is old
    subprocess.run(commands["0.5"], capture_output=True, check=True, timeout=LONG)
    assert tuple(target.with_name(name).read_bytes() for name in names) == contents["0.5"]
    assert {path.name for path in model.parent.iterdir()} == {*inputs, *names}
    print(f"{KILLS} conversions interrupted: {dict(outcomes)}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interruption_of_an_import_waits_for_its_end(tmp_path: Path, number: signal.Signals) -> None:
    """NumPy would make an ImportError of it, and bindings in C++ abort the process."""
    (tmp_path / "native.py").write_text(
        f"""
import os, time
os.kill(os.getpid(), {int(number)})
try:
    time.sleep(0.1)
except BaseException:
    os.abort()
"""
    )
    script = """
import sys, time
from sparamx_onnx import cli

def run(*arguments, **options):
    sys.path.insert(0, sys.argv[1])
    import native
    time.sleep(60)

cli.commands.main = run
cli.main()
"""
    command = [sys.executable, "-P", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONG)
    said = "error: interrupted.\n" if number == signal.SIGINT else ""
    assert (done.returncode, done.stderr) == (INTERRUPTED[number], said)


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
