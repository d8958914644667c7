"""The packed cache of SparseAMXAttention: how many bytes it takes, and where its parts stand (docs/attention.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from sparamx_onnx.ops.errors import SparamxError

BLOCK: Final = 64
"""Tokens that are pruned and packed together."""

HEADER_BYTES: Final = 64

_ALIGNMENT: Final = 64
_KEY_TILE: Final = 32  # numbers of a key in a tile
_VALUE_STRIP: Final = 16  # numbers of a value in a tile
_MOST_TOKENS: Final = 1 << 24


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class CacheOptions:
    """The operator's attributes that say how a packed cache is pruned.

    Attributes:
        k_sparsity: The part of a block of keys that is pruned, from 0 to below 1.
        v_sparsity: Likewise of values.
        sink: So many first tokens, rounded up to whole blocks, are never pruned.
        recent: So many last tokens, at least, are not pruned yet.
    """

    k_sparsity: float = 0.0
    v_sparsity: float = 0.0
    sink: int = 0
    recent: int = 0


@dataclass(frozen=True)
class CacheLayout:
    """The bytes of one row: the cache of one key and value head.

    Attributes:
        options: How it is pruned.
        key_size: Numbers of a key.
        value_size: Numbers of a value.
    """

    options: CacheOptions
    key_size: int
    value_size: int

    def __post_init__(self) -> None:
        o = self.options
        if not (0 <= o.k_sparsity < 1 and 0 <= o.v_sparsity < 1):
            raise SparamxError("The sparsity of a cache is from 0 to below 1.")
        if not (0 <= o.sink <= _MOST_TOKENS and 0 <= o.recent <= _MOST_TOKENS):
            raise SparamxError(f"The sink and recent tokens of a cache are from 0 to {_MOST_TOKENS}.")
        if self.key_size < 1 or self.value_size < 1:
            raise SparamxError("A packed cache needs heads of some size.")

    @property
    def key_words(self) -> int:
        """Numbers of a dense block of keys, padding included."""
        return BLOCK * _round_up(self.key_size, _KEY_TILE)

    @property
    def value_words(self) -> int:
        """Numbers of a dense block of values, padding included."""
        return BLOCK * _round_up(self.value_size, _VALUE_STRIP)

    @property
    def keys_kept(self) -> int:
        """Numbers that stay of a packed block of keys."""
        return _kept(BLOCK * self.key_size, self.options.k_sparsity)

    @property
    def values_kept(self) -> int:
        """Numbers that stay of a packed block of values."""
        return _kept(BLOCK * self.value_size, self.options.v_sparsity)

    @property
    def keys_sparse(self) -> bool:
        """Whether packed blocks have a bitmap of the keys."""
        return self.keys_kept < BLOCK * self.key_size

    @property
    def values_sparse(self) -> bool:
        """Whether packed blocks have a bitmap of the values."""
        return self.values_kept < BLOCK * self.value_size

    @property
    def value_masks_at(self) -> int:
        """Where the values' bitmap begins in a packed block. The keys' is at 0."""
        return self.key_words // 8 if self.keys_sparse else 0

    @property
    def keys_at(self) -> int:
        """Where the keys begin in a packed block."""
        return self.value_masks_at + (self.value_words // 8 if self.values_sparse else 0)

    @property
    def values_at(self) -> int:
        """Where the values begin in a packed block."""
        return self.keys_at + _round_up(2 * (self.keys_kept if self.keys_sparse else self.key_words), _ALIGNMENT)

    @property
    def packed_bytes(self) -> int:
        """Bytes of a packed block."""
        return self.values_at + _round_up(
            2 * (self.values_kept if self.values_sparse else self.value_words), _ALIGNMENT
        )

    @property
    def dense_bytes(self) -> int:
        """Bytes of a dense block."""
        return 2 * (self.key_words + self.value_words)

    @property
    def sink_blocks(self) -> int:
        """Blocks that are never packed."""
        return -(-self.options.sink // BLOCK)

    @property
    def tail_blocks(self) -> int:
        """Dense blocks of the last tokens."""
        return -(-(self.options.recent + BLOCK - 1) // BLOCK)

    def closed_blocks(self, tokens: int) -> int:
        """How many blocks are complete and older than the recent tokens, when there are so many tokens."""
        return max(0, tokens - self.options.recent) // BLOCK

    def packed_blocks(self, tokens: int) -> int:
        """How many blocks are packed when there are so many tokens."""
        return max(0, self.closed_blocks(tokens) - self.sink_blocks)

    def row_bytes(self, tokens: int) -> int:
        """Bytes of the smallest row that holds so many tokens: the last dimension of the cache tensor."""
        dense = (self.sink_blocks + self.tail_blocks) * self.dense_bytes
        return HEADER_BYTES + self.packed_blocks(tokens) * self.packed_bytes + dense

    def capacity(self, row_bytes: int) -> int:
        """Tokens that a row holds at most.

        Raises:
            SparamxError: No row has so many bytes.
        """
        blocks, rest = divmod(row_bytes - self.row_bytes(0), self.packed_bytes)
        if blocks < 0 or rest:
            raise SparamxError(f"No row of a packed cache with these options has {row_bytes} bytes.")
        return (self.sink_blocks + blocks + 1) * BLOCK + self.options.recent - 1


def _kept(numbers: int, sparsity: float) -> int:
    """What stays; the operator's attribute is a 32-bit float."""
    return numbers - math.floor(numbers * float(np.float32(sparsity)) + 0.5)
