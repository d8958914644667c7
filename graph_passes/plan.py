"""What a conversion does with every MatMul, Gemm and relative of a model, and why (attention: attention_plan.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from sparamx_onnx.ops.packing import Form

if TYPE_CHECKING:
    from sparamx_onnx.graph_passes.attention_plan import AttentionPlan


class Action(StrEnum):
    """What happens to a node."""

    CONVERTED = "converted"
    PACKED_DENSE = "packed_dense"
    LEFT_ALONE = "left_alone"


class Explained(StrEnum):
    """Values that have a sentence each, which a user can act on: ``text``."""

    _value_: str
    text: str

    def __new__(cls, value: str, text: str) -> Self:
        """A member with its value and its sentence."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.text = text
        return member


class Reason(Explained):
    """Why: the closed list. ``text`` is a sentence that a user can act on."""

    CONVERTED = ("converted", "Packed sparse.")
    PACKED_DENSE = (
        "packed_dense",
        "Packed dense: it has too few zeros for the sparse form to be smaller; prune it to gain more.",
    )
    ALREADY_CONVERTED = ("already_converted", "It is a sparse operator already.")
    TWO_ACTIVATIONS = (
        "two_activations",
        "Both inputs are computed at run time (as in attention), so there is no weight to pack.",
    )
    WEIGHT_CHOSEN_AT_RUN_TIME = (
        "weight_chosen_at_run_time",
        "The weight is one of several that the graph picks from at run time; export one product for each expert.",
    )
    WEIGHT_NOT_CONSTANT = (
        "weight_not_constant",
        "The weight is computed in the graph; fold constants before converting "
        "(onnxruntime's basic optimizations, or onnxsim).",
    )
    WEIGHT_IS_GRAPH_INPUT = (
        "weight_is_graph_input",
        "The weight is also a graph input, so a caller may replace it; remove it from the graph inputs if nobody does.",
    )
    WEIGHT_ON_LEFT = ("weight_on_left", "The constant is the left input; only weights on the right are supported.")
    WEIGHT_NOT_2D = (
        "weight_not_2d",
        "The weight does not have two dimensions; where it stacks experts, export one product for each.",
    )
    EMPTY_WEIGHT = ("empty_weight", "The weight has no elements.")
    CONSTANT_EXPRESSION = (
        "constant_expression",
        "Both inputs are constants; ONNX Runtime computes the product once, when it loads.",
    )
    MALFORMED_NODE = (
        "malformed_node",
        "The node is not valid ONNX: its inputs, shapes or attributes do not fit; export the model again.",
    )
    QUANTIZED_WEIGHT = (
        "quantized_weight",
        "The weight is quantized in a way that packed int8 and int4 weights cannot hold exactly; "
        "convert the model from before its quantization, or choose --weights yourself.",
    )
    STATIC_ACTIVATIONS = (
        "static_activations",
        "The activations are quantized with a scale that was chosen beforehand, which int8 and "
        "int4 weights, whose activations are quantized anew, would not keep; --weights fp32 or bf16 does.",
    )
    UNSUPPORTED_OPERATOR = ("unsupported_operator", "This version does not convert this operator.")
    UNSUPPORTED_DTYPE = (
        "unsupported_dtype",
        "The activations are of a type that the sparse operator does not take; export the model in float32 or float16.",
    )
    UNSUPPORTED_ATTRIBUTES = (
        "unsupported_attributes",
        "The node has attributes that the sparse operator cannot express.",
    )
    UNSUPPORTED_BIAS = (
        "unsupported_bias",
        "Its own bias is not a constant vector with one element per output; export it as an Add behind the product.",
    )
    IN_SUBGRAPH = (
        "in_subgraph",
        "The node is in the body of an If, Loop or Scan, which in IR versions below 4 cannot hold a "
        "packed weight; convert the model to a newer IR version before.",
    )
    IN_FUNCTION = (
        "in_function",
        "The node is in a model-local function that cannot be inlined; export the model without it.",
    )
    EXCLUDED_BY_USER = ("excluded_by_user", "An exclude pattern matches it.")
    NOT_INCLUDED_BY_USER = ("not_included_by_user", "No include pattern matches it.")


