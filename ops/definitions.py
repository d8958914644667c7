"""The operator set as data: what the graph passes write, the C++ side implements and the documentation describes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

DOMAIN: Final = "com.sparamx"
DOMAIN_VERSION: Final = 1


class Epilogue(StrEnum):
    """What is applied to ``X W + B``."""

    NONE = "none"
    RELU = "relu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SILU = "silu"


class Activations(StrEnum):
    """The precision in which X enters the products."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


@dataclass(frozen=True)
class Port:
    """An input or an output of an operator."""

    name: str
    element_type: str
    shape: str
    doc: str
    optional: bool = False
    constant: bool = False
    variadic: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute of an operator; ``default`` is None where it is required. A tuple is a list of integers."""

    name: str
    kind: type[int] | type[str] | type[tuple[int, ...]]
    doc: str
    default: int | str | tuple[int, ...] | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpDefinition:
    """The schema of one operator."""

    name: str
    domain: str
    since_version: int
    doc: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]


SPARSE_AMX_MATMUL: Final = OpDefinition(
    name="SparseAMXMatMul",
    domain=DOMAIN,
    since_version=1,
    doc="Y = epilogue(X W + B), with W packed as docs/format.md describes. With splits, Y is cut along its last "
    "dimension into several outputs.",
    inputs=(
        Port("X", "float32", "[..., K]", "The activations."),
        Port("W", "uint8", "[bytes]", "The packed weight matrix.", constant=True),
        Port("B", "float32", "[N]", "The bias, one per output.", optional=True),
    ),
    outputs=(
        Port(
            "Y",
            "float32",
            "[..., N]",
            "The leading dimensions are those of X. With splits, one output for each of them, which is its last "
            "dimension.",
            variadic=True,
        ),
    ),
    attributes=(
        Attribute("K", int, "Rows of W: the last dimension of X."),
        Attribute("N", int, "Columns of W: the last dimension of Y."),
        Attribute(
            "splits",
            tuple[int, ...],
            "The last dimensions of the outputs, N together. All but the last are multiples of 16. Empty: one output.",
            default=(),
        ),
        Attribute(
            "epilogue",
            str,
            "The activation function applied to X W + B; gelu is the exact one (erf). One for all outputs, or one for "
            "each of them, separated by commas.",
            default=Epilogue.NONE.value,
            choices=tuple(epilogue.value for epilogue in Epilogue),
        ),
        Attribute(
            "activations",
            str,
            "The precision in which X enters the products; auto takes fp32 for fp32 weights, bf16 for bf16 weights and "
            "int8 (one scale per row, or per row and group) for int8 and int4 weights. fp32 weights take fp32 alone, "
            "bf16 weights bf16 and fp32, int8 and int4 weights int8 alone.",
            default=Activations.AUTO.value,
            choices=tuple(activations.value for activations in Activations),
        ),
    ),
)
