"""What a conversion does with every attention operator of a model, and why."""

from __future__ import annotations

from dataclasses import dataclass

from sparamx_onnx.graph_passes.plan import Action, Explained


class AttentionReason(Explained):
    """Why: the closed list. ``text`` is a sentence that a user can act on."""

    CONVERTED = ("converted", "Reads each key and value once for all heads that share it.")
    PACKED = (
        "packed",
        "Reads each key and value once for all heads that share it, from a cache that is pruned as it grows old.",
    )
    ALREADY_CONVERTED = ("already_converted", "It is an attention operator of this package already.")
    NOT_ASKED_FOR = ("not_asked_for", "It can be converted: choose --attention fast or packed.")
    EXCLUDED_BY_USER = ("excluded_by_user", "An exclude pattern matches it.")
    UNSUPPORTED_OPERATOR = ("unsupported_operator", "This version does not convert this operator.")
    UNSUPPORTED_DTYPE = ("unsupported_dtype", "Its tensors are not float32; export the model in float32.")
    UNSUPPORTED_INPUT = ("unsupported_input", "It has an input that the fast operator does not take.")
    UNSUPPORTED_ATTRIBUTES = ("unsupported_attributes", "It has an attribute that the fast operator cannot express.")
    UNSUPPORTED_OUTPUT = ("unsupported_output", "It has an output that the fast operator does not make.")
    UNKNOWN_SHAPE = (
        "unknown_shape",
        "The ranks of its inputs, which decide what they mean, are not known; "
        "run ONNX's shape inference on the model first.",
    )
    MALFORMED_NODE = ("malformed_node", "The node is not valid: its inputs or attributes do not fit.")


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
