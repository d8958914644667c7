#include "runtime/cache_row.h"

#include <algorithm>
#include <cstring>

namespace sparamx {
namespace {

// Up to so many new tokens are written to a block one by one, and not with all of it.
constexpr size_t kFewTokens = 8;

CacheTiles TilesOf(size_t rows, size_t columns, const uint8_t* masks, const uint8_t* values, size_t kept) {
  return {masks, values, kept, CeilDiv(columns, kStripColumns), CeilDiv(rows, TileK(WeightType::kBf16))};
}

}  // namespace

// Tokens of the past row: more than `before` where the host takes some back.
size_t CacheRow::Stored() const {
  size_t stored = 0;
  if (before > 0) ReadCacheHeader(*layout, past, past_blocks, &stored);
  return stored;
}

void CacheRow::Prepare(size_t block) const {
  const CacheLayout& l = *layout;
  const size_t start = block * kCacheBlock;
  if (block >= first_open()) {
    uint8_t* const dense = Open(block);
    if (start >= before) {
      std::memset(dense, 0, l.dense_bytes);
      return;
    }
    std::memcpy(dense, past + l.DenseAt(block, past_blocks), l.dense_bytes);
    const size_t stored = Stored();
    if (stored > before) ZeroCacheTokens(l, before - start, std::min(stored - start, kCacheBlock), dense);
  } else if (present != nullptr && present != past) {
    if (l.IsPacked(block, before))
      std::memcpy(present + l.PackedAt(block), past + l.PackedAt(block), l.packed_bytes);
    else
      std::memcpy(present + l.DenseAt(block, present_blocks), past + l.DenseAt(block, past_blocks), l.dense_bytes);
  }
}

void CacheRow::Locate(size_t block, CacheTiles* keys, CacheTiles* values) const {
  const CacheLayout& l = *layout;
  if (block < first_open() && l.IsPacked(block, before)) {
    const uint8_t* const packed = past + l.PackedAt(block);
    *keys = TilesOf(l.key_size, kCacheBlock, l.keys_sparse ? packed : nullptr, packed + l.key_values_at, l.key_kept);
    *values = TilesOf(kCacheBlock, l.value_size, l.values_sparse ? packed + l.value_masks_at : nullptr,
                      packed + l.value_values_at, l.value_kept);
    return;
  }
  const uint8_t* const dense = block >= first_open() ? Open(block) : past + l.DenseAt(block, past_blocks);
  *keys = TilesOf(l.key_size, kCacheBlock, nullptr, dense, 0);
  *values = TilesOf(kCacheBlock, l.value_size, nullptr, dense + 2 * l.key_words, 0);
}

// Blocks that became old are packed before others take their places among the dense ones.
void CacheRow::Commit() const {
  const CacheLayout& l = *layout;
  for (size_t block = std::max(l.sink_blocks, l.ClosedBlocks(before)); block < l.ClosedBlocks(after); ++block)
    PackCacheBlock(l, block >= first_open() ? Open(block) : past + l.DenseAt(block, past_blocks),
                   present + l.PackedAt(block));
  const bool extends = present == past && after - before <= kFewTokens && Stored() == before;
  for (size_t block = first_open(); block < blocks(); ++block) {
    if (l.IsPacked(block, after)) continue;
    uint8_t* const dense = present + l.DenseAt(block, present_blocks);
    const size_t start = block * kCacheBlock;
    if (extends && start < before)
      CopyCacheTokens(l, Open(block), before - start, std::min(after - start, kCacheBlock), dense);
    else
      std::memcpy(dense, Open(block), l.dense_bytes);
  }
  if (present != past) ZeroUnused();
  WriteCacheHeader(l, after, present);
}

// What a fresh row has no tokens for.
void CacheRow::ZeroUnused() const {
  const CacheLayout& l = *layout;
  const size_t closed = std::max(l.sink_blocks, l.ClosedBlocks(after));
  const size_t packed = closed - l.sink_blocks;
  std::memset(present + l.PackedAt(closed), 0, (present_blocks - packed) * l.packed_bytes);
  for (size_t block = blocks(); block < l.sink_blocks; ++block)
    std::memset(present + l.DenseAt(block, present_blocks), 0, l.dense_bytes);
  for (size_t block = std::max(closed, blocks()); block < closed + l.tail_blocks; ++block)
    std::memset(present + l.DenseAt(block, present_blocks), 0, l.dense_bytes);
}

}  // namespace sparamx
