"""The quality of a decoder is measured with little text, and the page's tables and charts say what was measured."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# SparseGPT takes its time; test_benchmarks.py runs it on MiniLM.
QUICK = ["--methods", "magnitude", "wanda", "--weights", "bf16", "--sparsities", "0.5", "--cache-sparsities", "0.7"]
TEXTS = ["--windows", "2", "--window", "128", "--calibration", "2", "--rows", "1", "--lengths", "128", "192"]


def run(document: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(BENCHMARKS / "decoder_quality.py"), "--json", str(document), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a document with little text."""
    folder = tmp_path_factory.mktemp("measured")
    done = run(folder / "decoder_quality.json", *QUICK, *TEXTS)
    assert done.returncode == 0, done.stderr
    return folder


def cells(folder: Path, part: str) -> list[dict[str, Any]]:
    document = json.loads((folder / "decoder_quality.json").read_text())
    return [cell for cell in document["cells"] if cell["part"] == part]


def test_perplexity_of_weights(measured: Path) -> None:
    dense, kept, half, _, wanda, wanda_pattern = cells(measured, "weights")
    assert [cell["method"] for cell in (dense, kept, half, wanda)] == ["dense", "keep", "magnitude", "wanda"]
    assert kept["perplexity"] == pytest.approx(dense["perplexity"], rel=0.01)
    assert half["perplexity"] > 1.05 * dense["perplexity"]
    # The output layer is not pruned.
    assert 0.4 < half["zeros"] < 0.5
    assert wanda_pattern["zeros"] == pytest.approx(wanda["zeros"], abs=0.001)
    assert half["bytes"] < kept["bytes"] < dense["bytes"]


def test_perplexity_and_errors_of_caches(measured: Path) -> None:
    whole, rounded, keys, values, both, _, *guarded = cells(measured, "cache")
    assert rounded["logits_error"]["192"] < 0.005
    for cell in (keys, values):
        assert rounded["logits_error"]["192"] < cell["logits_error"]["192"] < both["logits_error"]["192"] < 1
    assert both["cache_bytes"] < keys["cache_bytes"] < rounded["cache_bytes"] < whole["cache_bytes"]
    # Of 128 tokens, the first 64 are whole for good, and the others for now.
    assert all(cell["logits_error"]["128"] == rounded["logits_error"]["128"] for cell in guarded)
    for cell in (rounded, keys, both):
        assert cell["perplexity"]["192"] == pytest.approx(whole["perplexity"]["192"], rel=0.3)


def test_errors_of_attention(measured: Path) -> None:
    rounded, keys, values, both, *_ = (cell["errors"] for cell in cells(measured, "attention"))
    assert len(both) == 6
    assert all(r < min(k, v) <= max(k, v) < b < 1 for r, k, v, b in zip(rounded, keys, values, both, strict=True))


def test_what_is_there_is_not_measured_again(measured: Path) -> None:
    before = json.loads((measured / "decoder_quality.json").read_text())["cells"]
    done = run(measured / "decoder_quality.json", *QUICK, *TEXTS, "--parts", "weights")
    assert done.returncode == 0, done.stderr
    assert json.loads((measured / "decoder_quality.json").read_text())["cells"] == before
    assert "magnitude" not in done.stdout
    done = run(measured / "decoder_quality.json", *QUICK, *TEXTS, "--window", "100")
    assert done.returncode == 1
    assert "was measured with other texts" in done.stderr


@pytest.fixture
def page(measured: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's module, reading that document."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality_page  # type: ignore[import-not-found, unused-ignore]
    import tables  # type: ignore[import-not-found, unused-ignore]

    monkeypatch.setattr(tables, "MEASURED", measured)
    return quality_page


def test_tables_say_what_was_measured(measured: Path, page: Any) -> None:
    dense, kept, half, *_ = cells(measured, "weights")
    types, weights = page.decoder_types(), page.decoder_weights()
    assert f"| fp32, ONNX Runtime | {dense['perplexity']:.2f} | {dense['bytes'] / 1e6:.1f} |" in types
    assert f"| bf16 | {kept['perplexity']:.2f} | {kept['bytes'] / 1e6:.1f} |" in types
    assert f"| bf16 | magnitude | {half['perplexity']:.2f} |" in weights
    caches = page.decoder_caches().splitlines()
    # A head, a line below it, the float cache, and the packed ones.
    assert len(caches) == 2 + len(cells(measured, "cache"))
    assert caches[0].count("|") == caches[-1].count("|")
    assert len(page.decoder_attention().splitlines()) == 2 + len(cells(measured, "attention"))
    for make in (page.tinylm_text, page.decoder_texts, page.decoder_costs):
        assert make()


def test_all_points_of_the_charts_lie_within_the_axes(page: Any) -> None:
    for _, make in page.CHARTS.values():
        svg = ET.fromstring(make())
        points = [(float(circle.get("cx", -1)), float(circle.get("cy", -1))) for circle in svg.findall(".//{*}circle")]
        assert points
        assert all(64 <= x <= 570 and 44 <= y <= 348 for x, y in points)
