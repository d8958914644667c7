// Scales of int8 and int4 weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "format/number.h"
#include "format/packed_format.h"

namespace sparamx {
namespace internal {

struct Scales {
  std::vector<float> of_groups;   // [strips][groups][16], already rounded to the scale type
  std::vector<float> of_columns;  // int8 scales: [strips][16], what they are whole multiples of
};

// int8: the largest magnitude of an output / 127. int4: for every group the one of several candidates that leaves the
// smallest squared error, as docs/numerics.md weighs it. `given` (or null) are used instead as they are. Fails on
// weights that are not finite. Empty for types without scales.
Status ComputeScales(const SourceMatrix& source, const PackedView& geometry, const float* given, unsigned threads,
                     Scales* scales);

// What multiple of its column's scale an int8 scale is: -127 to 127, and 0 only where one of the two is 0.
inline float ScaleNumber(float scale, float column) {
  if (scale == 0.0f || column == 0.0f) return 0.0f;
  const float number = std::min(127.0f, std::max(-127.0f, RoundToInteger(scale / column)));
  return number == 0.0f ? std::copysign(1.0f, scale) : number;
}

// The code of a weight, from -128 to 127 (-127 for the packer's own scales) or from -8 to 7: weight / scale to the
// nearest integer, ties to even.
template <WeightType type>
float Quantize(float weight, float scale) {
  constexpr float kLeast = -CodeBias(type);
  const float code = RoundToInteger(weight / scale);
  const float bounded = std::min(-kLeast - 1.0f, std::max(kLeast, code));
  return scale == 0.0f ? 0.0f : bounded;
}

}  // namespace internal
}  // namespace sparamx
