"""What a conversion does with every attention operator of a model, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from sparamx_onnx.graph_passes.plan import Action


class AttentionReason(StrEnum):
    """Why: the closed list. ``text`` is a sentence that a user can act on."""

    CONVERTED = "converted"
    PACKED = "packed"
    ALREADY_CONVERTED = "already_converted"
    NOT_ASKED_FOR = "not_asked_for"
    EXCLUDED_BY_USER = "excluded_by_user"
    UNSUPPORTED_OPERATOR = "unsupported_operator"
    UNSUPPORTED_DTYPE = "unsupported_dtype"
    UNSUPPORTED_INPUT = "unsupported_input"
    UNSUPPORTED_ATTRIBUTES = "unsupported_attributes"
    UNSUPPORTED_OUTPUT = "unsupported_output"
    UNKNOWN_SHAPE = "unknown_shape"
    MALFORMED_NODE = "malformed_node"

    @property
    def text(self) -> str:
        """The reason in words."""
        return _TEXTS[self]


_TEXTS: Mapping[AttentionReason, str] = {
    AttentionReason.CONVERTED: "Reads each key and value once for all heads that share it.",
    AttentionReason.PACKED: "Reads each key and value once for all heads that share it, from a cache that is pruned as "
    "it grows old.",
    AttentionReason.ALREADY_CONVERTED: "It is an attention operator of this package already.",
    AttentionReason.NOT_ASKED_FOR: "It can be converted: choose --attention fast or packed.",
    AttentionReason.EXCLUDED_BY_USER: "An exclude pattern matches it.",
    AttentionReason.UNSUPPORTED_OPERATOR: "This version does not convert this operator.",
    AttentionReason.UNSUPPORTED_DTYPE: "Its tensors are not float32; export the model in float32.",
    AttentionReason.UNSUPPORTED_INPUT: "It has an input that the fast operator does not take.",
    AttentionReason.UNSUPPORTED_ATTRIBUTES: "It has an attribute that the fast operator cannot express.",
    AttentionReason.UNSUPPORTED_OUTPUT: "It has an output that the fast operator does not make.",
    AttentionReason.UNKNOWN_SHAPE: "The ranks of its inputs, which decide what they mean, are not known; "
    "run ONNX's shape inference on the model first.",
    AttentionReason.MALFORMED_NODE: "The node is not valid: its inputs or attributes do not fit.",
}


@dataclass
class AttentionPlan:
    """What happens to one attention operator.

    Attributes:
        node: Name of the node.
        op_type: Its operator.
        action: What happens to it.
        reason: Why, from the closed list.
        detail: What is particular to this node; may be empty.
    """

    node: str
    op_type: str
    action: Action
    reason: AttentionReason
    detail: str = ""

    @property
    def text(self) -> str:
        """The reason in words, with the detail."""
        return f"{self.reason.text} {self.detail}".rstrip()

    def to_json(self) -> dict[str, object]:
        """The plan of the node as JSON values."""
        return {
            "node": self.node,
            "op_type": self.op_type,
            "action": self.action.value,
            "reason": self.reason.value,
            "text": self.text,
        }
