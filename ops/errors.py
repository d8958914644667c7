"""The one exception of this package for input that cannot be used, and how others become it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class SparamxError(ValueError):
    """The input, an option or the environment cannot be used; the message is one sentence that names what and why."""


@contextlib.contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Makes a SparamxError of what ONNX Runtime, onnx_ir and protobuf raise within: exceptions without a common base.

    Args:
        what: What cannot be done; the first line of the exception's message, which says why, follows it.
    """
    try:
        yield
    except SparamxError:
        raise
    except Exception as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SparamxError(f"{what}: {why}") from error
