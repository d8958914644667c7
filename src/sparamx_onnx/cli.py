"""The command line: parses, calls the Python API, prints. Every command can print JSON instead of text.

Exit codes: 0 done, 1 the check failed (verify), 2 wrong usage or unusable input, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from sparamx_onnx.ops.errors import SparamxError

_DEBUG = "SPARAMX_DEBUG"
_DONE, _FAILED, _UNUSABLE, _INTERRUPTED = 0, 1, 2, 130

# How long an interruption waits before it looks again whether a module is still being imported.
_IMPORT_SECONDS = 0.01

_MAGNITUDE_WARNING = (
    "warning: --method magnitude prunes without looking at any data, and at 50 % it usually ruins a language model;"
    " judge the result on your own data before you use it."
)


# Of damaged models onnx_ir warns through its logger; what matters is checked and refused in one sentence.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())


def main() -> NoReturn:
    """Runs the command line of this process and exits with its code."""
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in a background job
        signal.signal(signal.SIGINT, _end)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command line; one sentence on stderr, never a traceback, is what becomes of an error.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit code.
    """
    try:
        result = commands.main(arguments, prog_name="sparamx-onnx", standalone_mode=False)
        return result if isinstance(result, int) else _DONE
    except click.UsageError as error:
        context = error.ctx.command_path if error.ctx is not None else "sparamx-onnx"
        _complain(f"{error.format_message().rstrip('.')} (see {context} --help)")
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return _INTERRUPTED
    except SparamxError as error:
        _complain(str(error))
    except MemoryError:
        _complain("out of memory")
    except Exception as error:  # the promise of this function: never a traceback unless asked for
        _complain(
            f"{type(error).__name__}: {' '.join(str(error).split())}: this is a bug in sparamx-onnx;"
            f" run again with {_DEBUG}=1 to see where"
        )
    return _UNUSABLE


