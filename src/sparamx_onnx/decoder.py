"""Runs decoders with a key-value cache: prefill, steps, generation.

Two kinds of cache, told apart by the graph. Where GroupQueryAttention or SparseAMXAttention reads every past and writes
every present, one buffer of fixed capacity is bound to both, and a run moves nothing but the new tokens. Otherwise the
cache grows: each run's present is the next run's past, handed on as it is.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from sparamx_onnx.genai_config import model_file
from sparamx_onnx.graph_passes.attention_heads import inputs_by_role, key_size
from sparamx_onnx.graph_passes.pack_cache import packed_caches
from sparamx_onnx.loading import load_model
from sparamx_onnx.ops.errors import SparamxError, in_one_sentence
from sparamx_onnx.ops.packed_cache import HEADER_BYTES, CacheLayout
from sparamx_onnx.packed_noise import noise_row
from sparamx_onnx.session import InferenceSession

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

_TYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
# What a run can be given besides the cache.
_FED = ("input_ids", "attention_mask", "position_ids", "seqlens_k", "total_sequence_length")
_TELL_LENGTHS = ("attention_mask", "seqlens_k")
# A cache line: kernels read whole lines.
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Cache:
    """One tensor of a decoder's cache: the graph's input and output.

    Float [batch, heads, tokens, size], or packed, uint8 [batch, heads, bytes].
    """

    past: str
    present: str
    dtype: type[np.generic]
    heads: int
    size: int
    layout: CacheLayout | None = None

    def shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        """Of the tensor that holds so many tokens."""
        if self.layout is not None:
            return batch, self.heads, self.layout.row_bytes(tokens)
        return batch, self.heads, tokens, self.size

    def bytes(self, batch: int, tokens: int) -> int:
        """Likewise."""
        return math.prod(self.shape(batch, tokens)) * np.dtype(self.dtype).itemsize


class _LogitsMemory:
    """Where steps write their logits, one after the other: binding new memory takes a half percent of a step."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self.shape, self._dtype = shape, dtype
        # Not as an array: it would be the base of all views of it, and `is_free` asks whether the last ones are gone.
        self._memory = _zeros(math.prod(shape) * np.dtype(dtype).itemsize).data
        self._last: weakref.ref[npt.NDArray[Any]] | None = None

    @property
    def is_free(self) -> bool:
        """Whether nobody holds the last array any more, or a view of it."""
        return self._last is None or self._last() is None

    def array(self) -> npt.NDArray[Any]:
        """All of it, as it is."""
        flat = np.frombuffer(self._memory, self._dtype)
        self._last = weakref.ref(flat)
        return flat.reshape(self.shape)


