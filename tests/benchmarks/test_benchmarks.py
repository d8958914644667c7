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

QUICK = ["--cell-seconds=0.01", "--file-bytes=300000"]


def run(script: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a benchmark writes with --json, and what it prints."""
    document = folder / "out.json"
    command = [sys.executable, str(BENCHMARKS / script), "--json", str(document), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(document.read_text()), done.stdout


@pytest.mark.parametrize(("k", "n"), [(256, 320), (320, 256), (256, 256)])
def test_models_measures_every_engine_and_the_stream(tmp_path: Path, k: int, n: int) -> None:
    sizes = f"--shapes {k}x{n} --layers 3 --m 1 16 --rounds 2 --folder {tmp_path}"
    document, printed = run("models.py", tmp_path, *sizes.split())
    assert document["machine"]["cpu"] in printed
    one, sixteen = document["cells"]
    assert (one["m"], sixteen["m"]) == (1, 16)
    assert one["dense_bytes"] == 3 * k * n * 4
    # bf16 at 50 %: 9 bits a weight, a header and offsets.
    assert one["packed_bytes"]["packed-bf16"] == pytest.approx(3 * k * n * 9 / 8, rel=0.05)
    expected = {"ort-fp32", "ort-int8", "ort-int4", "packed-fp32", "packed-bf16", "packed-int8", "packed-int4"}
    for cell in (one, sixteen):
        assert set(cell["engines"]) | set(cell["missing"]) == expected | {"openvino-bf16", "deepsparse"}
        assert set(cell["engines"]) >= expected
        assert all(engine["seconds"] > 0 and len(engine["turns"]) == 2 for engine in cell["engines"].values())
        for name in cell["missing"]:
            assert f"{name:<14} not installed" in printed
    assert set(one["streams"]) == {name for name in expected if name.startswith("packed")}
    assert sixteen["streams"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "the models must not be left behind"


def test_models_goes_on_from_what_is_there(tmp_path: Path) -> None:
    sizes = f"--shapes 128x128 --layers 2 --rounds 2 --keep --folder {tmp_path / 'models'}"
    options = [*sizes.split(), "--engines", "ort-fp32", "packed-bf16"]
    first, _ = run("models.py", tmp_path, *options, "--m", "2")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*.onnx")}
    assert {path.name for path in made} == {"dense.onnx", "packed-bf16.onnx"}
    second, printed = run("models.py", tmp_path, *options, "--m", "2", "16")
    assert second["cells"][0] == first["cells"][0]
    assert [cell["m"] for cell in second["cells"]] == [2, 16]
    assert "M    2" not in printed
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    options = f"--shapes 64x64 --layers 1 --rounds 1 --m 1 --folder {tmp_path} --engines ort-fp32".split()
    document, _ = run("models.py", tmp_path, *options)
    document["machine"]["cpu"] = "an abacus"
    (tmp_path / "out.json").write_text(json.dumps(document))
    command = [sys.executable, str(BENCHMARKS / "models.py"), "--json", str(tmp_path / "out.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "measured on another machine (an abacus)" in done.stderr


def test_kernels_measures_every_combination(tmp_path: Path) -> None:
    options = [*["--shapes", "64x80,96x48", "--sparsity", "0.5", "0.9", "--m", "1", "17"], *QUICK]
    document, printed = run("kernels.py", tmp_path, *options)
    assert len(document["cells"]) == 4 * 2 * 2 * 2
    for cell in document["cells"]:
        assert cell["seconds"] > 0
        assert cell["path"] in printed
        assert ("plain_bytes_per_second" in cell) == (cell["m"] == 1)
    again, _ = run("kernels.py", tmp_path, *options)
    assert again["cells"] == document["cells"], "what is there is not measured again"


def test_kernels_runs_the_level_that_is_asked_for(tmp_path: Path) -> None:
    options = [*["--shapes", "64x80", "--sparsity", "0.5", "--m", "1", "--level", "scalar"], *QUICK]
    document, _ = run("kernels.py", tmp_path, *options)
    assert {cell["path"] for cell in document["cells"]} == {"scalar"}


def test_the_performance_page_says_what_was_measured() -> None:
    command = [sys.executable, str(BENCHMARKS / "page.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_an_interrupted_benchmark(tmp_path: Path, signal_number: signal.Signals) -> None:
    command = [sys.executable, str(BENCHMARKS / "models.py"), f"--folder={tmp_path}"]
    command += ["--shapes=64x64", "--layers=2", "--m=1", "--rounds=100000", "--engines", "ort-fp32", "packed-bf16"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        while "layers 64 x 64" not in process.stdout.readline():
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


def test_models_says_when_there_is_too_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "models.py"), "--layers=100000", f"--folder={tmp_path}"]
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


def test_attention_compares_the_operators(tmp_path: Path) -> None:
    sizes = ["--heads=4", "--kv-heads=2", "--size=16", "--past=128", "--prefill=20", "--layers=2", "--rounds=2"]
    document, printed = run("attention.py", tmp_path, *sizes)
    step, prompt = document["results"]
    assert [(step["tokens"], step["past"]), (prompt["tokens"], prompt["past"])] == [(1, 128), (20, 0)]
    assert list(step["engines"]) == ["GroupQueryAttention", "fast", "packed 30/50", "packed 50/50"]
    assert list(prompt["engines"]) == ["GroupQueryAttention", "fast"]
    for result in (step, prompt):
        assert result["relative_error"] < 1e-4
        for name, engine in result["engines"].items():
            assert engine["seconds"] > engine["packing_seconds"] >= 0
            if "packed" not in name:
                assert engine["bytes_of_a_token"] == 2 * 2 * 16 * 4
                assert engine["bytes_read"] == (result["tokens"] + result["past"]) * engine["bytes_of_a_token"]
    packed = step["engines"]["packed 50/50"]
    # Two heads: a bitmap and half of the numbers of two blocks, and a dense one.
    bitmap, block = 64 * (32 + 16) // 8, 64 * 2 * 16
    assert packed["bytes_read"] == 2 * (2 * (bitmap + block) + 64 * (32 + 16) * 2)
    assert packed["bytes_of_a_token"] == 2 * (bitmap + block) // 64
    assert "packed 30/50" in printed


def test_siblings_are_timed_apart_and_fused(tmp_path: Path) -> None:
    document, printed = run(
        "siblings.py",
        tmp_path,
        *f"--cases qkv-384 --megabytes 4 --m 1,5 --weights bf16 --rounds 2 --folder {tmp_path}".split(),
    )
    assert [(cell["case"], cell["weights"], cell["m"]) for cell in document["cells"]] == [
        ("qkv-384", "bf16", 1),
        ("qkv-384", "bf16", 5),
    ]
    for cell in document["cells"]:
        low, high = cell["faster_quartiles"]
        assert 0 < low <= high
        assert cell["faster"] == pytest.approx(cell["block_seconds"]["never"] / cell["block_seconds"]["always"])
        assert f"{cell['faster']:.3f}x" in printed


def test_overhead_times_every_weight_type(tmp_path: Path) -> None:
    document, printed = run("overhead.py", tmp_path, "--layers=3", "--rounds=3", f"--folder={tmp_path}")
    assert [result["layer"] for result in document["results"]] == ["MatMul", "fp32", "bf16", "int8", "int4"]
    for result in document["results"]:
        assert 0 < result["quartiles"][0] <= result["median_seconds"] <= result["quartiles"][1]
    assert "us a layer" in printed


def test_quality_orders_the_methods(tmp_path: Path) -> None:
    """MiniLM with its real weights: what knows more of the inputs keeps more of the embeddings."""
    options = "--calibration 128 --test 150 --methods magnitude wanda sparsegpt --sparsities 0.5 --patterns"
    document, printed = run("quality.py", tmp_path, *options.split())
    common, kept, *results = document["cells"]
    assert (common["calibration"], common["test"], common["weights"]) == (128, 150, "bf16")
    assert kept["cosine"] > 0.9999
    rows = {row["method"]: row for row in results}
    for row in rows.values():
        assert row["zeros"] == pytest.approx(0.5, abs=0.002)
        assert f"{row['cosine']:.4f}" in printed
    for figure in ("cosine", "neighbours"):
        assert rows["magnitude"][figure] < rows["wanda"][figure] < rows["sparsegpt"][figure]
    assert rows["sparsegpt"]["cosine"] > 0.9
    again, printed = run("quality.py", tmp_path, *options.split())
    assert again["cells"] == document["cells"]
    assert "sparsegpt" not in printed


def test_generation_compares_decoders_and_counts_shared_memory(tmp_path: Path) -> None:
    options = ["--hidden=128", "--layers=2", "--heads=4", "--kv-heads=2", "--intermediate=96", "--vocab=320"]
    options += ["--positions=1024", "--context=24", "--long=200", "--prompt=16", "--rounds=2", "--processes=2"]
    options += ["--folder", str(tmp_path / "models"), "--models", "int8", "int4-packed", "int4-huge"]
    document, printed = run("generation.py", tmp_path, *options)
    cells = {(cell["ours"], cell["theirs"], cell["what"], cell["tokens"]) for cell in document["cells"]}
    pairs = (("int8", "dense"), ("int8", "dynamic"))
    assert cells == {
        *((*pair, *measured) for pair in pairs for measured in (("context", 24), ("prompt", 16))),
        ("int4-packed", "nbits", "context", 200),
        ("int4-huge", "int4", "context", 24),
        *((ours, None, "processes", 2) for ours in ("int8", "int4-packed")),
    }
    for cell in document["cells"]:
        assert cell["file_bytes"] > 0
        if cell["what"] == "processes":
            assert len(cell["processes"]) == 2
            assert all(memory["pss"] > 0 for memory in cell["processes"])
        else:
            low, high = cell["faster_quartiles"]
            assert 0 < low <= high
            assert all(rate > 0 for rate in cell["tokens_per_second"])
    assert "2 processes on int8" in printed
    # What is there is not measured again.
    again, printed = run("generation.py", tmp_path, *options)
    assert again["cells"] == document["cells"]
    assert "processes on" not in printed
