import re
import subprocess
import sys

import pytest

TINY_LLAMA = {"hidden": 128, "layers": 1, "heads": 4, "kv-heads": 2, "intermediate": 256, "vocab": 128}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("demo") / "models"
    sizes = [f"--llama-{name}={size}" for name, size in TINY_LLAMA.items()]
    command = [sys.executable, "-m", "sparamx_onnx.models.demo", f"--folder={folder}", "--rounds=1", "--sentences=48"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(output: str, row: str) -> list[list[str]]:
    """The cells of every line that starts with `row`, one list per table."""
    return [
        re.split(r" {2,}", line[len(row) :].strip()) for line in output.splitlines() if line.lstrip().startswith(row)
    ]


def test_every_linear_layer_is_converted(output: str) -> None:
    assert cells(output, "linear layers converted") == [["of 36", "36", "36"], ["of 8", "8"]]


def test_embeddings_agree_as_well_as_the_weights_do(output: str) -> None:
    ((kept, pruned),) = cells(output, "cosine of the embeddings, mean")
    assert float(kept) > 0.9999
    assert 0.4 < float(pruned) < 0.95
    ((kept, pruned),) = cells(output, "same nearest neighbour")
    assert float(kept.rstrip("%")) > 90
    assert float(pruned.rstrip("%")) < float(kept.rstrip("%"))


def test_times_come_with_ratios(output: str) -> None:
    duration = r"[\d.]+ (?:ms|s|us)"
    cell = rf" +{duration} -> {duration}, [\d.]+x"
    row = r"time of a batch, {} x \d+ tokens" + 2 * cell
    for pattern in (row.format(1), row.format(32), "one token after 128" + cell):
        assert len(re.findall(rf"^{pattern}$", output, re.MULTILINE)) == 1, pattern


def test_it_ends_with_the_commands_for_one_s_own_model(output: str) -> None:
    tail = output[output.index("On your own model:") :]
    for command in ("inspect", "convert", "verify", "bench"):
        assert f"sparamx-onnx {command} model" in tail
