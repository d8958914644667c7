"""``convert --report``: one page with everything in it, which no name in a model can break."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparamx_onnx
from sparamx_onnx import cli
from sparamx_onnx.reports import conversion_text

Save = Callable[..., Path]
Mlp = Callable[..., onnx.ModelProto]
Tree = Callable[[Path], dict[str, bytes]]

DONE, UNUSABLE = 0, 2
HOSTILE = "</script><script>alert('1')</script>\"&amp;<img src=x>"
_VOID = {"meta", "line", "rect"}


class Page(HTMLParser):
    """Reads a page: its tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
            if "td" in self._open:
                self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The only row that begins so."""
        (row,) = [row for row in self.rows if row and row[0] == name]
        return row


@pytest.fixture
def model(tmp_path: Path, mlp: Mlp, save: Save) -> Path:
    """Three layers of names that no page should take literally; the last product has no weight."""
    model = mlp(sizes=(96, 128, 112), sparsity=0.25)
    model.graph.node[0].name = HOSTILE
    model.graph.node.append(onnx.helper.make_node("MatMul", ["x", "w"], ["z"], "product<b>"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [96, 8]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["batch", 8]))
    return save(model, tmp_path / "dense.onnx")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((200, 96), np.float32), rng.standard_normal((96, 8), np.float32)
    np.savez(tmp_path / "inputs.npz", x=x, w=w)
    return tmp_path / "inputs.npz"


def test_the_page_needs_nothing_else_and_shows_every_name_as_it_is(model: Path, tmp_path: Path) -> None:
    result = sparamx_onnx.convert(model, report=tmp_path / "out.html")
    assert result.report == str(tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    assert page.tags.count("script") == 1
    assert {"img", "link", "iframe", "b"}.isdisjoint(page.tags)
    assert {name for name, _ in page.attributes}.isdisjoint({"src", "href", "onclick", "onload", "srcset"})
    assert re.search(r"url\(|@import|https?:", (tmp_path / "out.html").read_text()) is None
    # What a browser runs is what the policy names, and nothing else.
    (script,) = page.texts["script"]
    policy = dict(page.attributes)["content"]
    assert "default-src 'none'" in str([value for _, value in page.attributes])
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in str([value for _, value in page.attributes])
    # Shown, and told by the charts.
    assert page.row(HOSTILE)[1:4] == ["MatMul", "96", "128"]
    assert any(title.startswith(HOSTILE) for title in page.texts["title"])


def test_the_figures_are_those_of_the_plan(model: Path, inputs: Path, tmp_path: Path) -> None:
    result = sparamx_onnx.convert(model, calibration=inputs, report=tmp_path / "out.html")
    page = Page(tmp_path / "out.html")
    node = result.plan.converted[0]
    assert node.sparsity_before == pytest.approx(0.25)
    assert node.sparsity == pytest.approx(0.5)
    assert node.error is not None
    assert page.row(HOSTILE)[4:10] == ["25.0%", "50.0%", "49.2 kB", "14.3 kB", "bf16 sparse", f"{node.error:.4f}"]
    heading, first, *_ = conversion_text(result).splitlines()
    assert heading.endswith("error")
    assert first.endswith(f"{node.error:.4f}")
    assert page.row("Zeros in them")[1:] == ["25.0%", "50.0%"]
    assert page.row("Linear layers that are sparse operators")[1:] == ["0", "2"]
    left = page.row("product<b>")
    assert left[1] == "MatMul"
    assert left[2].startswith(result.plan.left_alone[0].reason.text)
    # Zeros, bytes, errors.
    assert page.tags.count("svg") == 3


@pytest.mark.parametrize(("layers", "axis"), [(1, ["0", "1", "2"]), (3, ["0", "2", "4"]), (4, ["0", "2", "4"])])
def test_the_chart_of_zeros_counts_whole_layers(
    layers: int, axis: list[str], mlp: Mlp, save: Save, tmp_path: Path
) -> None:
    model = save(mlp(sizes=(48,) * (layers + 1)), tmp_path / "dense.onnx")
    sparamx_onnx.convert(model, report=tmp_path / "out.html")
    assert Page(tmp_path / "out.html").texts["text"][:3] == axis


def test_dry_runs_and_models_without_layers_have_a_page_too(
    model: Path, plain: onnx.ModelProto, save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["convert", str(model), "--dry-run", "--report", str(tmp_path / "dry.html")]) == DONE
    assert f"Report: {tmp_path / 'dry.html'}" in capsys.readouterr().out
    assert "dry run" in (tmp_path / "dry.html").read_text()
    assert Page(tmp_path / "dry.html").row(HOSTILE)[4:6] == ["25.0%", "25.0%"]
    assert not (tmp_path / "dense.sparse.onnx").exists()
    nothing = save(plain, tmp_path / "plain.onnx")
    sparamx_onnx.convert(nothing, report=tmp_path / "plain.html")
    assert "no linear layer" in (tmp_path / "plain.html").read_text()
    Page(tmp_path / "plain.html")


def test_a_report_destroys_nothing(model: Path, tmp_path: Path, tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.html").write_text("precious")
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    for report, words in (
        ("old.html", "exists already"),
        ("folder", "is a folder"),
        ("absent/out.html", "does not exist"),
        ("dense.onnx", "is a file of the model"),
        ("dense.sparse.onnx.data", "is a file of the model"),
    ):
        assert cli.run(["convert", str(model), "--report", str(tmp_path / report)]) == UNUSABLE
        assert words in capsys.readouterr().err
        assert tree(tmp_path) == before
    assert cli.run(["convert", str(model), "--force", "--report", str(tmp_path / "old.html")]) == DONE
    assert "precious" not in (tmp_path / "old.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dense.onnx", "dense.sparse.onnx", "dense.sparse.onnx.data", "folder", "old.html",
    ]  # fmt: skip