@dataclass
class NodePlan:
    """What happens to one node. Sizes that need the weight's values are None until the weight has been read.

    Attributes:
        node: Name of the node.
        op_type: Its operator, with the domain in front if it is not ONNX's own.
        action: What happens to it.
        reason: Why, from the closed list.
        detail: What is particular to this node, e.g. the operator that computes its weight; may be empty.
        scope: The module that it came from, where the exporter recorded it.
        graph: Name of the If, Loop or Scan node, or of the function, whose body holds it; None in the main graph.
        weight: Name of the weight as it stands in the input model.
        packed: Name of the packed initializer; several nodes may share one.
        fused: Name of the sparse operator that computes this layer together with its siblings; None where it has an
            operator of its own, which keeps the node's name.
        weight_type: Type of the packed weights.
        group_size: Weights along K that share a scale; None for types other than int4.
        form: Form of the packed weight, ``sparse`` or ``dense``; None until it is known.
        k: Rows of the weight (the node's inputs), None if unknown.
        n: Columns of the weight (the node's outputs), None if unknown.
        nnz_before: Weights of the input model that are not zero; None until the weight has been read.
        nnz: Packed weights that are not zero; before writing a pruned model, what pruning will leave at most.
        estimated: Whether non-zeros and packed size are those of a sample, enlarged.
        bytes_before: Size of the weight in the input model, its scales included.
        bytes_after: Size of the packed weight; of a fused layer, of its own part, as it would be alone.
        bias: Whether a bias is computed in the node, its own or an absorbed Add.
        epilogue: The activation function that is computed in the node.
        absorbed: Names of the other nodes that the sparse operator replaces.
        pruned: Whether the chosen method prunes this weight.
        prune_note: Why a weight is not pruned although the method prunes; empty otherwise.
        error: How far calibrated pruning has moved the layer's result on calibration inputs, as a ratio of Euclidean
            norms (the activation function left aside); None where nothing was calibrated.
        keeps_dense: Whether the dense weight stays in the model, because something else uses it.
        keeps_codes: Whether the weight was quantized already and keeps its codes and scales.
        shared: Name of the first packed initializer with the same bytes in the file.
    """

    node: str
    op_type: str
    action: Action
    reason: Reason
    detail: str = ""
    scope: str | None = None
    graph: str | None = None
    weight: str | None = None
    packed: str | None = None
    fused: str | None = None
    weight_type: str | None = None
    group_size: int | None = None
    form: str | None = None
    k: int | None = None
    n: int | None = None
    nnz_before: int | None = None
    nnz: int | None = None
    estimated: bool = False
    bytes_before: int | None = None
    bytes_after: int | None = None
    bias: bool = False
    epilogue: str = "none"
    absorbed: tuple[str, ...] = ()
    pruned: bool = False
    prune_note: str = ""
    error: float | None = None
    keeps_dense: bool = False
    keeps_codes: bool = False
    shared: str | None = None

    @property
    def sparsity(self) -> float | None:
        """The share of zeros in the packed weight, from 0 to 1; None while it is unknown."""
        return _share_of_zeros([(self, self.nnz)])

    @property
    def sparsity_before(self) -> float | None:
        """The share of zeros in the weight of the input model, from 0 to 1; None while it is unknown."""
        return _share_of_zeros([(self, self.nnz_before)])

    @property
    def label(self) -> str:
        """The name by which people know it: the module's, or else the node's or the weight's."""
        return self.scope or self.node or self.weight or "?"

    @property
    def text(self) -> str:
        """The reason in words, with the detail."""
        return f"{self.reason.text} {self.detail}".rstrip()

    def packed_as(self, form: Form) -> None:
        """Notes the form that a weight takes which is converted."""
        self.form = form.value
        self.action = Action.PACKED_DENSE if form is Form.DENSE else Action.CONVERTED
        self.reason = Reason.PACKED_DENSE if form is Form.DENSE else Reason.CONVERTED

    def to_json(self) -> dict[str, object]:
        """The plan of the node as JSON values."""
        return {
            "node": self.node,
            "op_type": self.op_type,
            "scope": self.scope,
            "graph": self.graph,
            "action": self.action.value,
            "reason": self.reason.value,
            "text": self.text,
            "weight": self.weight,
            "packed": self.packed,
            "fused": self.fused,
            "weight_type": self.weight_type,
            "group_size": self.group_size,
            "form": self.form,
            "k": self.k,
            "n": self.n,
            "nnz": self.nnz,
            "sparsity_before": self.sparsity_before,
            "sparsity": self.sparsity,
            "estimated": self.estimated,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bias": self.bias,
            "epilogue": self.epilogue,
            "absorbed": list(self.absorbed),
            "pruned": self.pruned,
            "prune_note": self.prune_note,
            "error": self.error,
            "keeps_dense": self.keeps_dense,
            "keeps_codes": self.keeps_codes,
        }


