"""Model folders of onnxruntime-genai: read, converted whole or not at all, and never over something that matters."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import sparamx_onnx
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.library import LIBRARY_NAME

Mlp = Callable[..., onnx.ModelProto]
Save = Callable[..., Path]
Tree = Callable[[Path], dict[str, bytes]]
Command = Callable[..., subprocess.CompletedProcess[str]]

CONFIG: dict[str, Any] = {
    "model": {
        "type": "llama",
        "decoder": {"session_options": {"log_id": "id"}, "filename": "model.onnx", "head_size": 8},
        "bos_token_id": 1,
    },
    "search": {"max_length": 20, "note": "größer"},
}


def write_config(folder: Path, **decoder: object) -> None:
    content = json.loads(json.dumps(CONFIG))
    content["model"]["decoder"] |= decoder
    (folder / "genai_config.json").write_text(json.dumps(content, ensure_ascii=False))


@pytest.fixture
def folder(tmp_path: Path, mlp: Mlp, save: Save) -> Path:
    """A folder with a decoder (any model will do), its data, a tokenizer, and what should stay behind."""
    path = tmp_path / "model"
    path.mkdir()
    save(mlp(), path / "model.onnx", external="model.onnx.data")
    write_config(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "extra").mkdir()
    (path / "extra" / "chat_template.jinja").write_text("template")
    (path / ".cache").mkdir()
    (path / ".cache" / "lock").write_text("")
    return path


def test_a_folder_becomes_one_that_has_everything(folder: Path, command: Command, tree: Tree) -> None:
    before = tree(folder)
    done = command("convert", folder, "--json")
    assert done.returncode == 0, done.stderr
    output = folder.with_name("model.sparse")
    result = json.loads(done.stdout)
    assert (result["output"], result["data"]) == (str(output), str(output / "model.onnx.data"))
    assert tree(folder) == before
    after = tree(output)
    copied = {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "extra/chat_template.jinja"}
    assert set(after) == copied | {LIBRARY_NAME}
    assert after[LIBRARY_NAME] == Path(sparamx_onnx.get_library_path()).read_bytes()
    wanted = json.loads(json.dumps(CONFIG))
    wanted["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY_NAME
    assert json.loads(after["genai_config.json"]) == wanted
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "model.sparse"]
    assert sparamx_onnx.verify(folder, output).passed


def test_the_text_names_the_folder(folder: Path, command: Command) -> None:
    done = command("convert", folder, "-o", folder.with_name("out"))
    assert f"Wrote {folder.with_name('out')} in " in done.stdout


def test_a_converted_folder_is_done_and_stays(folder: Path, tmp_path: Path, tree: Tree) -> None:
    output = Path(sparamx_onnx.convert(folder).output or "")
    before = tree(tmp_path)
    again = sparamx_onnx.convert(output)
    assert (again.written, again.already_converted, again.output) == (False, True, None)
    assert tree(tmp_path) == before


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, tree: Tree) -> None:
    before = tree(tmp_path)
    assert sparamx_onnx.convert(folder, dry_run=True).output == str(tmp_path / "model.sparse")
    assert tree(tmp_path) == before


def test_other_commands_take_a_folder_for_its_decoder(folder: Path) -> None:
    assert len(sparamx_onnx.inspect(folder).plan.converted) == 2
    assert sparamx_onnx.bench(folder, rounds=1).timings[0].model == str(folder / "model.onnx")


def test_a_decoder_below_the_folder(folder: Path, tree: Tree) -> None:
    (folder / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.move(folder / name, folder / "onnx" / name)
    write_config(folder, filename="onnx/model.onnx")
    output = Path(sparamx_onnx.convert(folder).output or "")
    assert {"onnx/model.onnx", "onnx/model.onnx.data", LIBRARY_NAME} < set(tree(output))
    assert "model.onnx" not in tree(output)


def test_links_are_followed_as_in_the_cache_of_a_hub(folder: Path, tmp_path: Path, tree: Tree) -> None:
    expected = tree(Path(sparamx_onnx.convert(folder).output or ""))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(Path("..") / "blobs" / name)
    folder.rename(snapshot)
    # The data lies beside the model file that the link leads to, as its location demands.
    output = Path(sparamx_onnx.convert(snapshot).output or "")
    assert tree(output) == expected
    assert not any(path.is_symlink() for path in output.rglob("*"))


def test_another_model_keeps_its_files(folder: Path, mlp: Mlp, save: Save, tree: Tree) -> None:
    save(mlp(seed=1), folder / "embedding.onnx", external="embedding.bin")
    before = tree(folder)
    after = tree(Path(sparamx_onnx.convert(folder).output or ""))
    for name in ("embedding.onnx", "embedding.bin"):
        assert after[name] == before[name]


def test_data_of_another_model_is_not_overwritten(folder: Path, tmp_path: Path, tree: Tree) -> None:
    shutil.copy(folder / "model.onnx", folder / "vision.onnx")  # the same data file
    before = tree(tmp_path)
    with pytest.raises(SparamxError, match=r"model\.onnx\.data: belongs to another model"):
        sparamx_onnx.convert(folder)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", r"has no model\.decoder"),
        ('{"model": {"decoder": 3}}', r"has no model\.decoder"),
        ('{"model": {"decoder": {}}}', "its decoder has no filename"),
        ('{"model": {"decoder": {"filename": "/etc/passwd"}}}', "lies outside of the folder"),
        ('{"model": {"decoder": {"filename": "../model.onnx"}}}', "lies outside of the folder"),
        ('{"model": {"decoder": {"pipeline": [{"a": {"filename": "model.onnx"}}]}}}', "a pipeline of several models"),
        (
            '{"model": {"decoder": {"filename": "model.onnx", "session_options": []}}}',
            "session_options .* is no object",
        ),
        ('{"model": {"decoder": {"filename": "missing.onnx"}}}', r"missing\.onnx: cannot be read"),
        (
            '{"model": {"decoder": {"filename": "model.onnx", "session_options": {"custom_ops_library": "a.so"}}}}',
            r"names the operator library a\.so already",
        ),
    ],
)
def test_configurations_that_cannot_be_used(folder: Path, tmp_path: Path, tree: Tree, text: str, message: str) -> None:
    (folder / "genai_config.json").write_text(text)
    before = tree(tmp_path)
    with pytest.raises(SparamxError, match=message):
        sparamx_onnx.convert(folder)
    assert tree(tmp_path) == before


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(SparamxError, match=r"is a folder without genai_config\.json; name the \.onnx file in it"):
        sparamx_onnx.convert(tmp_path)


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_the_input_is_never_overwritten(folder: Path, tmp_path: Path, tree: Tree, where: str) -> None:
    before = tree(tmp_path)
    with pytest.raises(SparamxError, match="is, holds or lies in the folder of the input"):
        sparamx_onnx.convert(folder, folder / where, force=True)
    assert tree(tmp_path) == before


def test_an_existing_folder_is_replaced_only_if_it_is_a_model_and_by_force(
    folder: Path, tmp_path: Path, tree: Tree
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("precious")
    for force in (False, True):
        with pytest.raises(SparamxError, match="is no model folder"):
            sparamx_onnx.convert(folder, output, force=force)
    write_config(output)
    with pytest.raises(SparamxError, match="exists already; use --force"):
        sparamx_onnx.convert(folder, output)
    assert set(tree(output)) == {"precious", "genai_config.json"}
    sparamx_onnx.convert(folder, output, force=True)
    assert "precious" not in tree(output)
    assert sparamx_onnx.inspect(output).record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_what_is_replaced_comes_back_if_the_new_one_cannot_take_its_place(
    folder: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    write_config(output)
    before = tree(tmp_path)
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target == output and ".replaced" not in self.parts:
            raise OSError("no")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(SparamxError, match="out: cannot be written: no"):
        sparamx_onnx.convert(folder, output, force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [".", "..", "folder/.."])
def test_a_folder_needs_a_name(folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SparamxError, match=r"^\S+: is no name for an output$|is, holds or lies in the folder"):
        sparamx_onnx.convert(folder, name, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "model"]


def test_a_failure_leaves_nothing(folder: Path, tmp_path: Path, tree: Tree) -> None:
    (folder / "dangling").symlink_to("nowhere")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SparamxError, match="dangling: is a link that leads nowhere"):
        sparamx_onnx.convert(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
