"""SparseAMXAttention in NumPy alone: what the C++ side is tested against.

Written from docs/attention.md, one query at a time in float64; it shares no code with the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

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
        output: [batch, tokens, num_heads * value size], float64. Padding of a first call gives zeros.
        present_key: [batch, kv_num_heads, capacity, size], float64: zeros beyond an entry's keys.
        present_value: Likewise.
        is_padding: [batch, tokens], bool: tokens that stand for nothing.
    """

    output: npt.NDArray[np.float64]
    present_key: npt.NDArray[np.float64]
    present_value: npt.NDArray[np.float64]
    is_padding: npt.NDArray[np.bool_]


def split_heads(x: Floats, heads: int) -> npt.NDArray[np.float64]:
    """[batch, tokens, heads * size] as [batch, heads, tokens, size], float64."""
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
    attention_bias: Floats | None = None,
    key_padding_mask: Integers | None = None,
    head_sink: Floats | None = None,
) -> AttentionResult:
    """The operator with the fp32 cache.

    Args:
        options: The attributes.
        query: [batch, tokens, num_heads * size], or, without key and value, query, key and value side by side.
        key: [batch, new keys, kv_num_heads * size].
        value: [batch, new keys, kv_num_heads * value size].
        past_key: [batch, kv_num_heads, past capacity, size].
        past_value: [batch, kv_num_heads, past capacity, value size].
        seqlens_k: [batch]: keys of each entry, past and new, minus one. None: all of the past counts.
        total_sequence_length: Keys of the longest entry. Equal to the new keys, it says that there is no past.
        cos_cache: [positions, half]; None: no rotation.
        sin_cache: Likewise.
        position_ids: [batch, tokens]; None: the number of keys before the token. Where there is no past, only the first
            one counts: all entries' tokens go on from it.
        attention_bias: [batch or 1, num_heads or 1, tokens, total], added to the scores after the softcap.
        key_padding_mask: [batch, total]; zero hides a key.
        head_sink: [num_heads]: one more score for every query of the head, without a value.

    Returns:
        The outputs, of which the cache holds max(total, past capacity) keys.

    Raises:
        SparamxError: The heads do not fit.
    """
    heads, kv_heads = options.num_heads, options.kv_num_heads
    if kv_heads < 1 or heads % kv_heads:
        raise SparamxError(f"{heads} query heads cannot share {kv_heads} key and value heads equally.")
    if key is None or value is None:
        size = query.shape[2] // (heads + 2 * kv_heads)
        query, key, value = np.split(query, [heads * size, (heads + kv_heads) * size], axis=2)
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
    scale = options.scale or 1 / np.sqrt(size)
    for b in range(batch):
        length = total if seqlens_k is None else int(seqlens_k[b]) + 1
        past = 0 if seqlens_k is not None and total == new_keys else length - new_keys
        fresh = min(new_keys, length - past)
        if past and past_key is not None and past_value is not None:
            present_key[b, :, :past], present_value[b, :, :past] = past_key[b, :, :past], past_value[b, :, :past]
        if options.causal:
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
            last = past + s + 1 if options.causal else length
            first = 0 if options.local_window_size < 0 else max(0, last - options.local_window_size)
            for h in range(heads):
                kv = h // (heads // kv_heads)
                scores = present_key[b, kv, first:last] @ rotated_q[h, s] * scale
                if options.softcap:
                    scores = options.softcap * np.tanh(scores / options.softcap)
                if attention_bias is not None:
                    bias = attention_bias[b % attention_bias.shape[0], h % attention_bias.shape[1], s]
                    scores = scores + bias[first:last]
                if key_padding_mask is not None:
                    scores = scores + np.where(key_padding_mask[b, first:last] != 0, 0.0, options.mask_filter_value)
                sink = None if head_sink is None else float(head_sink[h])
                weights = softmax(scores, 0.0 if sink is None and options.smooth_softmax else sink)
                output[b, s, h] = weights @ present_value[b, kv, first:last]
    return AttentionResult(output.reshape(batch, tokens, -1), present_key, present_value, is_padding)


def softmax(scores: npt.NDArray[np.float64], sink: float | None) -> npt.NDArray[np.float64]:
    """Weights that sum up to one, or less where a sink takes part; zeros where every score is minus infinity."""
    top = max(scores.max(initial=-np.inf), -np.inf if sink is None else sink)
    if top == -np.inf:
        return np.zeros_like(scores)
    weights = np.exp(scores - top)
    total = weights.sum() + (0.0 if sink is None else np.exp(sink - top))
    result: npt.NDArray[np.float64] = weights / total
    return result