@dataclass
class Plan:
    """The plans of all nodes, in graph order, the options that made them, and the plans of attention operators."""

    nodes: list[NodePlan] = field(default_factory=list)
    options: dict[str, object] = field(default_factory=dict)
    attention: list[AttentionPlan] = field(default_factory=list)

    def __iter__(self) -> Iterator[NodePlan]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def converted(self) -> list[NodePlan]:
        """The nodes that become sparse operators, packed sparse or dense."""
        return [node for node in self.nodes if node.action is not Action.LEFT_ALONE]

    @property
    def converted_attention(self) -> list[AttentionPlan]:
        """The attention operators that are replaced."""
        return [node for node in self.attention if node.action is not Action.LEFT_ALONE]

    @property
    def replaces_attention(self) -> bool:
        """Whether the options ask for attention to be replaced."""
        return self.options.get("attention", "keep") != "keep"

    @property
    def no_attention(self) -> str:
        """A sentence that says so where attention is to be replaced and the model has none; empty elsewhere."""
        if self.attention or not self.replaces_attention:
            return ""
        return f"There is no attention that --attention {self.options['attention']} could replace."

    @property
    def changes(self) -> bool:
        """Whether anything is converted."""
        return bool(self.converted or self.converted_attention)

    @property
    def is_calibrated(self) -> bool:
        """Whether layers were pruned by calibration, so that they have errors."""
        return any(node.error is not None for node in self.nodes)

    @property
    def left_alone(self) -> list[NodePlan]:
        """The nodes that stay as they are."""
        return [node for node in self.nodes if node.action is Action.LEFT_ALONE]

    @property
    def already_converted(self) -> list[NodePlan]:
        """The nodes that are sparse operators in the input model."""
        return [node for node in self.nodes if node.reason is Reason.ALREADY_CONVERTED]

    @property
    def unconverted(self) -> list[NodePlan]:
        """The nodes that stay what ONNX Runtime itself multiplies."""
        return [node for node in self.left_alone if node.reason is not Reason.ALREADY_CONVERTED]

    @property
    def reasons(self) -> dict[Reason, int]:
        """How many nodes have each reason, in the order of the list of reasons; absent reasons are left out."""
        counts = Counter(node.reason for node in self.nodes)
        return {reason: counts[reason] for reason in Reason if counts[reason]}

    @property
    def bytes_before(self) -> int:
        """Size of the weights of the converted nodes in the input model, a shared one counted once."""
        return sum({node.weight: node.bytes_before or 0 for node in self.converted}.values())

    @property
    def bytes_after(self) -> int | None:
        """Size of the packed weights, a shared one counted once; None while one is unknown."""
        sizes = {node.shared or node.packed: node.bytes_after for node in self.converted}
        known = [size for size in sizes.values() if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    @property
    def sparsity(self) -> float | None:
        """The share of zeros in the packed weights of the converted nodes together; None while one is unknown."""
        return _share_of_zeros([(node, node.nnz) for node in self.converted])

    @property
    def sparsity_before(self) -> float | None:
        """The share of zeros in the weights of the converted nodes in the input model, likewise."""
        return _share_of_zeros([(node, node.nnz_before) for node in self.converted])

    def to_json(self) -> dict[str, object]:
        """The whole plan as JSON values (for ``json.dumps``)."""
        return {
            "options": dict(self.options),
            "summary": {
                "nodes": len(self.nodes),
                "converted": len(self.converted),
                "left_alone": len(self.left_alone),
                "reasons": {reason.value: count for reason, count in self.reasons.items()},
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
                "attention_converted": len(self.converted_attention),
            },
            "nodes": [node.to_json() for node in self.nodes],
            "attention": [node.to_json() for node in self.attention],
        }


def _share_of_zeros(weights: Iterable[tuple[NodePlan, int | None]]) -> float | None:
    """The share of zeros in weights together, each with its number of non-zeros; None where one is unknown."""
    total = nonzero = 0
    for node, nnz in weights:
        if node.k is None or node.n is None or nnz is None:
            return None
        total += node.k * node.n
        nonzero += nnz
    return 1.0 - nonzero / total if total else None
