// The packed cache of attention, one row per key and value head: where its blocks stand, what its header says, and how
// a block is pruned and packed. docs/attention.md describes it byte by byte. No instruction-set code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/packed_format.h"

namespace sparamx {

// Tokens of a block: whole tiles of keys (16) and of values (32), and what a kernel takes at a time.
constexpr size_t kCacheBlock = 64;

struct CacheOptions {
  float key_sparsity = 0.0f, value_sparsity = 0.0f;  // the part of a block that is pruned, below 1
  size_t sink = 0;                                   // first tokens that are never pruned
  size_t recent = 0;                                 // last tokens that are not pruned
};

Status CheckCacheOptions(const CacheOptions& options);

// A row: header, packed blocks, dense blocks of the first tokens, dense blocks of the last ones (block b in place
// b mod tail_blocks). A dense block is bf16 tiles of the weight format: keys as a matrix [numbers][tokens], then values
// as [tokens][numbers]. A packed block is bitmap of the keys, bitmap of the values, keys, values.
struct CacheLayout {
  size_t key_size, value_size;
  size_t key_words, value_words;  // of a dense block, padding included
  size_t key_kept, value_kept;    // non-zeros of a packed block
  bool keys_sparse, values_sparse;
  size_t sink_blocks, recent, tail_blocks;
  size_t value_masks_at, key_values_at, value_values_at, packed_bytes;  // the keys' bitmap is at 0
  size_t dense_bytes;

  CacheLayout() = default;
  CacheLayout(const CacheOptions& options, size_t size_of_key, size_t size_of_value);

  // Blocks that are complete and older than the recent tokens.
  size_t ClosedBlocks(size_t tokens) const { return tokens < recent ? 0 : (tokens - recent) / kCacheBlock; }
  bool IsPacked(size_t block, size_t tokens) const { return block >= sink_blocks && block < ClosedBlocks(tokens); }
  // Packed blocks that a row of so many tokens has room for, at least.
  size_t PackedBlocks(size_t tokens) const;
  size_t RowBytes(size_t packed_blocks) const;
  // The packed blocks of a row of so many bytes; false: no row has that size.
  bool BlocksOfRow(size_t row_bytes, size_t* packed_blocks) const;
  // Tokens that a row holds at most.
  size_t Capacity(size_t packed_blocks) const;

  // Offsets in a row.
  size_t PackedAt(size_t block) const;
  size_t DenseAt(size_t block, size_t packed_blocks) const;

  // Words of a dense block.
  size_t KeyWord(size_t token, size_t i) const;
  size_t ValueWord(size_t token, size_t i) const;
};

// The tokens of a row that is not empty, or what is wrong with its header.
Status ReadCacheHeader(const CacheLayout& layout, const uint8_t* row, size_t packed_blocks, size_t* tokens);
void WriteCacheHeader(const CacheLayout& layout, size_t tokens, uint8_t* row);

// One token of a dense block, rounded to bf16.
void WriteCacheToken(const CacheLayout& layout, const float* key, const float* value, size_t token, uint8_t* dense);
// The tokens [first, last) of one dense block in another.
void CopyCacheTokens(const CacheLayout& layout, const uint8_t* from, size_t first, size_t last, uint8_t* dense);
void ZeroCacheTokens(const CacheLayout& layout, size_t first, size_t last, uint8_t* dense);

// Keeps the numbers of largest magnitude, the first in the block's order where magnitudes are equal.
void PackCacheBlock(const CacheLayout& layout, const uint8_t* dense, uint8_t* packed);

}  // namespace sparamx
