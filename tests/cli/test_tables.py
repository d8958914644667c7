"""Text tables: they fit, and shortened names stay distinguishable."""

from __future__ import annotations

import pytest

from sparamx_onnx.tables import Column, duration, percent, render, shorten, size

COLUMNS = (Column("node", shrinks=True), Column("zeros", right=True), Column("form"))


def test_columns_are_aligned_and_lines_have_no_trailing_spaces() -> None:
    text = render(COLUMNS, [["a", "5.0%", "sparse"], ["longer", "50.0%", "d"]], width=80)
    assert text.split("\n") == ["node    zeros  form", "a        5.0%  sparse", "longer  50.0%  d"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_long_name_is_cut_in_the_middle_to_fit(width: int) -> None:
    parts = ["self_attention/query", "self_attention/value"]
    names = [f"model/encoder/layers/{layer}/{part}/dense/MatMul" * 3 for layer in (3, 14) for part in parts]
    lines = render(COLUMNS, [[name, "50.0%", "sparse"] for name in names], width).split("\n")
    assert max(map(len, lines)) == width
    for name, line in zip(names, lines[1:], strict=True):
        head, tail = line.split()[0].split("…")
        assert head
        assert name.startswith(head)
        assert name.endswith(tail)


def test_a_table_without_rows_is_its_heading() -> None:
    assert render(COLUMNS, [], width=80) == "node  zeros  form"


def test_the_width_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert len(render(COLUMNS, [["n" * 100, "1.0%", "form"]]).split("\n")[1]) == 40


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (3_400_000_000, "3.4 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_sizes(number: int | None, shown: str) -> None:
    assert size(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(12.3456, "12.35 s"), (0.0123456, "12.35 ms"), (0.001, "1 ms"), (4.2e-6, "4.2 us")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(None, "-"), (0.0, "0.0%"), (1e-6, "0.1%"), (0.5, "50.0%"), (0.99999, "99.9%"), (1.0, "100.0%")],
)
def test_percentages_are_rounded_to_all_or_nothing_only_when_exact(share: float | None, shown: str) -> None:
    assert percent(share) == shown


def test_a_text_that_fits_is_not_shortened() -> None:
    assert shorten("twelve chars", 12) == "twelve chars"
    assert shorten("twelve chars", 11) == "twel… chars"
