// The inverse of the packer, for tools and tests: a dense fp32 matrix from a checked view.
#include <cstring>

#include "format/for_each.h"
#include "format/number.h"
#include "format/packed_format.h"

namespace sparamx {
namespace {

float Decode(WeightType type, const uint8_t* values, uint64_t index) {
  if (type == WeightType::kFp32) {
    float f;
    std::memcpy(&f, values + 4 * index, sizeof f);
    return f;
  }
  uint16_t b;
  std::memcpy(&b, values + 2 * index, sizeof b);
  return FloatFromBf16(b);
}

void UnpackStrip(const PackedView& w, size_t strip, float* dense) {
  const size_t group = TileGroup(w.type), row_weights = kStripColumns * group;
  const uint8_t* masks = w.bitmap + strip * w.tiles * MaskBytesPerTile(w.type);
  uint64_t next = w.form == Form::kSparse ? ValuesBefore(w, strip, 0) : strip * w.tiles * TileWeights(w.type);
  for (size_t row = 0; row < w.tiles * kTileRows; ++row) {
    for (size_t e = 0; e < row_weights; ++e) {
      const uint64_t bit = row * row_weights + e;
      const bool stored = w.form == Form::kDense || (masks[bit / 8] >> (bit % 8) & 1) != 0;
      const float value = stored ? Decode(w.type, w.values, next++) : 0.0f;
      const uint64_t k = row * group + e % group, n = strip * kStripColumns + e / group;
      if (k < w.k && n < w.n) dense[k * w.n + n] = value;
    }
  }
}

}  // namespace

void Unpack(const PackedView& view, float* dense, unsigned threads) {
  ForEach(view.strips, threads, [&](size_t strip) { UnpackStrip(view, strip, dense); });
}

}  // namespace sparamx
