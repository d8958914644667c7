"""SparseAMXAttention with the packed cache in NumPy alone: what the C++ side is tested against, the cache bit by bit.

Written from docs/attention.md; it shares no code with the library.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packed_cache import BLOCK, HEADER_BYTES, CacheLayout, CacheOptions
from sparamx_onnx.ops.reference import round_to_bf16
from sparamx_onnx.ops.reference_attention import AttentionOptions, Floats, Integers, rotate, sparse_amx_attention

MAGIC = b"SPARAMXC"
FORMAT_VERSION = 1

_HEADER = struct.Struct("<8sIIIIIIIIQ16s")

Words = npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PackedAttentionResult:
    """The operator's outputs.

    Attributes:
        output: [batch, tokens, num_heads * value size], float64. Padding of a first call gives zeros.
        present_cache: [batch, kv_num_heads, bytes], uint8.
        is_padding: [batch, tokens], bool: tokens that stand for nothing.
    """

    output: npt.NDArray[np.float64]
    present_cache: Bytes
    is_padding: npt.NDArray[np.bool_]


def to_bf16(x: Floats) -> Words:
    """Rounded to bf16, as bits; zeros have no sign."""
    words = (round_to_bf16(np.asarray(x, np.float32)).view(np.uint32) >> 16).astype(np.uint16)
    return np.where(words == 0x8000, np.uint16(0), words)


def from_bf16(words: Words) -> Float32:
    """The numbers that bits of bf16 mean."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def to_tiles(matrix: Words) -> Words:
    """[K, N] as bf16 tiles of the weight format, strip after strip; K and N padded with zeros.

    Returns:
        [words].
    """
    k, n = matrix.shape
    tiles, strips = -(-k // 32), -(-n // 16)
    padded = np.pad(matrix, ((0, tiles * 32 - k), (0, strips * 16 - n)))
    return padded.reshape(tiles, 16, 2, strips, 16).transpose(3, 0, 1, 4, 2).reshape(-1)


def from_tiles(words: Words, k: int, n: int) -> Words:
    """The [K, N] of `to_tiles`."""
    tiles, strips = -(-k // 32), -(-n // 16)
    return words.reshape(strips, tiles, 16, 16, 2).transpose(1, 2, 4, 0, 3).reshape(tiles * 32, strips * 16)[:k, :n]


def chosen(words: Words, kept: int) -> npt.NDArray[np.bool_]:
    """Which of a block's words stay: the largest magnitudes, the first ones among equals."""
    keep = np.zeros(len(words), bool)
    keep[np.argsort(-(words & 0x7FFF).astype(np.int32), kind="stable")[:kept]] = True
    return keep


def _header(layout: CacheLayout, tokens: int) -> bytes:
    return _HEADER.pack(
        MAGIC, FORMAT_VERSION, BLOCK, layout.key_size, layout.value_size, layout.keys_kept, layout.values_kept,
        layout.sink_blocks, layout.options.recent, tokens, bytes(16),
    )  # fmt: skip


def _block_of(x: Words, block: int) -> Words:
    """64 tokens of [tokens, size], zeros beyond the last one."""
    part = x[block * BLOCK : (block + 1) * BLOCK]
    return np.pad(part, ((0, BLOCK - len(part)), (0, 0)))


def _packed_block(layout: CacheLayout, keys: Words, values: Words) -> bytes:
    """Bitmaps, then numbers, of words in tiles."""
    masks = contents = b""
    for words, kept, is_sparse in (
        (keys, layout.keys_kept, layout.keys_sparse),
        (values, layout.values_kept, layout.values_sparse),
    ):
        stored = words
        if is_sparse:
            keep = chosen(words, kept)
            masks += np.packbits(keep, bitorder="little").tobytes()
            stored = words[keep]
        contents += stored.tobytes() + bytes(-2 * len(stored) % 64)
    return masks + contents


def pack_row(layout: CacheLayout, keys: Words, values: Words, row_bytes: int) -> bytes:
    """A row that holds some tokens, all that can be pruned pruned.

    Args:
        layout: The layout.
        keys: [tokens, key size], bits of bf16.
        values: [tokens, value size], likewise.
        row_bytes: Bytes of the row.
    """
    tokens = len(keys)
    closed = layout.closed_blocks(tokens)
    packed = b""
    dense = [bytes(layout.dense_bytes)] * (layout.sink_blocks + layout.tail_blocks)
    for block in range(-(-tokens // BLOCK)):
        k, v = to_tiles(_block_of(keys, block).T), to_tiles(_block_of(values, block))
        if layout.sink_blocks <= block < closed:
            packed += _packed_block(layout, k, v)
        else:
            is_sink = block < layout.sink_blocks
            place = block if is_sink else layout.sink_blocks + block % layout.tail_blocks
            dense[place] = k.tobytes() + v.tobytes()
    room = row_bytes - HEADER_BYTES - len(dense) * layout.dense_bytes
    return _header(layout, tokens) + packed.ljust(room, b"\0") + b"".join(dense)


def _unpacked(layout: CacheLayout, block: bytes) -> tuple[Words, Words]:
    """Keys and values of a packed block, in tiles."""
    result = []
    for is_sparse, masks_at, at, kept, words in (
        (layout.keys_sparse, 0, layout.keys_at, layout.keys_kept, layout.key_words),
        (layout.values_sparse, layout.value_masks_at, layout.values_at, layout.values_kept, layout.value_words),
    ):
        stored = np.frombuffer(block, np.uint16, kept if is_sparse else words, at)
        if is_sparse:
            bitmap = np.frombuffer(block, np.uint8, words // 8, masks_at)
            keep = np.unpackbits(bitmap, bitorder="little").astype(bool)
            if keep.sum() != kept:
                raise SparamxError("A bitmap of the packed cache is damaged.")
            stored, full = np.zeros(words, np.uint16), stored
            stored[keep] = full
        result.append(stored)
    return result[0], result[1]


def unpack_row(layout: CacheLayout, row: Bytes) -> tuple[Words, Words]:
    """What `pack_row` packed, with zeros for what was pruned.

    Returns:
        [tokens, key size] and [tokens, value size], bits of bf16.

    Raises:
        SparamxError: The row is damaged.
    """
    data = row.tobytes()
    layout.capacity(len(data))
    if data[:HEADER_BYTES] == bytes(HEADER_BYTES):
        return np.zeros((0, layout.key_size), np.uint16), np.zeros((0, layout.value_size), np.uint16)
    (tokens,) = struct.unpack_from("<Q", data, 40)
    if data[:HEADER_BYTES] != _header(layout, tokens) or tokens > layout.capacity(len(data)):
        raise SparamxError("The header of the packed cache does not fit its node.")
    dense_at = len(data) - (layout.sink_blocks + layout.tail_blocks) * layout.dense_bytes
    closed = layout.closed_blocks(tokens)
    keys, values = [], []
    for block in range(-(-tokens // BLOCK)):
        if layout.sink_blocks <= block < closed:
            at = HEADER_BYTES + (block - layout.sink_blocks) * layout.packed_bytes
            k, v = _unpacked(layout, data[at : at + layout.packed_bytes])
        else:
            is_sink = block < layout.sink_blocks
            place = block if is_sink else layout.sink_blocks + block % layout.tail_blocks
            words = np.frombuffer(data, np.uint16, layout.dense_bytes // 2, dense_at + place * layout.dense_bytes)
            k, v = words[: layout.key_words], words[layout.key_words :]
        keys.append(from_tiles(k, layout.key_size, BLOCK).T)
        values.append(from_tiles(v, BLOCK, layout.value_size))
    return np.concatenate(keys)[:tokens], np.concatenate(values)[:tokens]


def packed_attention(
    options: AttentionOptions,
    cache: CacheOptions,
    query: Floats,
    key: Floats | None = None,
    value: Floats | None = None,
    past_cache: Bytes | None = None,
    seqlens_k: Integers | None = None,
    total_sequence_length: int | None = None,
    cos_cache: Floats | None = None,
    sin_cache: Floats | None = None,
    position_ids: Integers | None = None,
    attention_bias: Floats | None = None,
    key_padding_mask: Integers | None = None,
    head_sink: Floats | None = None,
) -> PackedAttentionResult:
    """The operator with the packed cache: bf16 keys and values, of which old blocks are pruned after each call.

    Args:
        options: The attributes.
        cache: Those of the cache.
        query: As in `sparse_amx_attention`, like all but the cache.
        key: Likewise.
        value: Likewise.
        past_cache: [batch, kv_num_heads, bytes], uint8; no bytes stand for no past.
        seqlens_k: [batch]; None: the cache says how many keys there are.
        total_sequence_length: Likewise.
        cos_cache: [positions, half]; keys are rotated in fp32, then rounded.
        sin_cache: Likewise.
        position_ids: [batch, tokens].
        attention_bias: [batch or 1, num_heads or 1, tokens, total].
        key_padding_mask: [batch, total].
        head_sink: [num_heads].

    Raises:
        SparamxError: The heads do not fit, or the cache is damaged.
    """
    heads, kv_heads = options.num_heads, options.kv_num_heads
    if key is None or value is None:
        size = query.shape[2] // (heads + 2 * kv_heads)
        query, key, value = np.split(query, [heads * size, (heads + kv_heads) * size], axis=2)
    batch, new_keys, _ = key.shape
    layout = CacheLayout(cache, key.shape[2] // kv_heads, value.shape[2] // kv_heads)
    is_first = seqlens_k is not None and total_sequence_length == new_keys
    if past_cache is None or past_cache.shape[2] == 0 or is_first:
        rows = [[unpack_row(layout, np.zeros(layout.row_bytes(0), np.uint8))] * kv_heads] * batch
    else:
        rows = [[unpack_row(layout, past_cache[b, h]) for h in range(kv_heads)] for b in range(batch)]
    pasts = [len(row[0][0]) for row in rows]
    if seqlens_k is not None and not is_first:
        pasts = [int(last) + 1 - new_keys for last in seqlens_k]
    past_key = np.zeros((batch, kv_heads, max(pasts, default=0), layout.key_size), np.float32)
    past_value = np.zeros((batch, kv_heads, max(pasts, default=0), layout.value_size), np.float32)
    for b, past in enumerate(pasts):
        for h, (keys, values) in enumerate(rows[b]):
            past_key[b, h, :past], past_value[b, h, :past] = from_bf16(keys[:past]), from_bf16(values[:past])
    if cos_cache is not None and sin_cache is not None:
        query, key = (
            _rotated(options, x, count, pasts, seqlens_k, is_first, cos_cache, sin_cache, position_ids)
            for x, count in ((query, heads), (key, kv_heads))
        )
    total = max(pasts, default=0) + new_keys if total_sequence_length is None else total_sequence_length
    result = sparse_amx_attention(
        dataclasses.replace(options, scale=options.scale or 1 / np.sqrt(layout.key_size)),
        query,
        from_bf16(to_bf16(key)),
        from_bf16(to_bf16(value)),
        past_key,
        past_value,
        seqlens_k,
        None if seqlens_k is None else total,
        attention_bias=attention_bias,
        key_padding_mask=key_padding_mask,
        head_sink=head_sink,
    )
    row_bytes = max(layout.row_bytes(total), 0 if past_cache is None else past_cache.shape[2])
    present = np.zeros((batch, kv_heads, row_bytes), np.uint8)
    for b in range(batch):
        length = total if seqlens_k is None else int(seqlens_k[b]) + 1
        for h in range(kv_heads):
            keys, values = (to_bf16(x[b, h, :length]) for x in (result.present_key, result.present_value))
            present[b, h] = np.frombuffer(pack_row(layout, keys, values, row_bytes), np.uint8)
    return PackedAttentionResult(result.output, present, result.is_padding)


def _rotated(
    options: AttentionOptions,
    x: Floats,
    heads: int,
    pasts: list[int],
    seqlens_k: Integers | None,
    is_first: bool,
    cos: Floats,
    sin: Floats,
    position_ids: Integers | None,
) -> Float32:
    """[batch, tokens, heads * size], rotated in fp32: what is rounded to bf16 must not depend on more precision."""
    batch, tokens, width = x.shape
    out = np.asarray(x, np.float32).copy()
    for b in range(batch):
        fresh = int(seqlens_k[b]) + 1 if is_first and seqlens_k is not None else tokens
        positions: Integers = np.arange(pasts[b], pasts[b] + fresh)
        if position_ids is not None:
            positions = position_ids[0, 0] + np.arange(fresh) if is_first else position_ids[b, :fresh]
        split = out[b, :fresh].reshape(fresh, heads, width // heads).transpose(1, 0, 2)
        rotated = rotate(split, positions, cos, sin, options.rotary_interleaved)
        out[b, :fresh] = rotated.transpose(1, 0, 2).reshape(fresh, width)
    return out
