"""SparseAMXAttention in NumPy alone: what the C++ side is tested against.

Written from docs/attention.md, one query at a time in float64; it shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparamx_onnx.ops.errors import SparamxError

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]
Real = TypeVar("Real", np.float32, np.float64)


@dataclass(frozen=True)
class AttentionOptions:
    """The operator's attributes.

    Attributes:
        num_heads: Heads of the query.
        kv_num_heads: Heads of key and value; a divisor of ``num_heads``.
        scale: What scores are multiplied by; 0 takes one over the root of the head's size.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 leaves them.
        local_window_size: Keys that a query sees, its own included; -1 means all up to its own.
        causal: Whether a query sees no later key than its own.
        rotary_interleaved: Whether rotary pairs stand side by side rather than half the rotated numbers apart.
        smooth_softmax: Whether every query sees one more score, 0, that has no value.
        mask_filter_value: What a key that ``key_padding_mask`` hides adds to its scores.
    """

    num_heads: int
    kv_num_heads: int
    scale: float = 0.0
    softcap: float = 0.0
    local_window_size: int = -1
    causal: bool = True
    rotary_interleaved: bool = False
    smooth_softmax: bool = False
    mask_filter_value: float = -10000.0


@dataclass(frozen=True)
class AttentionResult:
    """The operator's outputs.

    Attributes:
        output: [batch, tokens, num_heads * value size], or [batch, num_heads, tokens, value size] where the query has
            four dimensions; float64. Padding of a first call gives zeros.
        present_key: [batch, kv_num_heads, capacity, size], float64: zeros beyond an entry's keys.
        present_value: Likewise.
        is_padding: [batch, tokens], bool: tokens that stand for nothing.
    """

    output: npt.NDArray[np.float64]
    present_key: npt.NDArray[np.float64]
    present_value: npt.NDArray[np.float64]
    is_padding: npt.NDArray[np.bool_]


def split_heads(x: Floats, heads: int) -> npt.NDArray[np.float64]:
    """[batch, tokens, heads * size] as [batch, heads, tokens, size], which may be there already; float64."""
    if x.ndim == 4:
        return x.astype(np.float64)
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads).transpose(0, 2, 1, 3).astype(np.float64)


def rotate(x: npt.NDArray[Real], positions: Integers, cos: Floats, sin: Floats, interleaved: bool) -> npt.NDArray[Real]:
    """Rotary position embedding, in the precision of ``x``.

    Args:
        x: [heads, tokens, size].
        positions: [tokens].
        cos: [all positions, half], as many pairs of numbers are rotated.
        sin: Likewise.
        interleaved: Whether pairs are (0, 1), (2, 3), ... rather than (0, half), (1, half + 1), ...

    Returns:
        [heads, tokens, size]; numbers beyond the pairs are unchanged.
    """
    half = cos.shape[1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    c, s = cos[positions].astype(x.dtype), sin[positions].astype(x.dtype)
    out = x.copy()
    out[..., first] = x[..., first] * c - x[..., second] * s
    out[..., second] = x[..., second] * c + x[..., first] * s
    return out


def sparse_amx_attention(
    options: AttentionOptions,
    query: Floats,
    key: Floats | None = None,
    value: Floats | None = None,
    past_key: Floats | None = None,
    past_value: Floats | None = None,
    seqlens_k: Integers | None = None,
    total_sequence_length: int | None = None,
    cos_cache: Floats | None = None,
    sin_cache: Floats | None = None,
    position_ids: Integers | None = None,
    attention_bias: npt.NDArray[Any] | None = None,
    key_padding_mask: Integers | None = None,
    head_sink: Floats | None = None,
    nonpad_kv_seqlen: Integers | None = None,
) -> AttentionResult:
    """The operator with the fp32 cache.

    Args:
        options: The attributes.
        query: [batch, tokens, num_heads * size] or [batch, num_heads, tokens, size]; without key and value, query, key
            and value side by side, in whole or, as [batch, tokens, heads, 3, size], at each head.
        key: [batch, new keys, kv_num_heads * size] or [batch, kv_num_heads, new keys, size]; without value, key and
            value side by side at each head: [batch, new keys, kv_num_heads, 2, size].
        value: [batch, new keys, kv_num_heads * value size] or [batch, kv_num_heads, new keys, value size].
        past_key: [batch, kv_num_heads, past capacity, size].
        past_value: [batch, kv_num_heads, past capacity, value size].
        seqlens_k: [batch]: keys of each entry, past and new, minus one. None: all of the past counts.
        total_sequence_length: Keys of the longest entry. Equal to the new keys, it says that there is no past.
        cos_cache: [positions, half]; None: no rotation.
        sin_cache: Likewise.
        position_ids: [batch, tokens]; None: the number of keys before the token. Where there is no past, only the first
            one counts: all entries' tokens go on from it.
        attention_bias: [batch, num_heads, tokens, keys], of which all but the last may be 1 or, in the front, missing;
            added to the scores after the softcap. As bool, false hides a key. Keys beyond are hidden.
        key_padding_mask: [batch, total] or [batch, tokens, total], where zero hides a key, or [batch]: keys that count.
        head_sink: [num_heads]: one more score for every query of the head, without a value.
        nonpad_kv_seqlen: [batch]: how many of the keys count, the last of them those of the queries. Without a past.

    Returns:
        The outputs, of which the cache holds max(total, past capacity) keys.

    Raises:
        SparamxError: The heads do not fit.
    """
    heads, kv_heads = options.num_heads, options.kv_num_heads
    if kv_heads < 1 or heads % kv_heads:
        raise SparamxError(f"{heads} query heads cannot share {kv_heads} key and value heads equally.")
    is_by_head = query.ndim == 4
    query, key, value = _query_key_value(options, query, key, value)
    q, k, v = split_heads(query, heads), split_heads(key, kv_heads), split_heads(value, kv_heads)
    batch, _, tokens, size = q.shape
    new_keys = k.shape[2]
    past_capacity = 0 if past_key is None else past_key.shape[2]
    total = past_capacity + new_keys if total_sequence_length is None else total_sequence_length
    capacity = max(total, past_capacity)
    output = np.zeros((batch, tokens, heads, v.shape[3]))
    present_key = np.zeros((batch, kv_heads, capacity, size))
    present_value = np.zeros((batch, kv_heads, capacity, v.shape[3]))
    is_padding = np.zeros((batch, tokens), bool)
    added = list(_added(attention_bias, key_padding_mask, options.mask_filter_value, (batch, heads, tokens, total)))
    scale = options.scale or 1 / np.sqrt(size)
    for b in range(batch):
        length = total if seqlens_k is None else int(seqlens_k[b]) + 1
        past = 0 if seqlens_k is not None and total == new_keys else length - new_keys
        before = past
        if nonpad_kv_seqlen is not None:
            length = int(nonpad_kv_seqlen[b])
            past, before = 0, length - tokens
        fresh = min(new_keys, length - past)
        if past and past_key is not None and past_value is not None:
            present_key[b, :, :past], present_value[b, :, :past] = past_key[b, :, :past], past_value[b, :, :past]
        if options.causal and seqlens_k is not None:
            is_padding[b, fresh:] = True
        rotated_q, rotated_k = q[b], k[b]
        if cos_cache is not None and sin_cache is not None:
            positions = np.arange(past, past + fresh)
            if position_ids is not None:
                is_first = seqlens_k is not None and total == new_keys
                positions = position_ids[0, 0] + np.arange(fresh) if is_first else position_ids[b, :fresh]
            rotated_q, rotated_k = (
                rotate(x[:, :fresh], positions, cos_cache, sin_cache, options.rotary_interleaved) for x in (q[b], k[b])
            )
        present_key[b, :, past:length] = rotated_k[:, :fresh]
        present_value[b, :, past:length] = v[b, :, :fresh]
        for s in range(tokens):
            if is_padding[b, s]:
                continue
            own = before + s + 1
            last = max(0, min(own, length)) if options.causal else length
            first = 0 if options.local_window_size < 0 else max(0, own - options.local_window_size)
            for h in range(heads):
                kv = h // (heads // kv_heads)
                scores = present_key[b, kv, first:last] @ rotated_q[h, s] * scale
                if options.softcap:
                    scores = options.softcap * np.tanh(scores / options.softcap)
                for numbers in added:
                    scores = scores + numbers[b, h, s, first:last]
                sink = None if head_sink is None else float(head_sink[h])
                weights = softmax(scores, 0.0 if sink is None and options.smooth_softmax else sink)
                output[b, s, h] = weights @ present_value[b, kv, first:last]
    shaped = output.transpose(0, 2, 1, 3) if is_by_head else output.reshape(batch, tokens, heads * v.shape[3])
    return AttentionResult(shaped, present_key, present_value, is_padding)


def _query_key_value(
    options: AttentionOptions, query: Floats, key: Floats | None, value: Floats | None
) -> tuple[Floats, Floats, Floats]:
    """Each with three or four dimensions."""
    heads, kv_heads = options.num_heads, options.kv_num_heads
    if query.ndim == 5:
        query, key, value = (query[:, :, :, i].transpose(0, 2, 1, 3) for i in range(3))
    elif key is None:
        axis = 1 if query.ndim == 4 else 2
        size = query.shape[axis] // (heads + 2 * kv_heads)
        query, key, value = np.split(query, [heads * size, (heads + kv_heads) * size], axis=axis)
    elif value is None:
        key, value = (key[:, :, :, i].transpose(0, 2, 1, 3) for i in range(2))
    return query, key, value


def _added(
    bias: npt.NDArray[Any] | None, mask: Integers | None, hidden: float, shape: tuple[int, ...]
) -> Iterator[npt.NDArray[np.float64]]:
    """What is added to the scores [batch, heads, tokens, keys]."""
    if bias is not None:
        numbers = np.where(bias, 0.0, -np.inf) if bias.dtype == np.bool_ else bias.astype(np.float64)
        beyond = [(0, 0)] * (bias.ndim - 1) + [(0, shape[3] - bias.shape[-1])]
        yield np.broadcast_to(np.pad(numbers, beyond, constant_values=-np.inf), shape)
    if mask is not None:
        if mask.ndim == 1:
            mask = (np.arange(shape[3]) < mask[:, None]).astype(np.int32)
        rows = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        yield np.broadcast_to(np.where(rows != 0, 0.0, hidden), shape)


def softmax(scores: npt.NDArray[np.float64], sink: float | None) -> npt.NDArray[np.float64]:
    """Weights that sum up to one, or less where a sink takes part; zeros where every score is minus infinity."""
    top = max(scores.max(initial=-np.inf), -np.inf if sink is None else sink)
    if top == -np.inf:
        return np.zeros_like(scores)
    weights = np.exp(scores - top)
    total = weights.sum() + (0.0 if sink is None else np.exp(sink - top))
    result: npt.NDArray[np.float64] = weights / total
    return result
