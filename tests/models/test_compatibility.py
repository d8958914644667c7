"""Models as others write them: each converts, gives the same results, and does as docs/compatibility.md says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparamx_onnx.models import compatibility
from sparamx_onnx.models.compatibility import Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"

# Every architecture once, every writer with a plain encoder and with experts. The dynamo exporter takes long.
EVERY_WRITER = ("BERT", "Mixtral, separate experts")
EVERY_ARCHITECTURE = "torch, TorchScript"
SLOW_WRITER, SLOW_ARCHITECTURES = "torch, dynamo", ("BERT", "Llama")


def _is_sampled(case: Case) -> bool:
    architecture, writer = case.architecture.name, case.writer.name
    if writer == "onnxruntime-genai, int4":
        return architecture == "Llama"
    if writer == SLOW_WRITER:
        return architecture in SLOW_ARCHITECTURES
    return writer == EVERY_ARCHITECTURE or architecture in EVERY_WRITER


TRIED = filter(compatibility.can_be_tried, compatibility.cases())
CASES = [case for case in TRIED if os.environ.get("SPARAMX_TEST_FULL") or _is_sampled(case)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def documented() -> dict[tuple[str, str], list[str]]:
    return compatibility.rows(PAGE.read_text())


def test_the_page_has_every_case(documented: dict[tuple[str, str], list[str]]) -> None:
    assert sorted(documented) == sorted((case.writer.name, case.architecture.name) for case in compatibility.cases())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_converts_as_documented(case: Case, folder: Path, documented: dict[tuple[str, str], list[str]]) -> None:
    result = compatibility.run(case, folder)
    assert not result.problems
    row = compatibility.rows(compatibility.page([result]))[case.writer.name, case.architecture.name]
    assert row == documented[case.writer.name, case.architecture.name]
