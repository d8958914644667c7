// Scales of int8 and int4 weights.
#pragma once

#include <vector>

#include "format/packed_format.h"

namespace sparamx {
namespace internal {

// Scales as [strips][groups][16], already rounded to the scale type. int8: the largest magnitude of an output / 127.
// int4: for every group the one of several candidates that leaves the smallest squared error, as
// docs/numerics.md weighs it. `given` (or null) are used instead as they are. Fails on weights that are not finite.
// Empty for types without scales.
Status ComputeScales(const SourceMatrix& source, const PackedView& geometry, const float* given, unsigned threads,
                     std::vector<float>* scales);

// The code of a weight, from -128 to 127 (-127 for the packer's own scales) or from -8 to 7: weight / scale to the
// nearest integer, ties to even.
int QuantizeInt8(float weight, float scale);
int QuantizeInt4(float weight, float scale);

}  // namespace internal
}  // namespace sparamx
