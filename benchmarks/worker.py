"""The side of a worker process in the exchange with its parent (rotation.py): a line of JSON each way.

Runs in environments of other engines too, so it imports nothing of theirs or ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1


def serve(start: Callable[[Any], Callable[[Any], Any]]) -> None:
    """Answers the parent, whose process id is the only argument, until it sends no more.

    Args:
        start: Gets the job, which comes first, and returns what gets every request and returns its answer.
    """
    _die_with_parent(int(sys.argv[1]))
    # Whatever libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    respond = start(json.loads(sys.stdin.readline()))
    answer({"ready": True})
    for line in sys.stdin:
        answer(respond(json.loads(line)))


def _die_with_parent(parent: int) -> None:
    """Asks the kernel to end this process with its parent, which reaches it even while it is stopped."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)