class _Examples(click.Command):
    """A command whose help has its options in sections and ends with examples.

    Args:
        examples: Pairs of a command line and what it does.
        sections: Pairs of a title and the names of its first options, in the order of declaration; those before the
            first are under "Options".
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[tuple[str, str]],
        sections: Sequence[tuple[str, str]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._examples = examples
        self._titles = {first: title for title, first in sections}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        title, sections = "Options", dict[str, list[tuple[str, str]]]()
        for parameter in self.get_params(ctx):
            title = self._titles.get(parameter.name or "", title)
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line, meaning in self._examples:
                formatter.write(f"  {line}\n      {meaning}\n")
        super().format_epilog(ctx, formatter)


class _Group(_Examples, click.Group):
    """The program; its commands are listed in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 a check failed, 2 wrong usage or unusable input.",
    examples=(
        ("sparamx-onnx inspect model.onnx", "what could be converted, and how many zeros it has"),
        ("sparamx-onnx convert model.onnx", "writes model.sparse.onnx and model.sparse.onnx.data"),
        ("sparamx-onnx verify model.onnx model.sparse.onnx", "are the outputs the same?"),
        ("sparamx-onnx bench model.sparse.onnx --against model.onnx", "is it faster here?"),
    ),
)
@click.version_option(package_name="sparamx-onnx", message="%(prog)s %(version)s")
@click.pass_context
def commands(context: click.Context) -> None:
    """Makes pruned transformers fast and small in ONNX Runtime on CPUs.

    Load a converted model with sparamx_onnx.InferenceSession in Python, or register the library that 'sparamx-onnx
    info' names in an ONNX Runtime session of any language.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(_UNUSABLE)


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


@commands.command(
    cls=_Examples,
    short_help="Rewrite linear layers as sparse operators.",
    examples=(
        ("sparamx-onnx convert model.onnx", "a pruned model: keeps its zeros, writes model.sparse.onnx"),
        (
            "sparamx-onnx convert model.onnx -o small.onnx --weights fp32",
            "the same numbers as before, but for rounding",
        ),
        (
            "sparamx-onnx convert model.onnx --weights int4 --group-size 64",
            "the smallest files; verify and judge the result before you use it",
        ),
        (
            "sparamx-onnx convert model.onnx --calibration inputs/ --sparsity 0.6",
            "prunes a dense model by typical inputs, .npz files in a folder",
        ),
        (
            "sparamx-onnx convert llama/ -o llama-sparse/ --attention fast",
            "a model folder of onnxruntime-genai: writes one that it runs as it is",
        ),
        ("sparamx-onnx convert model.onnx --exclude lm_head --dry-run", "what would happen; writes nothing"),
    ),
    sections=(
        ("Pruning", "method"),
        ("Packed weights", "weights"),
        ("Which layers", "include"),
        ("Attention", "attention"),
        ("Output", "output"),
    ),
)
@click.argument("model")
@click.option(
    "--method",
    type=click.Choice(["auto", "keep", "magnitude", "wanda", "sparsegpt"]),
    default="auto",
    show_default=True,
    help="keep: only the zeros that are there. magnitude: set the smallest weights to zero, uncalibrated. wanda,"
    " sparsegpt: prune by --calibration; sparsegpt keeps more of the model's quality. auto: sparsegpt with"
    " --calibration, keep without.",
)
@click.option(
    "--calibration",
    metavar="FILE.npz|DIR",
    help="Typical inputs to prune by: one array per input (numpy.savez), or a folder of such files, one per run.",
)
@click.option(
    "--sparsity",
    metavar="SHARE",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of zeros per weight, where weights are pruned. An output layer is pruned only if --include matches it."
    "  [default: 0.5]",
)
@click.option(
    "--pattern",
    type=click.Choice(["2:4", "4:8"]),
    help="Prune in this pattern instead of to --sparsity. 2:4: of 4 consecutive weights of an output at most 2 stay.",
)
@click.option(
    "--allocation",
    type=click.Choice(["uniform", "sensitivity"]),
    default="uniform",
    show_default=True,
    help="uniform: all weights get the same share of zeros. sensitivity: with --calibration, measure which layers"
    " suffer less, and give them more of the zeros.",
)
@click.option(
    "--weights",
    type=click.Choice(["bf16", "int8", "int4", "fp32"]),
    help="Type of the packed weights. fp32 is exact; bf16 is half as large and hardly differs; int8 is a quarter, with"
    " errors like ONNX Runtime's dynamic int8; int4 is an eighth and changes the outputs visibly: check it on your"
    " own data.  [default: bf16, and for weights that are quantized already their own codes]",
)
@click.option(
    "--group-size",
    type=click.Choice([16, 32, 64, 128, 256]),
    help="For int4: weights of an output, along its inputs, that share a scale. Smaller is more accurate and larger."
    "  [default: 32]",
)
@click.option(
    "--scale-type",
    type=click.Choice(["int8", "fp16", "fp32"]),
    help="For int4: type of the scales. int8 scales are multiples of one fp32 number per output; fp16 ones keep weights"
    " that are 4-bit numbers already, fp32 ones also huge weights.  [default: int8]",
)
@click.option(
    "--include",
    metavar="RE",
    multiple=True,
    help="Convert only layers whose node, weight or module name matches. Repeatable.",
)
@click.option(
    "--exclude",
    metavar="RE",
    multiple=True,
    help="Leave layers alone whose node, weight or module name matches, and attention operators by name. Repeatable.",
)
@click.option(
    "--fuse-siblings",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Make one operator of layers with the same input, such as query, key and value. auto: where that was measured"
    " to be faster.",
)
@click.option(
    "--attention",
    type=click.Choice(["keep", "fast", "packed"]),
    default="keep",
    show_default=True,
    help="fast: replace attention, one node or spelled out, by an operator that computes the same and reads each key"
    " and value once. packed: likewise, with a cache in bf16 that is pruned as it grows old, for DecoderSession.",
)
@click.option(
    "--k-sparsity",
    metavar="SHARE",
    type=click.FloatRange(0, 1, max_open=True),
    help="For packed attention: the part of old keys that is pruned.  [default: 0.3]",
)
@click.option(
    "--v-sparsity",
    metavar="SHARE",
    type=click.FloatRange(0, 1, max_open=True),
    help="For packed attention: the part of old values that is pruned.  [default: 0.5]",
)
@click.option(
    "--sink",
    metavar="N",
    type=click.IntRange(0),
    help="For packed attention: so many first tokens are never pruned.  [default: 64]",
)
@click.option(
    "--recent",
    metavar="N",
    type=click.IntRange(0),
    help="For packed attention: so many last tokens are not pruned yet.  [default: 64]",
)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="The file to write; NAME.sparse.onnx beside MODEL by default. For a folder, the folder to write; MODEL.sparse"
    " by default.",
)
@click.option(
    "--report",
    metavar="FILE.html",
    help="Write a page with the sizes, zeros and errors of every layer, and what was left alone and why.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what would be done, how large and how fast it would be; write nothing but --report.",
)
@click.option("--force", is_flag=True, help="Replace the output and the report if they exist.")
@_json_option
def convert(model: str, output: str | None, method: str, as_json: bool, **options: Any) -> int:
    """Rewrites the linear layers of MODEL as sparse operators.

    Writes OUT and OUT.data; MODEL is never changed. A MatMul or Gemm with a constant weight is converted, or listed
    with the reason why it was left alone; with --attention fast or packed, attention operators too. For a model that is
    converted already or has nothing to convert nothing is written.

    The more zeros the weights have, the smaller and faster they become ('sparamx-onnx inspect' counts them). A model
    without zeros gains by the type of its weights alone; --calibration prunes it.

    Where MODEL is a folder of onnxruntime-genai (with genai_config.json), OUT is a folder that it can run: the decoder
    is converted, the library lies beside it, and everything else is copied.
    """
    from sparamx_onnx.conversion import convert as do_convert
    from sparamx_onnx.progress import progress_bar
    from sparamx_onnx.reports import conversion_text

    if method == "magnitude":
        click.echo(_MAGNITUDE_WARNING, err=True)
    with progress_bar() as progress:
        result = do_convert(model, output, method=method, progress=progress, **options)
    _print(result, conversion_text, as_json)
    return _DONE


@commands.command(
    cls=_Examples,
    short_help="Show linear layers: shape, zeros, bytes.",
    examples=(
        ("sparamx-onnx inspect model.onnx", "what convert would do"),
        ("sparamx-onnx inspect model.sparse.onnx --json", "what convert has done, for a script"),
    ),
)
@click.argument("model")
@_json_option
def inspect(model: str, as_json: bool) -> int:
    """Shows the linear layers of MODEL: shape, zeros, bytes before and after.

    For a model as it was exported, this is what convert would do with it. For a converted one, it is what the packed
    weights say of themselves.
    """
    from sparamx_onnx.inspection import inspect as do_inspect
    from sparamx_onnx.progress import progress_bar
    from sparamx_onnx.reports import inspection_text

    with progress_bar() as progress:
        result = do_inspect(model, progress=progress)
    _print(result, inspection_text, as_json)
    return _DONE


@commands.command(
    cls=_Examples,
    short_help="Compare the outputs of two models.",
    examples=(
        ("sparamx-onnx verify model.onnx model.sparse.onnx", "on random inputs"),
        (
            "sparamx-onnx verify model.onnx model.sparse.onnx --inputs batch.npz --tolerance 0.01",
            "on your own inputs (numpy.savez), with your own tolerance",
        ),
        ("sparamx-onnx verify model.onnx model.sparse.onnx --layers", "where do the errors come from?"),
    ),
)
@click.argument("dense")
@click.argument("sparse")
@click.option("--inputs", metavar="FILE.npz", help="One array per input, by name; random inputs by default.")
@click.option(
    "--tolerance",
    metavar="ERROR",
    type=click.FloatRange(0),
    help="Largest relative error that passes.  [default: 1e-4 for fp32 weights, 2e-2 for bf16,"
    " 0.15 for int8, 0.6 for int4]",
)
@click.option("--layers", is_flag=True, help="Also compare the result of every sparse operator, and name the worst.")
@_json_option
def verify(dense: str, sparse: str, inputs: str | None, tolerance: float | None, layers: bool, as_json: bool) -> int:
    """Runs DENSE, a model as it was, and SPARSE, its converted form, on the same inputs and compares the outputs.

    Per output: relative error (max |difference| / max |reference|), the lowest cosine between vectors, and how often
    the largest element is the same. Exit code 1 if an error is past the tolerance.
    """
    from sparamx_onnx.reports import verification_text
    from sparamx_onnx.verification import verify as do_verify

    result = do_verify(dense, sparse, inputs=inputs, tolerance=tolerance, layers=layers)
    _print(result, verification_text, as_json)
    return _DONE if result.passed else _FAILED


@commands.command(
    cls=_Examples,
    short_help="Time a model, alone or against another.",
    examples=(
        ("sparamx-onnx bench model.sparse.onnx --against model.onnx --batch 8", "an encoder, 8 rows of 128 tokens"),
        (
            "sparamx-onnx bench decoder.sparse.onnx --against decoder.onnx --prompt 512 --context 1024",
            "a decoder: the first token after 512, and tokens a second after 1024",
        ),
    ),
)
@click.argument("model")
@click.option("--against", metavar="OTHER", help="Another model with the same inputs to compare with.")
@click.option("--batch", metavar="N", type=click.IntRange(1), help="Rows per run.  [default: 1]")
@click.option(
    "--length",
    metavar="N",
    type=click.IntRange(1),
    help="Tokens per row; for a model with a key-value cache, tokens in the cache.  [default: 128]",
)
@click.option(
    "--prompt",
    metavar="N",
    type=click.IntRange(1),
    help="For a decoder: time prompts of so many tokens, up to the first new one.",
)
@click.option(
    "--context",
    metavar="N",
    type=click.IntRange(0),
    help="For a decoder: time steps after so many tokens, over a cache in place.",
)
@click.option("--threads", metavar="N", type=click.IntRange(1), help="Threads to run with.  [default: one per core]")
@click.option("--report", metavar="FILE.html", help="With --prompt or --context: write a page with charts.")
@click.option("--force", is_flag=True, help="Replace the report if it exists.")
@_json_option
def bench(
    model: str,
    against: str | None,
    batch: int | None,
    length: int | None,
    prompt: int | None,
    context: int | None,
    threads: int | None,
    report: str | None,
    force: bool,
    as_json: bool,
) -> int:
    """Times MODEL, alone or against OTHER, on random inputs.

    The two take turns in short bursts, each in a process of its own that is stopped while the other runs. PSS is the
    memory of a process with shared pages divided among their users.

    A model with a key-value cache is timed on one run of the graph, a step of one token, whose result goes to new
    memory as a caller without a cache in place gets it. With --prompt and --context it is timed as a decoder is used.
    """
    from sparamx_onnx.benchmark import Benchmark
    from sparamx_onnx.benchmark import bench as do_bench
    from sparamx_onnx.generation_benchmark import GenerationBenchmark, bench_generation
    from sparamx_onnx.progress import progress_bar
    from sparamx_onnx.reports import benchmark_text, generation_text

    generates = prompt is not None or context is not None
    if generates and length is not None:
        raise click.UsageError("--length is for a single run; leave it out with --prompt or --context")
    if report is not None and not generates:
        raise click.UsageError("--report needs --prompt or --context")
    result: Benchmark | GenerationBenchmark
    with progress_bar() as progress:
        if not generates:
            result = do_bench(model, against, batch=batch, length=length, threads=threads, progress=progress)
        else:
            result = bench_generation(
                model,
                against,
                prompt=prompt,
                context=context,
                batch=batch or 1,
                threads=threads,
                report=report,
                force=force,
                progress=progress,
            )
    _print(result, generation_text if generates else benchmark_text, as_json)
    return _DONE


@commands.command(
    cls=_Examples,
    short_help="Show the library, the CPU and the kernels.",
    examples=(
        ("sparamx-onnx info", "what this machine has"),
        ("SPARAMX_ISA=avx2 sparamx-onnx info", "with a level forced, as it would be for any session"),
    ),
)
@_json_option
def info(as_json: bool) -> int:
    """Shows the library to register, the CPU, and which kernels will run here and why."""
    from sparamx_onnx.environment import environment
    from sparamx_onnx.reports import environment_text

    _print(environment(), environment_text, as_json)
    return _DONE


def _print(result: Any, text: Any, as_json: bool) -> None:
    click.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False) if as_json else text(result))


def _complain(message: str) -> None:
    """One sentence on stderr; after the traceback, where somebody is looking for a bug."""
    if os.environ.get(_DEBUG) and sys.exc_info()[0] is not None:
        traceback.print_exc()
    click.echo(f"error: {message.rstrip('.')}.", err=True)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the program by an exception, so that whatever is being written is cleaned away.

    Not within an import: native modules abort, or make an error of their own, when an exception meets their
    initialization.
    """
    if _importing(frame):
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, _IMPORT_SECONDS)
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
