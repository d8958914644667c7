"""The tables of docs/attention.md, made of what attention.py measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tables import load, table

THEIRS = "GroupQueryAttention"
HEAD = ["new tokens", "past", "cache", "ms a layer", "faster", "reads", "scratch", "packing"]
# What should at least be seen: engine, new tokens, past, how many times as fast.
LEAST = {
    **{("fast", 1, past): least for past, least in ((2048, 3.0), (8192, 4.0), (16384, 4.0))},
    **{("fast", tokens, 0): 1.0 for tokens in (512, 2048)},
    **{("packed 30/50", 1, past): least for past, least in ((8192, 8.0), (16384, 10.0))},
}

Engine = dict[str, Any]


def engines() -> Iterator[tuple[int, int, str, Engine]]:
    """New tokens, past, engine and what was seen of it."""
    for result in load("attention")["results"]:
        for name, engine in result["engines"].items():
            yield result["tokens"], result["past"], name, engine


def row(tokens: int, past: int, name: str, engine: Engine) -> list[str]:
    """A case of an engine."""
    seconds, (low, high) = engine["seconds"], engine["faster_quartiles"]
    faster = "" if name == THEIRS else f"{engine['faster']:.2f}x ({low:.2f} to {high:.2f})"
    reads = f"{engine['bytes_read'] / 1e6:.1f} MB" + (
        f", {engine['bytes_read'] / seconds / 1e9:.0f} GB/s" if tokens == 1 else ""
    )
    packing = f"{engine['packing_seconds'] / seconds:.1%}".replace("%", " %") if "packed" in name else ""
    scratch = f"{engine['peak_scratch_bytes'] / 1e6:.1f} MB"
    return [str(tokens), str(past), name, f"{seconds * 1e3:.3g}", faster, reads, scratch, packing]


def attention() -> str:
    """Every case of every engine."""
    return table(HEAD, (row(*case) for case in engines()))


def attention_targets() -> str:
    """The targets, what was seen, and whether that is enough."""
    rows = []
    for tokens, past, name, engine in engines():
        least = LEAST.get((name, tokens, past))
        if least is not None:
            seen = engine["faster"]
            verdict = "reached" if seen >= least else f"missed by {1 - seen / least:.1%}".replace("%", " %")
            rows.append([str(tokens), str(past), name, f"{least:g}x", f"{seen:.2f}x", verdict])
    return table(["new tokens", "past", "cache", "at least", "seen", ""], rows)


def attention_bytes() -> str:
    """Bytes of a token in each cache."""
    tokens = {name: engine["bytes_of_a_token"] for _, past, name, engine in engines() if past != 0}
    rows = [
        [name, str(size), f"{tokens[THEIRS] / size:.2f}x"]
        for name, size in tokens.items()
        if name not in (THEIRS, "fast")
    ]
    return table(["cache", "bytes of a token", "smaller"], [["float", str(tokens[THEIRS]), ""], *rows])


def attention_run() -> str:
    """Rounds, layers, threads and the machine."""
    document = load("attention")
    machine, arguments = document["machine"], document["arguments"]
    return (
        f"{arguments['heads']} query heads over {arguments['kv_heads']} key and value heads of {arguments['size']}, "
        f"{arguments['layers']} layers with a cache each,\n{arguments['threads']} threads, {arguments['rounds']} turns "
        f"of each engine; {machine['cpu']}, family and model {machine['family_model_stepping'][0]}, "
        f"{machine['family_model_stepping'][1]}, {machine['cores']} CPUs;\nONNX Runtime {machine['onnxruntime']}."
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (attention, attention_targets, attention_bytes, attention_run)
}
