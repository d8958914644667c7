"""The benchmarks run, on models too small to say anything about speed, and what they write adds up."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a benchmark writes with --json, and what it prints."""
    document = folder / "out.json"
    command = [sys.executable, str(BENCHMARKS / script), "--json", str(document), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(document.read_text()), done.stdout


@pytest.mark.parametrize(("k", "n"), [(256, 320), (320, 256), (256, 256)])
def test_layer_measures_both_engines_and_the_stream(tmp_path: Path, k: int, n: int) -> None:
    document, printed = run(
        "layer.py", tmp_path, *f"--k {k} --n {n} --layers 3 --m 1,16 --rounds 2 --folder {tmp_path}".split()
    )
    assert document["machine"]["cpu"] in printed
    assert document["dense_bytes"] == 3 * k * n * 4
    # bf16 at 50 %: 9 bits a weight, a header and offsets.
    assert document["packed_bytes"] == pytest.approx(3 * k * n * 9 / 8, rel=0.05)
    assert document["relative_error"] < 0.05
    one, sixteen = document["results"]
    assert (one["m"], sixteen["m"]) == (1, 16)
    assert one["faster"] == pytest.approx(one["median_seconds"]["dense"] / one["median_seconds"]["packed"])
    for loop in ("plain", "prefetched"):
        figures = one[loop]
        assert figures["share"] == pytest.approx(figures["kernel_gb_per_second"] / figures["loop_gb_per_second"])
        assert loop not in sixteen
    assert f"{one['faster']:.2f}x" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "the models must not be left behind"


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_layer_against_quantized_models(tmp_path: Path, weights: str) -> None:
    sizes = "--k 128 --n 128 --layers 3 --m 2 --rounds 2"
    document, printed = run(
        "layer.py", tmp_path, *f"{sizes} --weights {weights} --against {weights} --folder {tmp_path}".split()
    )
    assert f"ONNX Runtime {weights}" in printed
    assert document["results"][0]["median_seconds"]["dense"] > 0


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_an_interrupted_benchmark(tmp_path: Path, signal_number: signal.Signals) -> None:
    command = [sys.executable, str(BENCHMARKS / "layer.py"), f"--folder={tmp_path}"]
    command += ["--k=64", "--n=64", "--layers=2", "--m=1", "--rounds=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        while not process.stdout.readline().startswith("packed weights"):
            assert process.poll() is None
        workers: list[Path] = []
        deadline = time.monotonic() + 60
        while len(workers) < 2:
            assert time.monotonic() < deadline
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            workers = [Path("/proc") / child for child in children if b"engine.py" in _command_line(child)]
        process.send_signal(signal_number)
        assert process.wait(30) == (143 if signal_number == signal.SIGTERM else -signal.SIGKILL)
    while any(b"engine.py" in _command_line(worker.name) for worker in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)
    if signal_number == signal.SIGTERM:
        assert not list(tmp_path.iterdir())


def _command_line(process: str) -> bytes:
    """Empty once the process has ended."""
    try:
        return (Path("/proc") / process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_layer_says_when_there_is_too_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "layer.py"), "--layers=100000", f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "take fewer --layers" in done.stderr
    assert "Traceback" not in done.stderr


def test_packing_measures_every_step(tmp_path: Path) -> None:
    document, printed = run("packing.py", tmp_path, *["--k", "100", "--n", "130", "--repeat", "2"])
    steps = {(result["weights"], result["what"]) for result in document["results"]}
    assert steps == {
        (weights, what) for weights in ("fp32", "bf16") for what in ("pack [K, N]", "pack [N, K]", "validate", "unpack")
    }
    assert "validate" in printed


def test_memory_watches_the_conversion_and_two_processes(tmp_path: Path) -> None:
    document, _ = run("memory.py", tmp_path, "--gb", "0.5", "--folder", str(tmp_path))
    conversion = document["conversion"]
    assert 0 < conversion["peak_anonymous"] <= conversion["peak_resident"]
    assert 0 < conversion["peak_beyond_input"] <= conversion["peak_resident"]
    for process in document["two_processes"]:
        # Each maps all of the weights, and each is charged for half of them.
        assert process["Rss"] > document["packed_bytes"]
        assert process["Rss"] - process["Pss"] > 0.4 * document["packed_bytes"]
