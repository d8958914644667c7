"""The operator set as data says what the C++ side reads: attributes with their defaults, words, roles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparamx_onnx.ops.definitions import SPARSE_AMX_ATTENTION, SPARSE_AMX_MATMUL, Activations, Epilogue, OpDefinition

ORT = Path(__file__).parents[2] / "cpp" / "ort"
MATMUL, ATTENTION = ((ORT / f"sparse_amx_{name}.cc").read_text() for name in ("matmul", "attention"))
KINDS = {"Int": int, "Float": float, "String": str, "Ints": tuple[int, ...]}
READ = re.compile(r'(Int|Float|String|Ints)Attribute\(info, "(\w+)"(?:, ([^)]+))?\)')
TYPES = {"FLOAT": "float32", "UINT8": "uint8", "INT32": "int32", "INT64": "int64"}


def default(kind: str, text: str) -> object:
    if kind == "Ints":
        return ()
    if not text:
        return None
    return text.strip('"') if kind == "String" else KINDS[kind](text.rstrip("f"))


@pytest.mark.parametrize(
    ("definition", "source"),
    [(SPARSE_AMX_MATMUL, MATMUL), (SPARSE_AMX_ATTENTION, ATTENTION)],
    ids=["MatMul", "Attention"],
)
def test_attributes_and_their_defaults(definition: OpDefinition, source: str) -> None:
    read = {name: (KINDS[kind], default(kind, text)) for kind, name, text in READ.findall(source)}
    assert read == {attribute.name: (attribute.kind, attribute.default) for attribute in definition.attributes}
    assert f'"{definition.name}"' in source
    assert all(attribute.doc for attribute in definition.attributes)


@pytest.mark.parametrize(("array", "words"), [("kEpilogueNames", Epilogue), ("kActivationsNames", Activations)])
def test_words(array: str, words: type[Epilogue] | type[Activations]) -> None:
    (listed,) = re.findall(array + r"\[\w+\] = \{([^}]+)\}", MATMUL)
    assert re.findall(r'"(\w+)"', listed) == [word.value for word in words if word.value != "auto"]


def test_roles() -> None:
    rules = re.findall(r'\{"(\w+)", ONNX_TENSOR_ELEMENT_DATA_TYPE_(\w+)\}', ATTENTION)
    ports = {port.name: port.element_type for port in SPARSE_AMX_ATTENTION.inputs if port.role}
    assert {name: TYPES[kind] for name, kind in rules} == ports | {"attention_bias": "float32"}  # or bool
