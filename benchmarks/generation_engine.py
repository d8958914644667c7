"""The worker process of `generation.py` where llama.cpp takes part: one decoder, in one of two engines.

The parent (see rotation.py), whose process id is the only argument, sends one JSON object per line and gets one back:

- first the job: {"engine": "sparamx" or "llama.cpp", "model", "threads", "capacity", "huge_pages": of sparamx};
- {"prompt": P}: [seconds] from a prompt of P tokens to the choice of the next one;
- {"context": C, "runs": R}: seconds of R steps after C tokens; one more before them is not counted.

This file imports nothing of sparamx_onnx where llama.cpp runs, whose Python need not have it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import worker

SMALLEST_VOCABULARY = 1000


class Decoder(Protocol):
    """What is timed."""

    def read(self, tokens: list[int]) -> None:
        """Forgets everything, and reads a prompt."""

    def go_to(self, context: int) -> None:
        """Makes the cache hold so many tokens."""

    def step(self, token: int) -> None:
        """Reads one more token."""


class Sparamx:
    """A model in ONNX Runtime."""

    def __init__(self, job: dict[str, Any]) -> None:
        import sparamx_onnx

        os.environ["SPARAMX_HUGE_PAGES"] = str(int(job["huge_pages"]))
        self._session = sparamx_onnx.DecoderSession(job["model"], capacity=job["capacity"], threads=job["threads"])

    def read(self, tokens: list[int]) -> None:
        self._session.prefill([tokens]).argmax()

    def go_to(self, context: int) -> None:
        self._session.pretend(1, context)

    def step(self, token: int) -> None:
        self._session.step([token]).argmax()


class LlamaCpp:
    """A model in llama.cpp."""

    def __init__(self, job: dict[str, Any]) -> None:
        from llama_cpp import Llama  # type: ignore[import-not-found, unused-ignore]

        threads = job["threads"]
        self._model = Llama(
            job["model"], n_ctx=job["capacity"], n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def read(self, tokens: list[int]) -> None:
        self._model.reset()
        self._eval(tokens)

    def go_to(self, context: int) -> None:
        if self._model.n_tokens < context:
            self.read([7] * context)
        # Steps that were made beyond the context are forgotten by the next one, which is read at that place.
        self._model.n_tokens = context

    def step(self, token: int) -> None:
        self._eval([token])

    def _eval(self, tokens: list[int]) -> None:
        """As ours: up to the choice of the next token."""
        self._model.eval(tokens)
        np.ctypeslib.as_array(self._model._ctx.get_logits(), (self._model.n_vocab(),)).argmax()


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def start(job: Any) -> Callable[[Any], Any]:
    """Opens the decoder; what answers requests."""
    decoder: Decoder = LlamaCpp(job) if job["engine"] == "llama.cpp" else Sparamx(job)
    rng = np.random.default_rng(0)

    def respond(request: Any) -> Any:
        if "prompt" in request:
            prompt = rng.integers(0, SMALLEST_VOCABULARY, request["prompt"]).tolist()
            return [timed(functools.partial(decoder.read, prompt))]
        decoder.go_to(request["context"])
        decoder.step(5)
        return [timed(functools.partial(decoder.step, 7)) for _ in range(request["runs"])]

    return respond


if __name__ == "__main__":
    worker.serve(start)
