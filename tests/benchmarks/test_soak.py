"""The soak, for seconds instead of an hour: it runs everything it is asked for, and it notices what is wrong."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
OPTIONS = ["--minutes=0.1", "--processes=2", "--threads=3"]


def test_a_short_soak_counts_runs_and_memory_and_finds_nothing_wrong(tmp_path: Path) -> None:
    document = tmp_path / "soak.json"
    kinds = "product (bf16|int4) fp16 5|attention"
    command = [sys.executable, str(BENCHMARKS / "soak.py"), *OPTIONS, "--kinds", kinds, f"--folder={tmp_path}"]
    done = subprocess.run([*command, "--json", str(document)], capture_output=True, text=True, check=False)
    result = json.loads(document.read_text())
    assert "0 wrong, 0 processes died" in done.stdout
    assert (result["wrong"], result["died"], result["errors"]) == (0, [], [])
    assert result["minutes"] >= 0.1
    assert set(result["by_kind"]) == set(result["expected"])
    assert sum(result["by_kind"].values()) == result["runs"]
    assert result["opened"] >= 2 * 6
    assert result["memory"][-1]["Pss"] > result["memory"][0]["Pss"]
    assert [path.name for path in tmp_path.iterdir()] == ["soak.json"], "the models must not be left behind"


def test_other_bits_are_an_error(tmp_path: Path) -> None:
    """Half of the digests are those of nothing: all of their runs are wrong, and none of the others."""
    script = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
import json, pathlib, threading, soak_engine
folder = pathlib.Path({str(tmp_path)!r})
chosen = [kind for kind in soak_engine.kinds(folder) if kind.name.startswith("attention fast")]
soak_engine.prepare(chosen)
digests = [soak_engine.digest(chosen[0].run(chosen[0].open(1))), {hashlib.sha256().hexdigest()!r}]
(folder / soak_engine.EXPECTED).write_text(json.dumps(dict(zip((kind.name for kind in chosen), digests))))
soak = soak_engine.Soak(folder, 2.0)
threading.Timer(2.0, soak.stop).start()
soak.work(0)
soak.report()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    one, other = sorted(result["runs"])
    assert result["runs"][one] > 0
    assert result["wrong"] == result["runs"][other] > 0
    assert all(error.startswith(f"{other}: other bits: ") for error in result["errors"])
