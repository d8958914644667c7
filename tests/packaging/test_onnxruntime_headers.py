"""The four ways in which the build finds the headers of ONNX Runtime, with folders and archives made here."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def make_headers(folder: Path, api_version: int = 21) -> Path:
    folder.mkdir(parents=True)
    (folder / "onnxruntime_c_api.h").write_text(f"#pragma once\n#define ORT_API_VERSION {api_version}\n")
    (folder / "onnxruntime_cxx_api.h").write_text("#pragma once\n")
    return folder


def find_headers(build: Path, way: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(HERE / "onnxruntime_headers"), "-B", str(build), f"-DSPARAMX_ORT_HEADERS={way}"]
    inherited = {name: value for name, value in os.environ.items() if name != "ONNXRUNTIME_INCLUDE_DIR"}
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, env=inherited | environment, timeout=120
    )


def assert_found(result: subprocess.CompletedProcess[str], folder: Path, way: str, api_version: int = 21) -> None:
    assert result.returncode == 0, result.stderr
    assert f"ONNX Runtime headers: {folder} ({way}, API version {api_version})" in result.stdout


def sentence(text: str) -> str:
    """CMake wraps its messages; this undoes it."""
    return " ".join(text.split())


def pack_release(tmp_path: Path) -> tuple[Path, str]:
    make_headers(tmp_path / "onnxruntime-linux-x64-1.21.0" / "include")
    archive = tmp_path / "release.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "onnxruntime-linux-x64-1.21.0", arcname="onnxruntime-linux-x64-1.21.0")
    return archive, hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.parametrize("inside", ["", "onnxruntime", "include/onnxruntime/core/session"])
def test_variable_may_name_a_folder_above(tmp_path: Path, inside: str) -> None:
    folder = make_headers(tmp_path / "headers" / inside)
    option = f"-DONNXRUNTIME_INCLUDE_DIR={tmp_path / 'headers'}"
    assert_found(find_headers(tmp_path / "build", "auto", option), folder, "variable")


def test_environment_variable(tmp_path: Path) -> None:
    folder = make_headers(tmp_path / "headers")
    result = find_headers(tmp_path / "build", "auto", ONNXRUNTIME_INCLUDE_DIR=str(folder))
    assert_found(result, folder, "variable")


def test_wrong_variable_is_an_error_and_not_a_reason_to_look_elsewhere(tmp_path: Path) -> None:
    result = find_headers(tmp_path / "build", "auto", f"-DONNXRUNTIME_INCLUDE_DIR={tmp_path}")
    assert result.returncode != 0
    assert f"ONNXRUNTIME_INCLUDE_DIR={tmp_path} holds no onnxruntime_c_api.h" in sentence(result.stderr)


def test_installed_package(tmp_path: Path) -> None:
    folder = make_headers(tmp_path / "prefix" / "include" / "onnxruntime")
    result = find_headers(tmp_path / "build", "installed", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    assert_found(result, folder, "installed")


def test_too_old_a_package_is_refused(tmp_path: Path) -> None:
    folder = make_headers(tmp_path / "prefix" / "include", api_version=20)
    result = find_headers(tmp_path / "build", "installed", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    assert result.returncode != 0
    assert f"{folder} has the API version 20" in sentence(result.stderr)


def test_release_archive(tmp_path: Path) -> None:
    archive, sha256 = pack_release(tmp_path)
    options = (f"-DSPARAMX_ORT_ARCHIVE_URL={archive.as_uri()}", f"-DSPARAMX_ORT_ARCHIVE_SHA256={sha256}")
    build = tmp_path / "build"
    folder = build / "onnxruntime-headers" / "archive" / "include"
    assert_found(find_headers(build, "archive", *options), folder, "archive")
    archive.unlink()
    assert_found(find_headers(build, "archive", *options), folder, "archive")


def test_release_archive_with_another_checksum_is_refused(tmp_path: Path) -> None:
    archive, sha256 = pack_release(tmp_path)
    result = find_headers(tmp_path / "build", "archive", f"-DSPARAMX_ORT_ARCHIVE_URL={archive.as_uri()}")
    assert result.returncode != 0
    assert f"has the SHA-256 {sha256}, not 7485c7e7" in sentence(result.stderr)


def test_failure_names_all_four_ways(tmp_path: Path) -> None:
    missing = tmp_path / "missing.tgz"
    result = find_headers(tmp_path / "build", "archive", f"-DSPARAMX_ORT_ARCHIVE_URL={missing.as_uri()}")
    assert result.returncode != 0
    text = sentence(result.stderr)
    assert "could not be downloaded" in text
    for way in ("1. set ONNXRUNTIME_INCLUDE_DIR", "2. install a package", "3. let this machine reach", "4. on Debian"):
        assert way in text


def test_debian_mirrors_from_both_kinds_of_apt_sources(tmp_path: Path) -> None:
    sources = tmp_path / "sources.list.d"
    sources.mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://commented.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/a/b.gpg] http://one.example/debian bookworm main contrib\n"
        "deb-src http://source.example/debian bookworm main\n"
        "deb http://security.example/debian-security bookworm-security main\n"
    )
    (sources / "other.list").write_text("deb https://vendor.example/debian bookworm stable\n")
    (sources / "debian.sources").write_text(
        "Types: deb deb-src\n# a comment\nURIs: http://two.example/debian\n http://three.example/debian\n"
        "Suites: bookworm bookworm-updates\nComponents: main\n\n"
        "Enabled: no\nTypes: deb\nURIs: http://disabled.example/debian\nSuites: bookworm\nComponents: main\n\n"
        "Types: deb\nURIs: http://four.example/debian\nSuites: testing\nComponents: contrib main\n"
    )
    command = ["cmake", f"-DAPT_DIR={tmp_path}", "-DRELEASE=bookworm", "-P", HERE / "print_debian_mirrors.cmake"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    hosts = ["one", "two", "three", "four"]
    assert result.stderr.strip() == ";".join(f"http://{host}.example/debian" for host in hosts)
