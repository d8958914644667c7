"""Reads attributes of nodes. One of another type than the operator's is an error that names the node.

Each function takes a node, the attribute's name and what stands for an absent one, and raises MalformedAttributeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import onnx_ir as ir

from sparamx_onnx.ops.errors import SparamxError

_Value = TypeVar("_Value")
_Int = TypeVar("_Int", int, None)
_Float = TypeVar("_Float", float, None)


class MalformedAttributeError(SparamxError):
    """An attribute has another type than its operator's."""


def int_attribute(node: ir.Node, name: str, default: _Int) -> int | _Int:
    """An integer."""
    return _read(node, name, ir.Attr.as_int, default)


def ints_attribute(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Integers."""
    return _read(node, name, lambda attribute: tuple(attribute.as_ints()), default)


def float_attribute(node: ir.Node, name: str, default: _Float) -> float | _Float:
    """A floating-point number."""
    return _read(node, name, ir.Attr.as_float, default)


def string_attribute(node: ir.Node, name: str, default: str) -> str:
    """A string."""
    return _read(node, name, ir.Attr.as_string, default)


def _read(node: ir.Node, name: str, read: Callable[[ir.Attr], _Value], default: _Value) -> _Value:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    try:
        return read(attribute)
    except TypeError as error:
        what = f"The attribute '{name}' of the {node.op_type} node '{node.name}'"
        message = f"{what} is of type {attribute.type.name}, which its operator does not take."
        raise MalformedAttributeError(message) from error
