// Packing of activations as int8, one text for every level. A row of X becomes
//
//   codes        tiles * 64 bytes, zero beyond K
//   scales       one float per scale group: all of K (int8 weights), or the weights' groups (int4)
//   corrections  one int32 per segment, the stretch of K whose products are summed as integers: a run (int8 weights),
//   or a
//                group (int4): minus the codes' sum times what stored weight codes are above their meaning
//
// The scale is amax / 127, a code x * (127 / amax) to the nearest integer, ties to even. A group whose largest
// magnitude is below 2^-100 is all zero; one with an infinite or undefined value has an undefined scale, which reaches
// every output.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "format/layout.h"

namespace sparamx {
namespace {

struct QuantizedRowLayout {
  size_t scale_groups, segments, segment_k;
  size_t scales_at, corrections_at, bytes;
};

inline QuantizedRowLayout QuantizedLayout(const PackedView& w) {
  QuantizedRowLayout layout = {};
  layout.scale_groups = w.groups;
  layout.segment_k = w.group_size == 0 ? kRunK : w.group_size;
  layout.segments = CeilDiv(w.k, layout.segment_k);
  layout.scales_at = w.tiles * TileK(w.type);
  layout.corrections_at = layout.scales_at + layout.scale_groups * sizeof(float);
  layout.bytes = layout.corrections_at + layout.segments * sizeof(int32_t);
  return layout;
}

[[maybe_unused]] size_t RowBytesQuantized(const PackedView& w) {
  return QuantizedLayout(w).bytes;
}

// Quantizes a scale group to codes and returns its scale.
inline float QuantizeGroup(const float* x, size_t count, int8_t* codes) {
  int32_t largest = 0;  // magnitudes compare alike as floats and as integers, and the compiler may vectorise only these
  for (size_t i = 0; i < count; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = largest > bits ? largest : bits;
  }
  float amax;
  __builtin_memcpy(&amax, &largest, sizeof amax);
  if (largest >= 0x7f800000 || amax < 0x1p-100f) {
    __builtin_memset(codes, 0, count);
    return largest >= 0x7f800000 ? __builtin_nanf("") : 0.0f;
  }
  const float inverse = 127.0f / amax;
  for (size_t i = 0; i < count; ++i) {
    const float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: the low bits are the rounded integer
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    codes[i] = static_cast<int8_t>(bits);
  }
  return amax / 127.0f;
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
      scales[g] = QuantizeGroup(x + m * w.k + k0, w.k - k0 < group_k ? w.k - k0 : group_k, codes + k0);
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
