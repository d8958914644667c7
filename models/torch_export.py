"""One call of torch's dynamo exporter, without its chatter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch

# Opset 23 brings RotaryEmbedding, which fails at batch > 1 in ONNX Runtime 1.31.1; 20 suits every supported version.
DEFAULT_OPSET = 20


def export(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int = DEFAULT_OPSET,
) -> ir.Model:
    """Exports `module`, called with the positional `arguments`, to an ONNX model in memory.

    `dynamic_shapes` mirrors `arguments`: per tensor a dict from axis to the name of a symbolic dimension.
    `input_names` and `output_names` name the flattened tensors.
    """
    with quiet():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _forget_stack_traces(program.model)
    return program.model


def _forget_stack_traces(model: ir.Model) -> None:
    """Removes what differs from machine to machine and from run to run: paths and numbers of generated code."""
    for node in model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about absent packages and its own internals off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
