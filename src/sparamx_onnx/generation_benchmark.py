"""Times decoders as their users meet them: how long until the first token, and how many a second from then on.

As in ``benchmark``, each model has a process of its own, and they take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparamx_onnx.benchmark import Worker, burst_size, compare, quartiles, start_worker
from sparamx_onnx.feeds import is_decoder, plan_feeds
from sparamx_onnx.generation_page import generation_page
from sparamx_onnx.loading import LoadedModel, load_model
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.output import check_report, write_text
from sparamx_onnx.progress import Report

# Long prompts are not read in every round: the slowest model may spend about so long on them, but it reads at least so
# many.
_PREFILL_SECONDS = 20.0
_FEWEST_PREFILLS = 3
_WARM_UP_TOKENS = 16
_WARM_UP_STEPS = 2
# A turn begins at the context that was asked for, and should not go far beyond it.
_MOST_STEPS = 32


@dataclasses.dataclass(frozen=True)
class GenerationTiming:
    """What one decoder took.

    Attributes:
        model: Path of the model.
        first_token: Median seconds from a prompt to the choice of the first new token; None if no prompt was asked for.
        first_token_quartiles: First and third quartile of that.
        prefill_tokens_per_second: Tokens of the prompts by that time.
        step: Median seconds of a decode step, from a token to the choice of the next; None if no context was asked for.
        step_quartiles: First and third quartile of that.
        decode_tokens_per_second: New tokens of all rows by that time.
        load_seconds: Time to create the session.
        cache_bytes: Size of the key-value cache.
        pss: Memory of the process in bytes, shared pages divided among their users; None where unknown.
        model_pss: The part of it that came with the model and its cache.
        anonymous: Memory of the process that no file backs, in bytes.
    """

    model: str
    first_token: float | None
    first_token_quartiles: tuple[float, float] | None
    prefill_tokens_per_second: float | None
    step: float | None
    step_quartiles: tuple[float, float] | None
    decode_tokens_per_second: float | None
    load_seconds: float
    cache_bytes: int
    pss: int | None
    model_pss: int | None
    anonymous: int | None


@dataclasses.dataclass(frozen=True)
class GenerationBenchmark:
    """Result of ``bench_generation``.

    Attributes:
        timings: The model, then the other one if there was one.
        prefill_ratio: Seconds to the first token of the other model over those of the model.
        prefill_ratio_quartiles: Quartiles of that ratio taken round by round.
        decode_ratio: Seconds of a step of the other model over those of the model.
        decode_ratio_quartiles: Quartiles of that ratio taken round by round.
        prompt: Tokens of each prompt; None if none were read.
        context: Tokens in the cache before a step; None if no steps were made.
        batch: Rows side by side.
        threads: Threads within an operator; None for ONNX Runtime's default.
        rounds: Turns of each model.
    """

    timings: tuple[GenerationTiming, ...]
    prefill_ratio: float | None
    prefill_ratio_quartiles: tuple[float, float] | None
    decode_ratio: float | None
    decode_ratio_quartiles: tuple[float, float] | None
    prompt: int | None
    context: int | None
    batch: int
    threads: int | None
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)


def bench_generation(
    model: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    prompt: int | None = None,
    context: int | None = None,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = 10,
    report: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Report | None = None,
) -> GenerationBenchmark:
    """Times a decoder, interleaved with another one if there is one, through ``DecoderSession``.

    Args:
        model: The decoder to time: an ONNX file or a model folder of onnxruntime-genai.
        against: A decoder to compare with.
        prompt: Read prompts of so many random tokens.
        context: Make decode steps after so many tokens (noise, that no time is spent on).
        batch: Rows side by side.
        threads: Threads within an operator; ONNX Runtime's default (one per core) if None.
        rounds: Turns of each model; more give narrower quartiles. Long prompts are read in fewer of them.
        report: An HTML file to write, with the figures and charts of them.
        force: Replace the report if it exists.
        progress: Called with (rounds done, rounds in all, what is going on).

    Raises:
        SparamxError: A model cannot be read or run, is no decoder, or neither prompt nor context is given.
    """
    for name, number in (("prompt", prompt), ("batch", batch), ("threads", threads), ("rounds", rounds)):
        if number is not None and number < 1:
            raise SparamxError(f"{name} is {number}; it must be 1 or more")
    if context is not None and context < 0:
        raise SparamxError(f"context is {context}; it must be 0 or more")
    if prompt is None and context is None:
        raise SparamxError("there is nothing to time without a prompt or a context")
    paths = [model] if against is None else [model, against]
    loaded = [load_model(path) for path in paths]
    if report is not None:
        files = tuple(file for one in loaded for file in (one.path, *one.data_files))
        check_report(Path(report), others=files, force=force)
    jobs = [decoder_job(one, prompt, context, batch, threads) for one in loaded]
    del loaded  # the graphs, and inline weights with them, are no use while the workers run
    with contextlib.ExitStack() as stack:
        if progress is not None:
            progress(0, rounds, "loading")
        runs = [_Run(stack.enter_context(start_worker(job))) for job in jobs]
        _take_turns(runs, prompt, context, rounds, progress)
    prefill, decode = ([getattr(run, name) for run in runs] for name in ("prefills", "steps"))
    prefill_ratio = compare(*prefill) if len(runs) == 2 and prompt is not None else (None, None)
    decode_ratio = compare(*decode) if len(runs) == 2 and context is not None else (None, None)
    result = GenerationBenchmark(
        timings=tuple(run.timing(batch, prompt) for run in runs),
        prefill_ratio=prefill_ratio[0],
        prefill_ratio_quartiles=prefill_ratio[1],
        decode_ratio=decode_ratio[0],
        decode_ratio_quartiles=decode_ratio[1],
        prompt=prompt,
        context=context,
        batch=batch,
        threads=threads,
        rounds=rounds,
    )
    if report is not None:
        write_text(Path(report), generation_page(result))
    return result


def decoder_job(
    loaded: LoadedModel, prompt: int | None, context: int | None, batch: int, threads: int | None
) -> dict[str, Any]:
    """The job of a worker (see bench_worker) that runs a decoder; the arguments are those of ``bench_generation``.

    Raises:
        SparamxError: The model is no decoder.
    """
    if not is_decoder(loaded.model):
        raise SparamxError(f"{loaded.path}: takes no key-value cache, so it has neither prompt nor context")
    bounds = [feed.value for feed in plan_feeds(loaded.model).feeds if feed.fill == "ids"]
    return {
        "model": os.fspath(loaded.path),
        "threads": threads,
        "capacity": max(prompt or 0, _WARM_UP_TOKENS, (context or 0) + _MOST_STEPS + 1),
        "batch": batch,
        "tokens": min(bounds, default=1),
    }


class _Run:
    """A worker and what it has taken so far: of each turn the seconds of its runs."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.prefills: list[list[float]] = []
        self.steps: list[list[float]] = []
        self.steps_a_turn = _WARM_UP_STEPS

    def prefill(self, prompt: int) -> float:
        """One turn; its seconds."""
        self.prefills.append(self.worker.turn({"prompt": prompt}))
        return self.prefills[-1][0]

    def decode(self, context: int) -> None:
        """One turn; its first step is not counted."""
        self.steps.append(self.worker.turn({"context": context, "runs": self.steps_a_turn + 1})[1:])

    def timing(self, batch: int, prompt: int | None) -> GenerationTiming:
        """All of it in figures."""
        firsts, steps = ([seconds for turn in turns for seconds in turn] for turns in (self.prefills, self.steps))
        first_token = statistics.median(firsts) if firsts else None
        step = statistics.median(steps) if steps else None
        return GenerationTiming(
            model=self.worker.model,
            first_token=first_token,
            first_token_quartiles=quartiles(firsts) if firsts else None,
            prefill_tokens_per_second=batch * prompt / first_token if first_token and prompt else None,
            step=step,
            step_quartiles=quartiles(steps) if steps else None,
            decode_tokens_per_second=batch / step if step else None,
            load_seconds=self.worker.ready["load_seconds"],
            cache_bytes=self.worker.answer["cache_bytes"],
            **self.worker.memory_figures(),
        )


def _take_turns(
    runs: Sequence[_Run], prompt: int | None, context: int | None, rounds: int, progress: Report | None
) -> None:
    for run in runs:
        run.worker.turn({"prompt": min(prompt or _WARM_UP_TOKENS, _WARM_UP_TOKENS)})
        if context is not None:
            warm = run.worker.turn({"context": context, "runs": _WARM_UP_STEPS + 1})[1:]
            run.steps_a_turn = min(burst_size(statistics.median(warm)), _MOST_STEPS)
    prefills = rounds
    for number in range(rounds):
        if progress is not None:
            progress(number, rounds, "timing")
        order = runs if number % 2 == 0 else list(reversed(runs))
        if prompt is not None and number < prefills:
            slowest = max(run.prefill(prompt) for run in order)
            prefills = min(prefills, max(_FEWEST_PREFILLS, math.ceil(_PREFILL_SECONDS / slowest)))
        if context is not None:
            for run in order:
                run.decode(context)
    if progress is not None:
        progress(rounds, rounds, "timing")
