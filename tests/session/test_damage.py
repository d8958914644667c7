"""Damaged weights in a real session: an error that names the node, or an output of the right size. Never a crash.

The sessions run in processes of their own (damage_worker.py); one that dies fails the test and names the damage.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

K, N = 1100, 70  # three runs along K, the last one short; five strips along N, the last one narrow
BLOBS = [(weight_type, form) for weight_type in ("fp32", "bf16", "int8", "int4") for form in ("sparse", "dense")]
FLIPS = 500 * (10 if os.environ.get("SPARAMX_TEST_FULL") else 1)  # for each of the blobs

HEADER_BYTES, ENTRY_BYTES, NNZ_OFFSET = 128, 24, 48
# (offset, size) of every field of docs/format.md, the reserved ones included.
HEADER_FIELDS = [
    (0, 8), (8, 4), (12, 4), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8), (56, 1), (57, 1), (58, 1), (59, 1), (60, 1),
    (61, 1), (62, 1), (63, 1), (64, 4), (68, 4), (72, 4), (76, 4), *((80 + 8 * i, 8) for i in range(6)),
]  # fmt: skip
ENTRY_FIELDS = [(0, 4), (4, 4), (8, 8), (16, 8)]


def damage(*changes: tuple[int, int], keep: int | None = None, **how: bool) -> dict:
    """A damage as damage_worker.py reads it: bytes to overwrite, bytes to keep, and flags that are false if absent."""
    flags = {flag: how.pop(flag, False) for flag in ("follow", "external", "cut")}
    assert not how
    return {"bytes": [list(change) for change in changes], "keep": keep, **flags}


def _sections(blob: np.ndarray) -> list[tuple[int, int]]:
    """Offset and size of every section."""
    count = int(blob[76:80].view("<u4")[0])
    entries = [blob[HEADER_BYTES + ENTRY_BYTES * i :][:ENTRY_BYTES].tobytes() for i in range(count)]
    return [struct.unpack_from("<QQ", entry, 8) for entry in entries]


def _fields(blob: np.ndarray) -> list[tuple[int, int]]:
    tables = [HEADER_BYTES + ENTRY_BYTES * i for i in range(len(_sections(blob)))]
    return HEADER_FIELDS + [(table + offset, size) for table in tables for offset, size in ENTRY_FIELDS]


def _field_damages(blob: np.ndarray) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    for offset, size in _fields(blob):
        limit = 256**size
        value = int.from_bytes(blob[offset : offset + size].tobytes(), "little")
        values = {0, 1, 2, 15, 64, limit - 1, limit // 2, value + 1, value - 1, value * 2, value ^ (limit >> 1)}
        values |= {value + 64, value - 64, limit - 64, int(rng.integers(0, 2**62)) % limit}
        for other in sorted({candidate % limit for candidate in values} - {value}):
            changes = list(zip(range(offset, offset + size), other.to_bytes(size, "little"), strict=True))
            yield damage(*changes)
            if offset in (24, 32):  # K and N: the operator agrees with the header
                yield damage(*changes, follow=True)


def _cut_damages(blob: np.ndarray) -> Iterator[dict]:
    edges = {0, 1, 8, 40, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + ENTRY_BYTES, blob.size - 64, blob.size - 1}
    for offset, size in _sections(blob):
        edges |= {offset - 1, offset, offset + 1, offset + size // 2, offset + size - 1, offset + size}
    for keep in sorted(edge for edge in edges if 0 <= edge < blob.size):
        yield damage(keep=keep)
        yield damage(keep=keep, external=True)
        yield damage(keep=keep, external=True, cut=True)


def _offset_damages(blob: np.ndarray) -> Iterator[dict]:
    """Every entry of the offsets section and some of the bitmap, by one and by a lot."""
    if blob[59] != 1:
        return
    (offsets, size), (bitmap, bitmap_size) = _sections(blob)[:2]
    for entry in range(offsets, offsets + size, 8):
        value = int.from_bytes(blob[entry : entry + 8].tobytes(), "little")
        for other in (value + 1, value - 1, value + 2**32, 2**64 - 1, 2**63):
            bytes_ = (other % 2**64).to_bytes(8, "little")
            yield damage(*zip(range(entry, entry + 8), bytes_, strict=True), external=other % 2 == 0)
    for position in range(bitmap, bitmap + bitmap_size, max(1, bitmap_size // 100)):
        yield damage((position, int(blob[position]) ^ 0x10), external=position % 2 == 0)


def _flip_damages(blob: np.ndarray, seed: int) -> Iterator[dict]:
    rng = np.random.default_rng(seed)
    sections = _sections(blob)
    has_scales = blob[58] != 0
    for number in range(FLIPS):
        # A third in the header and the tables, a third in front of the values, a third anywhere.
        limit = (HEADER_BYTES + ENTRY_BYTES * len(sections), sections[-1 - has_scales][0], blob.size)[number % 3]
        positions = rng.choice(limit, size=rng.integers(1, 4), replace=False)
        changes = [(int(position), int(blob[position]) ^ (1 << int(rng.integers(8)))) for position in positions]
        yield damage(*changes, follow=bool(number % 2), external=number % 10 == 0)


def _try_all(folder: Path, blob: np.ndarray, damages: list[dict]) -> list[str]:
    """What became of each damage."""
    np.save(folder / "blob.npy", blob)
    (folder / "damages.json").write_text(json.dumps(damages))
    worker = Path(__file__).with_name("damage_worker.py")
    result = subprocess.run(
        [sys.executable, "-P", worker, folder], capture_output=True, text=True, timeout=1200, check=False
    )
    lines = result.stdout.splitlines()
    if result.returncode != 0:
        number = int(lines[-1]) if lines and lines[-1].isdecimal() else -1
        what = damages[number] if number >= 0 else "before the first damage"
        pytest.fail(f"the process died with {result.returncode} at {what}: {result.stderr[-2000:]}")
    outcomes = [json.loads(line) for line in lines[1::2]]
    assert len(outcomes) == len(damages)
    wrong = [(d, outcome) for d, outcome in zip(damages, outcomes, strict=True) if outcome.startswith("WRONG")]
    assert not wrong
    return outcomes


@pytest.fixture(params=BLOBS, ids="-".join)
def blob(request: pytest.FixtureRequest, make_layer: Callable[..., object]) -> np.ndarray:
    weight_type, form = request.param
    return make_layer(K, N, weight_type, form).blob  # type: ignore[attr-defined, no-any-return]


def test_an_undamaged_blob_runs(tmp_path: Path, blob: np.ndarray) -> None:
    assert _try_all(tmp_path, blob, [damage(), damage(external=True)]) == ["ran", "ran"]


def test_every_field_of_header_and_tables(tmp_path: Path, blob: np.ndarray) -> None:
    damages = list(_field_damages(blob))
    outcomes = _try_all(tmp_path, blob, damages)
    for what, outcome in zip(damages, outcomes, strict=True):
        # Nothing in the header is decoration: each field is checked. But another K or N that needs the same tiles,
        # and that the operator has too, cannot be noticed; nor can the count of a dense matrix, which nobody uses.
        if outcome == "ran":
            assert what["follow"] or (blob[59] == 2 and what["bytes"][0][0] == NNZ_OFFSET), what
        else:
            assert "'damaged'" in outcome, f"{what}: does not name the node: {outcome}"


def test_blobs_that_end_too_early(tmp_path: Path, blob: np.ndarray) -> None:
    assert all(outcome.startswith("refused") for outcome in _try_all(tmp_path, blob, list(_cut_damages(blob))))


def test_every_offset_and_many_masks(tmp_path: Path, blob: np.ndarray) -> None:
    damages = [damage(), *_offset_damages(blob)]
    outcomes = _try_all(tmp_path, blob, damages)
    assert outcomes[0] == "ran"
    for what, outcome in zip(damages[1:], outcomes[1:], strict=True):
        assert outcome.startswith("refused"), what


def test_random_flips(tmp_path: Path, blob: np.ndarray) -> None:
    outcomes = _try_all(tmp_path, blob, list(_flip_damages(blob, seed=int(blob[56]) * 2 + int(blob[59]))))
    # Both must have happened, or the flips did not reach what they are meant to reach.
    assert any(outcome == "ran" for outcome in outcomes)
    assert any(outcome.startswith("refused") for outcome in outcomes)
