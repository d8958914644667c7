// Sixteen numbers in GCC's vector extension: one text for every level, the same bits from each (only +, -, *, / and
// selections; contraction to FMA is off for the whole project).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sparamx {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t LanesBits __attribute__((vector_size(64)));  // wraps around, as a NaN's bits may

#define SPARAMX_INLINE inline __attribute__((always_inline))

// v - 0 is v, whatever v is; GCC 12 makes sixteen insertions of a loop over the lanes.
SPARAMX_INLINE void Splat(float v, Lanes* out) {
  *out = v - Lanes{};
}

// exp(x), relative error below 2e-7 in [-87.3, 88.4]; saturates outside, NaN stays NaN.
SPARAMX_INLINE void Exp(Lanes* x) {
  Lanes low, high, magic;
  Splat(-87.3f, &low);
  Splat(88.4f, &high);
  Splat(12582912.0f, &magic);  // 1.5 * 2^23: adding it rounds to an integer, which the low mantissa bits then hold
  Lanes v = *x < low ? low : *x;
  v = v > high ? high : v;
  const Lanes shifted = v * 1.44269504f + magic;
  const Lanes n = shifted - magic;
  const Lanes r = v - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts: the first product is exact
  // A least-squares fit of exp on [-ln2/2, ln2/2] with the first two coefficients held at 1; error 4e-9.
  Lanes p = r * 1.37511501e-3f + 8.36898759e-3f;
  p = p * r + 4.16695438e-2f;
  p = p * r + 1.66665182e-1f;
  p = p * r + 4.99999881e-1f;
  p = p * r * r + r + 1.0f;
  const LanesBits exponent = ((LanesBits)shifted - (LanesBits)magic) << 23;
  const Lanes y = (Lanes)((LanesBits)p + exponent);
  *x = v == v ? y : v;  // the sum may be a number where v is not
}

}  // namespace
}  // namespace sparamx
