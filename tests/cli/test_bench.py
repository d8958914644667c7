"""``bench``: what it feeds and reports, and that its worker processes stop, run and die as they should.

No figure decides a test: these are about how it measures, not about what.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx import cli
from sparamx_onnx.benchmark import Benchmark, Timing, quartiles
from sparamx_onnx.generation_benchmark import bench_generation
from sparamx_onnx.reports import benchmark_text

Save = Callable[..., Path]
Mlp = Callable[..., onnx.ModelProto]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, mlp: Mlp, save: Save) -> tuple[Path, Path]:
    path = save(mlp(sizes=(96, 128, 64)), tmp_path_factory.mktemp("bench") / "m.onnx")
    return path, Path(str(sparamx_onnx.convert(path).output))


def _decoder() -> onnx.ModelProto:
    """A decoder's face: looks tokens up, projects them, appends them to its cache."""
    rng = np.random.default_rng(0)
    inputs = [
        ("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        ("attention_mask", TensorProto.INT64, ["batch", "past + sequence"]),
        ("past_key_values.0.key", TensorProto.FLOAT, ["batch", "past", 64]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("MatMul", ["tokens", "weight"], ["new"], "project"),
        helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=1),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        # Fails unless mask and cache agree in length.
        helper.make_node("Mul", ["present.0.key", "column"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "present.0.key")],
        [
            numpy_helper.from_array(rng.standard_normal((50, 64), np.float32), "table"),
            numpy_helper.from_array(rng.standard_normal((64, 64), np.float32), "weight"),
            numpy_helper.from_array(np.array([2], np.int64), "last"),
        ],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def _workers(parent: int) -> dict[int, str]:
    """The worker processes of a process and their states (R running, S sleeping, T stopped)."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                is_worker = b"sparamx_onnx.bench_worker" in (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if is_worker and int(ppid) == parent:
                found[int(folder.name)] = state
    return found


def _alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie whose new parent has not looked yet does not."""
    alive = []
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                alive.append(pid)
        except OSError:
            continue
    return alive


def test_two_models(pair: tuple[Path, Path]) -> None:
    dense, sparse = pair
    result = sparamx_onnx.bench(sparse, dense, batch=3, threads=1, rounds=4)
    assert [timing.model for timing in result.timings] == [str(sparse), str(dense)]
    assert (result.batch, result.threads, result.rounds, result.past) == (3, 1, 4, None)
    assert result.ratio == result.timings[1].median / result.timings[0].median
    assert result.ratio_quartiles is not None
    assert 0 < result.ratio_quartiles[0] <= result.ratio_quartiles[1]
    for timing in result.timings:
        assert 0 < timing.quartiles[0] <= timing.median <= timing.quartiles[1]
        assert timing.runs >= 4 * 2
        assert timing.load_seconds > 0
        assert timing.pss is not None
        assert timing.model_pss is not None
        assert timing.anonymous is not None
        assert 10**6 < timing.pss < 10**10
        assert timing.model_pss < timing.pss
    assert not _workers(os.getpid())


def test_one_model_alone_and_its_text(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.run(["bench", str(pair[1]), "--length", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert str(pair[1]) in captured.out
    assert "ms" in captured.out or "us" in captured.out
    assert "as fast as" not in captured.out


def test_a_decoder_takes_one_step_after_its_cache(tmp_path: Path, save: Save) -> None:
    path = save(_decoder(), tmp_path / "decoder.onnx")
    converted = sparamx_onnx.convert(path, weights="fp32").output
    result = sparamx_onnx.bench(str(converted), path, batch=2, length=33, rounds=2)
    assert (result.batch, result.length, result.past) == (2, 1, 33)
    assert sparamx_onnx.verify(path, str(converted)).passed


def test_given_inputs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones((9, 96), np.float32), unrelated=np.zeros(1))
    result = sparamx_onnx.bench(pair[0], inputs=tmp_path / "in.npz", rounds=2)
    assert (result.batch, result.length) == (None, None)
    with pytest.raises(sparamx_onnx.SparamxError, match="one or the other"):
        sparamx_onnx.bench(pair[0], inputs=tmp_path / "in.npz", batch=2)


def test_idle_workers_are_stopped(pair: tuple[Path, Path]) -> None:
    seen = []

    def look(done: int, total: int, what: str) -> None:
        if what == "timing":
            seen.append(sorted(_workers(os.getpid()).values()))

    sparamx_onnx.bench(*pair, rounds=3, progress=look)
    assert seen == [["T", "T"]] * 4


def test_a_worker_that_dies_is_an_error_that_names_its_model(pair: tuple[Path, Path]) -> None:
    def kill(done: int, total: int, what: str) -> None:
        if done == 1:
            for pid in _workers(os.getpid()):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(sparamx_onnx.SparamxError, match=r"m.*\.onnx: the process that ran it was killed by SIGKILL"):
        sparamx_onnx.bench(*pair, rounds=3, progress=kill)
    assert not _workers(os.getpid())


def test_a_worker_that_fails_says_why(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(sparamx_onnx.SparamxError, match="the process that ran it failed: exit status 1"):
        sparamx_onnx.bench(pair[0])


def test_numbers_that_nothing_can_be_timed_with(pair: tuple[Path, Path]) -> None:
    for name in ("batch", "length", "threads", "rounds"):
        with pytest.raises(sparamx_onnx.SparamxError, match=f"{name} is 0; it must be 1 or more"):
            sparamx_onnx.bench(pair[0], **{name: 0})
    for options, message in (
        ({"prompt": 0}, "prompt is 0; it must be 1 or more"),
        ({"context": -1}, "context is -1; it must be 0 or more"),
        ({}, "nothing to time without a prompt or a context"),
        ({"context": 4}, "neither prompt nor context"),
    ):
        with pytest.raises(sparamx_onnx.SparamxError, match=message):
            bench_generation(pair[0], **options)


def test_the_text_says_what_was_timed_and_what_is_faster() -> None:
    times = {"quartiles": (0.001, 0.003), "runs": 9, "load_seconds": 1.0, "pss": 1, "model_pss": 1, "anonymous": 1}
    timings = (Timing("fast.onnx", 0.002, **times), Timing("slow.onnx", 0.004, **times))
    text = benchmark_text(Benchmark(timings, 2.0, (1.5, 2.5), 3, 1, 33, None, 4))
    assert "fast.onnx is 2.00x as fast as slow.onnx (quartiles 1.50 .. 2.50).\n" in text
    assert text.endswith("batch 3, length 1, after 33 in the cache, one thread per core; 4 rounds.")


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2.5)


def test_models_that_cannot_be_timed(
    pair: tuple[Path, Path], tmp_path: Path, plain: onnx.ModelProto, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = onnx.load(pair[0])
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    broken = onnx.load(pair[0])
    broken.graph.node[0].op_type = "NoSuchOperator"
    other = save(plain, tmp_path / "other.onnx")
    other_input = onnx.load(other)
    other_input.graph.input[0].name = other_input.graph.node[0].input[0] = "z"
    for arguments, words in (
        ([save(fixed, tmp_path / "fixed.onnx"), "--batch", "2"], "fixed batch of 4"),
        ([save(broken, tmp_path / "broken.onnx")], "broken.onnx: ONNX Runtime cannot run this model"),
        ([pair[0], "--against", save(other_input, tmp_path / "z.onnx")], "their inputs differ at 'x'"),
        # The same inputs as far as names and types go, but another width.
        ([pair[0], "--against", other], "other.onnx: ONNX Runtime fails on these inputs"),
    ):
        assert cli.run(["bench", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert words in captured.err
    assert not _workers(os.getpid())


@pytest.fixture
def running(pair: tuple[Path, Path]) -> Iterator[subprocess.Popen[str]]:
    """A ``bench`` that runs for a while, both of its workers at work."""
    script = (
        "import sys; from sparamx_onnx import benchmark, cli; bench = benchmark.bench;"
        "benchmark.bench = lambda *a, **k: bench(*a, **k, rounds=10000);"
        "sys.exit(cli.run(['bench', sys.argv[1], '--against', sys.argv[2]]))"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script, *pair], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while sorted(_workers(process.pid).values()).count("T") == 0 or len(_workers(process.pid)) < 2:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_no_worker_outlives_the_command(running: subprocess.Popen[str], number: signal.Signals) -> None:
    workers = list(_workers(running.pid))
    assert len(workers) == 2
    running.send_signal(number)
    _, errors = running.communicate(timeout=30)
    if number == signal.SIGINT:
        assert running.returncode == 130
        assert errors.splitlines()[-1] == "error: interrupted."
        assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while _alive(workers):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.02)


def test_the_json_document(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", str(pair[1]), "--against", str(pair[0]), "--batch", "2", "--threads", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"timings", "ratio", "ratio_quartiles", "batch", "length", "past", "threads", "rounds"} == set(document)
    assert {"model", "median", "quartiles", "runs", "load_seconds", "pss", "model_pss", "anonymous"} == set(
        document["timings"][0]
    )
