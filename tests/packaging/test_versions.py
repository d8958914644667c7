"""The installed package, and the versions that it promises to work with."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROJECT = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("."))


def bounds(requirement: str) -> tuple[str, str, str | None]:
    """The name, the lowest version and, where there is one, the first version too high."""
    match = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,<([\d.]+))?", requirement)
    assert match, f"{requirement}: not of the form name>=1.2 or name>=1.2,<3"
    return match[1], match[2], match[3]


def pins(file: str) -> dict[str, str]:
    lines = (TESTS / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_both_ends_of_every_range_are_tested(requirement: str) -> None:
    name, lowest, too_high = bounds(requirement)
    oldest, newest = pins("requirements-oldest.txt")[name], pins("requirements.txt")[name]
    assert oldest == lowest or oldest.startswith(f"{lowest}."), f"{name} {oldest} is not the oldest of {requirement}"
    assert version(newest) >= version(oldest)
    assert too_high is None or version(newest) < version(too_high)


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_pins_fit_the_extras(extra: str) -> None:
    pinned = pins("requirements.txt")
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, lowest, too_high = bounds(requirement)
        if name in pinned:
            assert version(pinned[name]) >= version(lowest), requirement
            assert too_high is None or version(pinned[name]) < version(too_high), requirement


def test_the_wheel_is_for_every_python() -> None:
    distribution = importlib.metadata.distribution("sparamx-onnx")
    wheel = distribution.read_text("WHEEL")
    assert wheel is not None
    assert re.search(r"^Tag: py3-none-(many)?linux_\w*x86_64$", wheel, re.MULTILINE), wheel
    assert "Root-Is-Purelib: false" in wheel


def test_the_library_says_the_version_of_the_package() -> None:
    from sparamx_onnx.ops import library

    installed = importlib.metadata.version("sparamx-onnx")
    assert installed == PROJECT["version"]
    assert library.load().sparamx_version().decode() == installed
