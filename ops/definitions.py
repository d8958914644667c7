"""The operator set as data: what the graph passes write, the C++ side implements and the documentation describes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

DOMAIN: Final = "com.sparamx"
DOMAIN_VERSION: Final = 1

SPLIT_MULTIPLE: Final = 16
"""All outputs of a SparseAMXMatMul but the last have a multiple of so many columns."""


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
    """An input or an output of an operator.

    Attributes:
        name: Its name.
        element_type: The types of its elements, in words.
        shape: Its shape, in words.
        doc: What it is.
        optional: Whether a node may leave it out.
        constant: Whether it should be a constant, which is read once, when the session is created.
        variadic: Whether it stands for one or more, the last ones.
        role: Whether it is one of the last inputs, whose order the attribute ``roles`` tells.
    """

    name: str
    element_type: str
    shape: str
    doc: str
    optional: bool = False
    constant: bool = False
    variadic: bool = False
    role: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute of an operator.

    Attributes:
        name: Its name.
        kind: Its type; a tuple is a list of integers.
        doc: What it means.
        default: What an absent one means; None where it is required.
        choices: The values that it may have; empty where there is no such list.
    """

    name: str
    kind: type[int] | type[float] | type[str] | type[tuple[int, ...]]
    doc: str
    default: int | float | str | tuple[int, ...] | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpDefinition:
    """The schema of one operator.

    Attributes:
        name: Its name.
        domain: Its domain.
        since_version: The version of the domain in which it came.
        doc: What it computes.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        attributes: Its attributes.
    """

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
        Port("X", "float32 or float16", "[..., K]", "The activations."),
        Port("W", "uint8", "[bytes]", "The packed weight matrix.", constant=True),
        Port("B", "as X", "[N]", "The bias, one per output.", optional=True),
    ),
    outputs=(
        Port(
            "Y",
            "as X",
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

_TOKENS: Final = "[batch, tokens, heads * size] or [batch, heads, tokens, size]"
_CACHE: Final = "[batch, kv heads, capacity, size]"
_ROWS: Final = "[batch, kv heads, bytes]"

SPARSE_AMX_ATTENTION: Final = OpDefinition(
    name="SparseAMXAttention",
    domain=DOMAIN,
    since_version=1,
    doc="Attention of grouped heads over a cache, as docs/attention.md describes.",
    inputs=(
        Port(
            "query",
            "float32",
            _TOKENS,
            "The queries; without key and value, all three side by side, in whole or, as [batch, tokens, heads, 3, "
            "size], at each head.",
        ),
        Port(
            "key",
            "float32",
            _TOKENS,
            "The new keys; without value, both side by side at each head: [batch, tokens, heads, 2, size].",
            optional=True,
            role=True,
        ),
        Port("value", "float32", _TOKENS, "The new values.", optional=True, role=True),
        Port("past_key", "float32", _CACHE, "The keys before this call.", optional=True, role=True),
        Port("past_value", "float32", _CACHE, "The values before this call.", optional=True, role=True),
        Port("past_cache", "uint8", _ROWS, "The packed cache before this call.", optional=True, role=True),
        Port(
            "seqlens_k", "int32", "[batch]", "Keys of each entry, new ones included, minus 1.", optional=True, role=True
        ),
        Port("total_sequence_length", "int32", "[]", "Keys of the longest entry.", optional=True, role=True),
        Port("cos_cache", "float32", "[positions, half]", "Rotary cosines.", optional=True, role=True),
        Port("sin_cache", "float32", "[positions, half]", "Rotary sines.", optional=True, role=True),
        Port("position_ids", "int64", "[batch, tokens]", "Rotary positions.", optional=True, role=True),
        Port(
            "attention_bias",
            "float32 or bool",
            "[batch, heads, tokens, total], all but the last may be 1 or, in the front, missing",
            "Added to the scores after the softcap; as bool, false hides a key.",
            optional=True,
            role=True,
        ),
        Port(
            "key_padding_mask",
            "int32",
            "[batch, total], [batch, tokens, total] or [batch]",
            "Zero hides a key; with one dimension, how many keys count.",
            optional=True,
            role=True,
        ),
        Port("head_sink", "float32", "[heads]", "One more score per query, without a value.", optional=True, role=True),
        Port(
            "nonpad_kv_seqlen",
            "int64",
            "[batch]",
            "How many of the keys count, the last of them those of the queries; without a past.",
            optional=True,
            role=True,
        ),
    ),
    outputs=(
        Port("output", "float32", _TOKENS, "The result."),
        Port("present_key", "float32", _CACHE, "The keys after this call; may be past_key's memory.", optional=True),
        Port("present_value", "float32", _CACHE, "The values after this call; likewise.", optional=True),
        Port("present_cache", "uint8", _ROWS, "The packed cache after this call; likewise.", optional=True),
    ),
    attributes=(
        Attribute("num_heads", int, "Heads of the query."),
        Attribute("kv_num_heads", int, "Heads of key and value; a divisor of num_heads."),
        Attribute(
            "roles",
            str,
            "The names of the inputs after the query, in their order, with commas between them.",
            default="",
        ),
        Attribute("scale", float, "Factor of the scores; 0 takes one over the root of the head's size.", default=0.0),
        Attribute("softcap", float, "Scores become softcap * tanh(score / softcap); 0 leaves them.", default=0.0),
        Attribute("local_window_size", int, "Keys that a query sees, its own included; -1: all.", default=-1),
        Attribute("causal", int, "Whether a query sees no later key than its own.", default=1),
        Attribute("rotary_interleaved", int, "Whether rotary pairs stand side by side.", default=0),
        Attribute("smooth_softmax", int, "One more score, 0, for every query.", default=0),
        Attribute("mask_filter_value", float, "What key_padding_mask adds to a hidden key's scores.", default=-10000.0),
        Attribute(
            "cache",
            str,
            "float: past_key, past_value, present_key, present_value. packed: past_cache and present_cache.",
            default="float",
            choices=("float", "packed"),
        ),
        Attribute("k_sparsity", float, "The part of a packed block of keys that is pruned, below 1.", default=0.0),
        Attribute("v_sparsity", float, "The part of a packed block of values that is pruned, below 1.", default=0.0),
        Attribute("sink", int, "First tokens that a packed cache never prunes, in whole blocks.", default=0),
        Attribute("recent", int, "Last tokens that a packed cache has not pruned yet.", default=0),
    ),
)
