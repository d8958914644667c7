// Packing of activations as int8, one text for every level. A row of X becomes
//
//   codes        tiles * 64 bytes, zero beyond K
//   scales       one float per scale group: all of K (int8 weights), or the weights' groups (int4)
//   offset       int8 weights: one float, what a code of 0 means
//   corrections  one int32 per segment, the stretch of K whose products are summed as integers: a run (int8 weights),
//   or a
//                group (int4): minus the codes' sum times what stored weight codes are above their meaning
//
// docs/numerics.md says how codes, scales and offsets come about. A group whose largest magnitude is below 2^-100 is
// all zero; one with an infinite or undefined value has an undefined scale, which reaches every output.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "format/layout.h"

namespace sparamx {
namespace {

struct QuantizedRowLayout {
  size_t scale_groups, segments, segment_k;
  size_t scales_at, offset_at, corrections_at, bytes;
};

inline QuantizedRowLayout QuantizedLayout(const PackedView& w) {
  QuantizedRowLayout layout = {};
  layout.scale_groups = w.groups;
  layout.segment_k = w.group_size == 0 ? kRunK : w.group_size;
  layout.segments = CeilDiv(w.k, layout.segment_k);
  layout.scales_at = w.tiles * TileK(w.type);
  layout.offset_at = layout.scales_at + layout.scale_groups * sizeof(float);
  layout.corrections_at = layout.offset_at + (w.group_size == 0 ? sizeof(float) : 0);
  layout.bytes = layout.corrections_at + layout.segments * sizeof(int32_t);
  return layout;
}

[[maybe_unused]] size_t RowBytesQuantized(const PackedView& w) {
  return QuantizedLayout(w).bytes;
}

// The integer nearest to v, ties to even, for |v| < 2^22.
inline int32_t Nearest(float v) {
  const float shifted = v + 12582912.0f;  // 1.5 * 2^23: the low bits are the integer
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

inline float FloatOfBits(int32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

struct Quantized {
  float scale, offset;  // an element is scale * code + offset
};

// Quantizes a group to codes, centred where `centre` asks for it: then the codes span what lies between the least and
// the largest element (and zero), however far they are on one side of zero.
inline Quantized QuantizeGroup(const float* x, size_t count, bool centre, int8_t* codes) {
  // The largest magnitudes on both sides of zero. Magnitudes compare alike as floats and as integers, and the compiler
  // may vectorise only these.
  int32_t above_bits = 0, below_bits = 0;
  for (size_t i = 0; i < count; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    const int32_t below = (bits >> 31) & bits & 0x7fffffff;
    above_bits = above_bits > bits ? above_bits : bits;
    below_bits = below_bits > below ? below_bits : below;
  }
  const int32_t largest = above_bits > below_bits ? above_bits : below_bits;
  if (largest >= 0x7f800000 || FloatOfBits(largest) < 0x1p-100f) {
    __builtin_memset(codes, 0, count);
    const float scale = largest >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
    return {scale, scale};
  }
  const float above = FloatOfBits(above_bits) * 0.5f, below = FloatOfBits(below_bits) * 0.5f;
  const float half_range = centre ? above + below : FloatOfBits(largest);
  const float inverse = 127.0f / half_range, scale = half_range / 127.0f;
  const int32_t zero = centre ? Nearest((above - below) * inverse) : 0;  // the code of 0 is minus this
  for (size_t i = 0; i < count; ++i) {
    const int32_t code = Nearest(x[i] * inverse) - zero;
    const int32_t least = code < -127 ? -127 : code;
    codes[i] = static_cast<int8_t>(least > 127 ? 127 : least);
  }
  return {scale, scale * static_cast<float>(zero)};
}

[[maybe_unused]] void PackRowsQuantized(const PackedView& w, const float* x, size_t rows, void* out,
                                        size_t out_row_bytes) {
  const QuantizedRowLayout layout = QuantizedLayout(w);
  const size_t group_k = w.group_size == 0 ? w.k : w.group_size;
  for (size_t m = 0; m < rows; ++m) {
    uint8_t* row = static_cast<uint8_t*>(out) + m * out_row_bytes;
    auto* codes = reinterpret_cast<int8_t*>(row);
    auto* scales = reinterpret_cast<float*>(row + layout.scales_at);
    auto* corrections = reinterpret_cast<int32_t*>(row + layout.corrections_at);
    for (size_t g = 0; g < layout.scale_groups; ++g) {
      const size_t k0 = g * group_k;
      const size_t count = w.k - k0 < group_k ? w.k - k0 : group_k;
      const Quantized quantized = QuantizeGroup(x + m * w.k + k0, count, w.group_size == 0, codes + k0);
      scales[g] = quantized.scale;
      if (w.group_size == 0) __builtin_memcpy(row + layout.offset_at, &quantized.offset, sizeof(float));
    }
    __builtin_memset(codes + w.k, 0, layout.scales_at - w.k);
    for (size_t s = 0; s < layout.segments; ++s) {
      const size_t k0 = s * layout.segment_k;
      const size_t count = w.k - k0 < layout.segment_k ? w.k - k0 : layout.segment_k;
      int32_t sum = 0;
      for (size_t i = 0; i < count; ++i) sum += codes[k0 + i];
      corrections[s] = -CodeBias(w.type) * sum;
    }
  }
}

}  // namespace
}  // namespace sparamx
