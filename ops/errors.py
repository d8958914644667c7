"""The one exception of this package for input that cannot be used."""

from __future__ import annotations


class SparamxError(ValueError):
    """The input, an option or the environment cannot be used; the message is one sentence that names what and why."""
