// Attention over a packed block where products are in fp32: keys and values are expanded to matrices in scratch, which
// the level's attention kernel takes as it takes keys that are turned over already.
//
// An Isa has Row<Sparse>(masks, values, even, odd): expands 32 bf16 (two of each of 16 columns) to two rows of 16
// floats and returns how many were stored; and kAttention.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "format/layout.h"
#include "kernels/lanes.h"
#include "kernels/packed_attention_kernel.h"

namespace sparamx {
namespace {

constexpr size_t kTileDepth = TileK(WeightType::kBf16);
// What is asked for ahead of time: blocks stand one after the other, and their streams have no fixed stride.
[[maybe_unused]] constexpr size_t kPackedAheadBytes = 2048;

// out[tiles * 32][stride], of which each strip fills 16 columns. False: the bitmap is damaged.
template <class Isa, bool Sparse>
bool ExpandTiles(const CacheTiles& from, float* out, size_t stride) {
  const uint8_t* masks = from.masks;
  const uint8_t* values = from.values;
  for (size_t strip = 0; strip < from.strips; ++strip)
    for (size_t tile = 0; tile < from.tiles; ++tile) {
      float* rows = out + tile * kTileDepth * stride + strip * kStripColumns;
      for (size_t row = 0; row < kTileRows; ++row) {
        const size_t stored = Isa::template Row<Sparse>(masks, values, rows, rows + stride);
        if (Sparse) masks += 4;
        values += 2 * stored;
        rows += 2 * stride;
      }
    }
  return !Sparse || values == from.values + 2 * from.kept;
}

template <class Isa>
SPARAMX_INLINE bool ExpandMatrix(const CacheTiles& from, float* out, size_t stride) {
  return from.masks != nullptr ? ExpandTiles<Isa, true>(from, out, stride) : ExpandTiles<Isa, false>(from, out, stride);
}

size_t KeyFloats(size_t key_size) {
  return RoundUp(key_size, kTileDepth) * kKeyBlock;
}

size_t ExpandedBytes(size_t, size_t key_size, size_t value_size) {
  return (KeyFloats(key_size) + kKeyBlock * RoundUp(value_size, kStripColumns)) * sizeof(float);
}

template <class Isa>
size_t AttendExpanded(const PackedAttentionJob& packed) {
  AttentionJob job = packed.rows;
  job.turned = reinterpret_cast<float*>(packed.scratch);
  float* const values = job.turned + KeyFloats(job.key_size);
  job.k = nullptr;
  job.v = values;
  for (size_t i = 0; i < packed.count; ++i) {
    const PackedBlock& block = packed.blocks[i];
    job.v_stride = block.values.strips * kStripColumns;
    if (!ExpandMatrix<Isa>(block.keys, job.turned, kKeyBlock) || !ExpandMatrix<Isa>(block.values, values, job.v_stride))
      return i;
    job.first_key = block.first_key;
    job.keys = block.count;
    Isa::kAttention->attend(job);
  }
  return packed.count;
}

}  // namespace
}  // namespace sparamx
