"""A model folder of onnxruntime-genai as the output of a conversion: the new decoder, and all that belongs to it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparamx_onnx.genai_config import CONFIG_NAME, GenaiConfig, read_genai_config
from sparamx_onnx.graph_passes.write import data_path
from sparamx_onnx.loading import LoadedModel, load_model
from sparamx_onnx.ops import library
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.output import check_place, commit, recover, sync


class FolderOutput:
    """Writes a folder beside another, with a converted decoder in the place of the original.

    Everything else is copied (links to files are followed; what is hidden, and links to folders, is left out), the
    operator library is put beside it, and ``genai_config.json`` names it.
    """

    def __init__(self, source: Path, target: Path) -> None:
        """Reads the configuration of ``source``.

        Args:
            source: A model folder of onnxruntime-genai.
            target: The folder to write.

        Raises:
            SparamxError: ``source`` is no such folder.
        """
        self.target = target
        self._source = source
        self._config: GenaiConfig = read_genai_config(source)

    @property
    def model(self) -> Path:
        """Where the decoder will lie."""
        return self.target / self._config.decoder

    def check(self, loaded: LoadedModel, *, force: bool) -> None:
        """Refuses a destination that cannot be written or would destroy something, before any work is done.

        Args:
            loaded: The decoder.
            force: Whether an existing folder of a model may be replaced.

        Raises:
            SparamxError: Says what is in the way.
        """
        target, source = self.target.resolve(), self._source.resolve()
        if target.is_relative_to(source) or source.is_relative_to(target):
            raise SparamxError(f"{self.target}: is, holds or lies in the folder of the input; choose another output")
        check_place(self.target)
        recover(self.target)
        if self.target.exists() or self.target.is_symlink():
            if self.target.is_symlink() or not (self.target / CONFIG_NAME).is_file():
                raise SparamxError(f"{self.target}: is no model folder (with {CONFIG_NAME}), so it is not replaced")
            if not force:
                raise SparamxError(f"{self.target}: exists already; use --force (force=True) to replace it")
        if self._config.library not in (None, library.LIBRARY_NAME):
            raise SparamxError(
                f"{self._config.path}: names the operator library {self._config.library} already, and onnxruntime-genai"
                " takes one only"
            )
        kept = {path.relative_to(self._source) for path in self._kept_files(loaded)}
        for name in (self._config.decoder, data_path(self._config.decoder)):
            if name in kept:
                raise SparamxError(
                    f"{self._source / name}: belongs to another model of the folder, but the converted decoder needs a"
                    " file of that name; convert the decoder's file instead of the folder"
                )

    def model_in(self, staging: Path) -> Path:
        """Where in a staging folder the decoder has to be written; its folder is made."""
        path = staging / self.target.name / self._config.decoder
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, staging: Path, loaded: LoadedModel) -> None:
        """Completes the folder around a decoder that has been written, and moves it into place.

        Args:
            staging: The staging folder.
            loaded: The decoder that was converted.

        Raises:
            OSError: Something cannot be copied or moved; then all is as it was.
        """
        new = staging / self.target.name
        for path in self._kept_files(loaded):
            copy = new / path.relative_to(self._source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        shutil.copyfile(library.get_library_path(), new / library.LIBRARY_NAME)
        (new / CONFIG_NAME).write_text(self._config.with_library(library.LIBRARY_NAME), encoding="utf-8")
        sync(new / self._config.decoder, data_path(new / self._config.decoder))
        commit(staging, self.target)

    def _kept_files(self, loaded: LoadedModel) -> list[Path]:
        """The files of the input folder that are copied as they are."""
        decoder = self._source / self._config.decoder
        files = list(_files(self._source))
        others = [path for path in files if path.suffix == ".onnx" and path != decoder]
        needed = {file for path in others for file in _data_files(path)}
        replaced = {Path(os.path.realpath(file)) for file in (decoder, *loaded.data_files)} - needed
        written = (self._config.path, self._source / library.LIBRARY_NAME)
        return [path for path in files if path not in written and Path(os.path.realpath(path)) not in replaced]


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder whose path below it has no hidden part; links to folders are not followed."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        elif path.is_file():
            yield path
        elif path.is_symlink() and not path.is_dir():
            raise SparamxError(f"{path}: is a link that leads nowhere")


def _data_files(model: Path) -> tuple[Path, ...]:
    """The external data of another model of the folder; nothing for one that is damaged, whose data is no loss."""
    with contextlib.suppress(SparamxError):
        return load_model(model).data_files
    return ()
