"""The file that tells onnxruntime-genai what lies in a model's folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sparamx_onnx.ops.errors import SparamxError

CONFIG_NAME = "genai_config.json"
_LIBRARY = "custom_ops_library"


@dataclasses.dataclass(frozen=True)
class GenaiConfig:
    """What ``genai_config.json`` says.

    Attributes:
        path: The file.
        content: All of it.
        decoder: Where the decoder's model lies, relative to the file's folder.
    """

    path: Path
    content: dict[str, Any]
    decoder: Path

    @property
    def library(self) -> str | None:
        """The operator library that the decoder is run with; onnxruntime-genai takes one at most."""
        options = self.content["model"]["decoder"].get("session_options")
        return options.get(_LIBRARY) or None if isinstance(options, dict) else None

    def with_library(self, name: str) -> str:
        """The file's text with another operator library; nothing else is changed."""
        content: dict[str, Any] = json.loads(json.dumps(self.content))
        decoder = content["model"]["decoder"]
        decoder["session_options"] = {**(decoder.get("session_options") or {}), _LIBRARY: name}
        return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


def model_file(path: Path) -> Path:
    """The ONNX file that a path stands for: the decoder of a model folder of onnxruntime-genai, or the file itself.

    Raises:
        SparamxError: It is another kind of folder.
    """
    return path / read_genai_config(path).decoder if path.is_dir() else path


def read_genai_config(folder: Path) -> GenaiConfig:
    """Reads the configuration of a model folder of onnxruntime-genai.

    Args:
        folder: The folder.

    Raises:
        SparamxError: It is no such folder, or its configuration names no decoder that is one file below the folder.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise SparamxError(
            f"{folder}: is a folder without {CONFIG_NAME}; name the .onnx file in it, or a folder of onnxruntime-genai"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SparamxError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise SparamxError(f"{path}: not valid JSON: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(decoder, dict):
        raise SparamxError(f"{path}: has no model.decoder")
    if decoder.get("pipeline"):
        raise SparamxError(f"{path}: its decoder is a pipeline of several models; convert each of them by its name")
    name = decoder.get("filename")
    if not isinstance(name, str) or not name:
        raise SparamxError(f"{path}: its decoder has no filename")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise SparamxError(f"{path}: its decoder lies outside of the folder: {name}")
    if not isinstance(decoder.get("session_options", {}), dict | None):
        raise SparamxError(f"{path}: session_options of its decoder is no object")
    return GenaiConfig(path, content, Path(name))