class DecoderSession:
    """A decoder and its cache: a batch of token rows that grows with every call.

    Models as onnxruntime-genai's builder, optimum and ``sparamx-onnx convert`` write them: ``input_ids``,
    ``attention_mask`` and ``position_ids`` (all but the first may be missing), a past for every present and ``logits``.

    >>> session = DecoderSession("model.sparse.onnx", capacity=4096)
    >>> [text] = session.generate([[1, 15, 27]], 100)

    Attributes:
        capacity: Tokens of a row that the cache has room for.
        shares_buffers: Whether past and present are one buffer, so that no run copies the cache.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        capacity: int = 2048,
        threads: int | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        """Opens a model; the cache is allocated when the first tokens come.

        Args:
            model: Path of a decoder, converted or not, or of its folder for onnxruntime-genai.
            capacity: Tokens that a row can have, prompt included.
            threads: Threads within an operator; ONNX Runtime's default if None.
            session_options: Options to use instead of new ones.

        Raises:
            SparamxError: It is no decoder with a cache that this class understands, or ONNX Runtime cannot run it.
        """
        if capacity < 1:
            raise SparamxError(f"capacity must be at least 1, not {capacity}")
        path = model_file(Path(model))
        options = session_options or onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        with in_one_sentence(f"{path}: ONNX Runtime cannot run this model"):
            self._session = InferenceSession(path, options)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        [self._logits] = [v for v in self._session.get_outputs() if v.name == "logits"] or [None]
        self._caches, self.shares_buffers = _find_caches(path, self._session)
        self._check(path)
        # Asked of ONNX Runtime once: between two steps little is in the processor's caches, and every question is slow.
        self._fed = {name: _TYPES[value.type] for name, value in self._inputs.items() if name in _FED}
        self._logits_type, self._logits_shape = _TYPES[self._logits.type], self._logits.shape
        self.capacity = capacity
        self._binding = self._session.io_binding()
        self._buffers: dict[str, onnxruntime.OrtValue] = {}
        self._step_logits: list[_LogitsMemory] = []  # two: callers hold the last logits while the next are made
        self._bound_logits: _LogitsMemory | None = None
        self._mask: Tokens = np.zeros((0, 0), np.int64)
        self._ones: Tokens = np.ones((1, capacity), np.int64)

    def _check(self, path: Path) -> None:
        if "input_ids" not in self._inputs or self._logits is None or not self._caches:
            raise SparamxError(
                f"{path}: no decoder with a cache: it should have input_ids, logits, and past and present"
            )
        for name, value in self._inputs.items():
            if name in _FED and not value.type.startswith("tensor(int"):
                raise SparamxError(f"{path}: {name} should be int32 or int64, and is {value.type}")

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """The session beneath."""
        return self._session

    @property
    def batch(self) -> int:
        """Rows; 0 before the first tokens."""
        return len(self._mask)

    @property
    def lengths(self) -> Tokens:
        """Tokens of every row in the cache, int64 [batch]."""
        lengths: Tokens = self._mask.sum(axis=1)
        return lengths

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache: of its capacity where past and present are one buffer, else of what it holds."""
        tokens = self.capacity if self.shares_buffers else self._mask.shape[1]
        return sum(cache.bytes(self.batch, tokens) for cache in self._caches)

    def reset(self) -> None:
        """Forgets all tokens. A shared buffer is kept for the next batch of the same size."""
        self._mask = np.zeros((0, 0), np.int64)
        if not self.shares_buffers:
            self._buffers.clear()
        for cache in self._caches:
            if cache.layout is not None and cache.past in self._buffers:
                self._buffers[cache.past].numpy()[..., :HEADER_BYTES] = 0  # a row without tokens

    def prefill(self, prompts: Sequence[Sequence[int]] | Tokens) -> Logits:
        """Forgets what was there and reads one prompt a row; they may differ in length.

        Returns:
            The logits after every row's last token, float32 [batch, vocab].

        Raises:
            SparamxError: A prompt is empty or longer than the capacity, prompts differ in length and the model has no
                mask, or ONNX Runtime fails.
        """
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        if not lengths.size or lengths.min() < 1:
            raise SparamxError("every prompt must have at least one token")
        tokens = np.zeros((len(lengths), lengths.max()), np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        self.reset()
        logits = self._run(tokens, np.arange(tokens.shape[1]) < lengths[:, None])
        last = np.minimum(lengths - 1, logits.shape[1] - 1)
        after_last: Logits = logits[np.arange(len(lengths)), last]
        return after_last

    def append(self, tokens: Sequence[Sequence[int]] | Tokens) -> Logits:
        """Reads more tokens, equally many for each row.

        Args:
            tokens: [batch, tokens]; the first call after ``reset`` decides the batch.

        Returns:
            The logits after each of them, float32 [batch, tokens, vocab].

        Raises:
            SparamxError: Rows do not fit the batch or the capacity, or ONNX Runtime fails.
        """
        array = np.asarray(tokens, np.int64)
        if array.ndim != 2 or not array.size:
            raise SparamxError(f"tokens should have the shape [batch, tokens], and have {list(array.shape)}")
        return self._run(array)

    def step(self, tokens: Sequence[int] | Tokens) -> Logits:
        """Reads one token for each row, int [batch]; returns the logits after it, float32 [batch, vocab]."""
        logits: Logits = self.append(np.asarray(tokens, np.int64).reshape(-1, 1))[:, -1]
        return logits

    def pretend(self, batch: int, tokens: int) -> None:
        """Goes on as if ``batch`` rows of so many tokens had been read, with noise for keys and values: to measure.

        Raises:
            SparamxError: So many tokens do not fit the capacity.
        """
        if batch < 1 or not 0 <= tokens <= self.capacity:
            raise SparamxError(f"{batch} rows of {tokens} tokens do not fit a capacity of {self.capacity}")
        self.reset()
        self._mask = np.ones((batch, tokens), np.int64)
        self._bind_caches(batch)
        noise = np.random.default_rng(0).uniform(-1, 1, 1 << 18)
        rows: dict[CacheLayout, npt.NDArray[np.uint8]] = {}
        for cache in self._caches:
            if not self.shares_buffers:
                self._buffers[cache.past] = _empty_cache(cache, batch, tokens)
            values = self._buffers[cache.past].numpy()
            if cache.layout is None:
                values[:, :, :tokens] = np.resize(noise.astype(cache.dtype), values[:, :, :tokens].shape)
                continue
            if cache.layout not in rows:
                rows[cache.layout] = noise_row(cache.layout, tokens, self.capacity)
            values[...] = rows[cache.layout]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> list[list[int]]:
        """Continues prompts.

        Args:
            prompts: One row of tokens each.
            new_tokens: At most so many for each.
            temperature: 0 takes the most likely token; otherwise logits are divided by it, and a token is drawn.
            top_k: Draw among so many most likely tokens only; 0 for all.
            seed: Of the draws.
            stop: Tokens that end a row; they are not returned.

        Returns:
            The new tokens of each row.

        Raises:
            SparamxError: An option is out of range, a row does not fit the capacity, or ONNX Runtime fails.
        """
        if temperature < 0 or top_k < 0 or new_tokens < 0:
            raise SparamxError("temperature, top_k and new_tokens must not be negative")
        rng = np.random.default_rng(seed)
        rows: list[list[int]] = [[] for _ in prompts]
        ended = np.zeros(len(prompts), bool)
        logits = self.prefill(prompts)
        for position in range(new_tokens):
            chosen = choose(logits, rng, temperature, top_k)
            ended |= np.isin(chosen, list(stop))
            for row, token, is_over in zip(rows, chosen, ended, strict=True):
                if not is_over:
                    row.append(int(token))
            if ended.all() or position == new_tokens - 1:
                break
            logits = self.step(chosen)
        return rows

    def _run(self, tokens: Tokens, real: npt.NDArray[np.bool_] | None = None) -> Logits:
        """Runs [batch, new] tokens, of which only the ``real`` ones (without it, all) are remembered."""
        mask = self._mask if self.batch else np.zeros((len(tokens), 0), np.int64)
        if len(tokens) != len(mask):
            raise SparamxError(f"the cache holds {len(mask)} rows, and there are tokens for {len(tokens)}")
        past, total = mask.shape[1], mask.shape[1] + tokens.shape[1]
        if total > self.capacity:
            raise SparamxError(f"{past} tokens and {tokens.shape[1]} more are above the capacity of {self.capacity}")
        feeds = {"input_ids": tokens}
        if real is None and (len(mask) == 1 or mask.all()):  # rows of one length: the way of nearly all steps
            mask = self._ones[:, :total] if len(mask) == 1 else np.ones((len(mask), total), np.int64)
            if "position_ids" in self._fed:
                feeds["position_ids"] = np.arange(past, total) + np.zeros_like(tokens)
        else:
            mask, feeds["position_ids"] = self._masked(mask, np.ones(tokens.shape, bool) if real is None else real)
            if not mask.all() and self._fed.keys().isdisjoint(_TELL_LENGTHS):
                raise SparamxError(
                    "rows differ in length, and the model has no attention_mask or seqlens_k to be told of it"
                )
        feeds["attention_mask"] = mask
        if "seqlens_k" in self._fed:
            feeds["seqlens_k"] = mask.sum(axis=1) - 1
        if "total_sequence_length" in self._fed:
            feeds["total_sequence_length"] = np.array(mask.shape[1])
        logits = self._execute(feeds)
        self._mask = mask
        return logits

    def _masked(self, mask: Tokens, real: npt.NDArray[np.bool_]) -> tuple[Tokens, Tokens]:
        """The mask with new tokens, and their positions, where rows differ in length."""
        lengths = mask.sum(axis=1)
        positions = lengths[:, None] + np.maximum(np.cumsum(real, axis=1) - 1, 0)
        if not self.shares_buffers:
            return np.concatenate([mask, real.astype(np.int64)], axis=1), positions
        lengths = lengths + real.sum(axis=1)  # the operator wants rows without gaps
        return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64), positions

    def _execute(self, feeds: Mapping[str, Tokens]) -> Logits:
        """One run; its new keys and values are in the cache afterwards."""
        for name, array in feeds.items():
            if name in self._fed:
                self._binding.bind_cpu_input(name, np.ascontiguousarray(array, self._fed[name]))
        batch, tokens = feeds["input_ids"].shape
        if not self.shares_buffers:
            self._binding.clear_binding_outputs()
            self._bound_logits = None
        logits = self._bind_logits(batch, tokens)
        self._bind_caches(batch)
        with in_one_sentence("ONNX Runtime cannot run this decoder"):
            self._session.run_with_iobinding(self._binding)
        if logits is None or not self.shares_buffers:
            outputs = self._binding.get_outputs()  # in the order in which they were bound
            if not self.shares_buffers:
                self._buffers = {cache.past: value for cache, value in zip(self._caches, outputs[1:], strict=True)}
            if logits is None:
                logits = outputs[0].numpy()
        return np.asarray(logits, np.float32)

    def _bind_logits(self, batch: int, tokens: int) -> npt.NDArray[Any] | None:
        """The array that the run writes to; None where only the run knows how large it is."""
        _, rows, vocab = self._logits_shape
        if not isinstance(vocab, int):
            self._binding.bind_output("logits")
            return None
        shape = batch, rows if isinstance(rows, int) else tokens, vocab
        memory = self._memory_of_step(shape) if shape[1] == 1 else None
        logits = np.empty(shape, self._logits_type) if memory is None else memory.array()
        if memory is not None and memory is self._bound_logits:
            return logits
        self._bound_logits = memory
        address = logits.__array_interface__["data"][0]  # a tenth of the time of ctypes.data
        self._binding.bind_output("logits", "cpu", 0, self._logits_type, shape, address)
        return logits

    def _memory_of_step(self, shape: tuple[int, ...]) -> _LogitsMemory:
        """Memory for logits of this shape that nobody holds."""
        for memory in self._step_logits:
            if memory.shape == shape and memory.is_free:
                return memory
        memory = _LogitsMemory(shape, self._logits_type)
        self._step_logits = [*self._step_logits[-1:], memory]
        return memory

    def _bind_caches(self, batch: int) -> None:
        if not self.shares_buffers:
            for cache in self._caches:
                past = self._buffers.get(cache.past) or _empty_cache(cache, batch, 0)
                self._binding.bind_ortvalue_input(cache.past, past)
                self._binding.bind_output(cache.present)
        elif not self._buffers or next(iter(self._buffers.values())).shape()[0] != batch:
            self._allocate_caches(batch)

    def _allocate_caches(self, batch: int) -> None:
        """Buffers for all caches in one piece of memory: NumPy asks the system for huge pages for large arrays only."""
        self._buffers.clear()
        sizes = [-(-cache.bytes(batch, self.capacity) // _ALIGNMENT) * _ALIGNMENT for cache in self._caches]
        memory = _zeros(sum(sizes))
        for cache, size in zip(self._caches, sizes, strict=True):
            buffer = _cache_in(memory, cache, batch, self.capacity)
            memory = memory[size:]
            self._buffers[cache.past] = buffer
            self._binding.bind_ortvalue_input(cache.past, buffer)
            self._binding.bind_ortvalue_output(cache.present, buffer)


def choose(logits: Logits, rng: np.random.Generator, temperature: float = 0.0, top_k: int = 0) -> Tokens:
    """One token for each row of logits.

    Args:
        logits: float32 [batch, vocab].
        rng: Where draws come from.
        temperature: 0 takes the largest logit, the first of equal ones; otherwise logits are divided by it.
        top_k: Draw among so many largest logits only; 0 for all.

    Returns:
        int64 [batch].
    """
    if temperature == 0:
        largest: Tokens = logits.argmax(axis=1)
        return largest
    scaled = logits.astype(np.float64) / temperature
    if 0 < top_k < logits.shape[1]:
        least = np.partition(scaled, -top_k, axis=1)[:, -top_k, None]
        scaled = np.where(scaled < least, -np.inf, scaled)
    # The largest of logits plus Gumbel noise is distributed as their softmax says.
    drawn: Tokens = (scaled + rng.gumbel(size=scaled.shape)).argmax(axis=1)
    return drawn


def _zeros(size: int) -> npt.NDArray[np.uint8]:
    """Bytes that begin at a cache line; pages that nobody writes to take no memory."""
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]


def _empty_cache(cache: _Cache, batch: int, tokens: int) -> onnxruntime.OrtValue:
    return _cache_in(_zeros(cache.bytes(batch, tokens)), cache, batch, tokens)


def _cache_in(memory: npt.NDArray[np.uint8], cache: _Cache, batch: int, tokens: int) -> onnxruntime.OrtValue:
    """The cache at the beginning of some memory, which it keeps alive."""
    array = memory[: cache.bytes(batch, tokens)].view(cache.dtype).reshape(cache.shape(batch, tokens))
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _find_caches(path: Path, session: onnxruntime.InferenceSession) -> tuple[list[_Cache], bool]:
    """The tensors of the cache, and whether each past may be the same buffer as its present."""
    model = load_model(path).model
    packed = {cache.past: cache for cache in packed_caches(model)}
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    found = {past: (present, size) for past, present, size in _attention_caches(model)}
    caches = []
    shared = True
    for name, value in inputs.items():
        if name in _FED:
            continue
        if name in packed:
            known = packed[name]
            caches.append(_Cache(name, known.present, np.uint8, known.kv_heads, known.key_size, known.layout))
            continue
        present, size = found.get(name, (_present_by_name(name), None))
        shared = shared and name in found
        if present not in outputs:
            raise SparamxError(f"{path}: a decoder session does not know what to give to the input {name}")
        if value.type not in ("tensor(float)", "tensor(float16)") or len(value.shape) != 4:
            raise SparamxError(
                f"{path}: {name} should be a float cache of 4 dimensions, not {value.type} {value.shape}"
            )
        heads, size = value.shape[1], value.shape[3] if isinstance(value.shape[3], int) else size
        if not isinstance(heads, int) or not isinstance(size, int):
            raise SparamxError(f"{path}: the graph does not tell how many heads {name} has, and of which size")
        caches.append(_Cache(name, present, _TYPES[value.type], heads, size))
    return caches, shared


def _present_by_name(past: str) -> str:
    """As optimum and torch's exporter name them: past_key_values.0.key and present.0.key, past_0 and present_0."""
    return past.replace("past_key_values", "present").replace("past", "present")


def _attention_caches(model: ir.Model) -> Iterator[tuple[str, str, int | None]]:
    """(past, present, size of a head) of every attention operator that reads and writes the graph's cache itself."""
    for node in model.graph:
        inputs = inputs_by_role(node)
        if len(node.outputs) < 3 or "seqlens_k" not in inputs:  # without it, the operator knows no lengths of rows
            continue
        size = key_size(node)
        for role, output in (("past_key", node.outputs[1]), ("past_value", node.outputs[2])):
            past = inputs.get(role)
            if past is not None and past.is_graph_input() and output.is_graph_output() and len(past.uses()) == 1:
                yield past.name or "", output.name or "", size
