// The inverse of the packer, for tools and tests: a dense fp32 matrix from a checked view.
#include <cstring>

#include "format/for_each.h"
#include "format/number.h"
#include "format/packed_format.h"

namespace sparamx {
namespace {

// What value number `index` means, without its scale.
float Decode(WeightType type, const uint8_t* values, uint64_t index) {
  switch (type) {
    case WeightType::kFp32: {
      float f;
      std::memcpy(&f, values + 4 * index, sizeof f);
      return f;
    }
    case WeightType::kBf16: {
      uint16_t b;
      std::memcpy(&b, values + 2 * index, sizeof b);
      return FloatFromBf16(b);
    }
    case WeightType::kInt8:
      return static_cast<float>(values[index] - CodeBias(type));
    case WeightType::kInt4:
      return static_cast<float>((values[index / 2] >> (index % 2 * 4) & 15) - CodeBias(type));
  }
  return 0;
}

float ScaleOf(const PackedView& w, size_t strip, uint64_t k, size_t column) {
  if (w.groups == 0) return 1.0f;
  const size_t group = w.group_size == 0 ? 0 : k / w.group_size;
  const size_t index = (strip * w.groups + group) * kStripColumns + column;
  float scale;
  if (w.scale_type == ScaleType::kInt8) {
    std::memcpy(&scale, w.column_scales + 4 * (strip * kStripColumns + column), sizeof scale);
    return static_cast<float>(static_cast<int8_t>(w.scales[index])) * scale;
  }
  if (w.scale_type == ScaleType::kFp16) {
    uint16_t half;
    std::memcpy(&half, w.scales + 2 * index, sizeof half);
    return FloatFromFp16(half);
  }
  std::memcpy(&scale, w.scales + 4 * index, sizeof scale);
  return scale;
}

void UnpackStrip(const PackedView& w, size_t strip, float* dense) {
  const size_t group = TileGroup(w.type), row_weights = kStripColumns * group;
  const uint8_t* masks = w.bitmap + strip * w.tiles * MaskBytesPerTile(w.type);
  uint64_t first = strip * w.tiles * TileWeights(w.type);  // code of the tile, in the dense form
  uint64_t taken[2] = {0, 0};                              // from the tile's halves
  for (size_t row = 0; row < w.tiles * kTileRows; ++row) {
    const size_t tile = row / kTileRows, half = row % kTileRows / (kTileRows / 2);
    if (row % kTileRows == 0) {
      first += StoredInTile(w.type, taken[0], taken[1]);
      taken[0] = taken[1] = 0;
      if (w.form == Form::kSparse && tile % TilesPerRun(w.type) == 0)
        first = ValuesBefore(w, strip, tile / TilesPerRun(w.type));
    }
    for (size_t e = 0; e < row_weights; ++e) {
      const uint64_t bit = row * row_weights + e;
      const bool stored = w.form == Form::kDense || (masks[bit / 8] >> (bit % 8) & 1) != 0;
      const uint64_t k = row * group + e % group, n = strip * kStripColumns + e / group;
      float value = 0.0f;
      if (stored) {
        const uint64_t in_tile = w.type == WeightType::kInt4 ? 2 * taken[half] + half : taken[0] + taken[1];
        value = Decode(w.type, w.values, first + in_tile);
        ++taken[half];
      }
      if (k < w.k && n < w.n) dense[k * w.n + n] = stored ? value * ScaleOf(w, strip, k, e / group) : 0.0f;
    }
  }
}

}  // namespace

void Unpack(const PackedView& view, float* dense, unsigned threads) {
  ForEach(view.strips, threads, [&](size_t strip) { UnpackStrip(view, strip, dense); });
}

}  // namespace sparamx
