// One row of a packed cache in one call: where each block of tokens is read from, and what the row becomes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/packed_cache.h"
#include "kernels/packed_attention_kernel.h"

namespace sparamx {

// Attention reads blocks that were complete before the call where they lie in the past row. From the first one that was
// not, blocks are dense in scratch ("open"), new tokens included. When all is read, Commit brings them into the present
// row, which may be the past row's memory.
struct CacheRow {
  const CacheLayout* layout;
  const uint8_t* past;  // null: none
  size_t past_blocks;   // packed ones that it has room for
  uint8_t* present;     // null: none
  size_t present_blocks;
  uint8_t* open;         // dense blocks in scratch
  size_t before, after;  // tokens of this row before and after the call

  size_t first_open() const { return before / kCacheBlock; }
  size_t blocks() const { return CeilDiv(after, kCacheBlock); }
  uint8_t* Open(size_t block) const { return open + (block - first_open()) * layout->dense_bytes; }

  // Fills an open block with what the past has of it; copies another one to a present row of its own.
  void Prepare(size_t block) const;
  // The keys and values of a block.
  void Locate(size_t block, CacheTiles* keys, CacheTiles* values) const;
  void Commit() const;

 private:
  size_t Stored() const;
  void ZeroUnused() const;
};

}  // namespace sparamx
