// Scores of a row and some keys on their way to weights, one text for every level.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/attention_kernel.h"
#include "kernels/lanes.h"

namespace sparamx {
namespace {

constexpr size_t kVecFloats = 16;
constexpr float kMinusInfinity = -__builtin_inff();

SPARAMX_INLINE size_t Smaller(size_t a, size_t b) {
  return a < b ? a : b;
}

// x = cap * tanh(x / cap).
SPARAMX_INLINE void Softcap(float cap, Lanes* x) {
  Lanes e = *x * (2.0f / cap);
  Exp(&e);
  *x = cap - cap * 2.0f / (e + 1.0f);
}

// Halves are folded together until one number is left. By vectors: GCC 12 takes loops over the numbers through memory.
typedef float HalfLanes __attribute__((vector_size(32)));
typedef float QuarterLanes __attribute__((vector_size(16)));

SPARAMX_INLINE float Largest(const Lanes& x) {
  HalfLanes h[2];
  __builtin_memcpy(h, &x, sizeof h);
  h[0] = h[0] > h[1] ? h[0] : h[1];
  QuarterLanes q[2];
  __builtin_memcpy(q, h, sizeof q);
  q[0] = q[0] > q[1] ? q[0] : q[1];
  const float even = q[0][0] > q[0][2] ? q[0][0] : q[0][2], odd = q[0][1] > q[0][3] ? q[0][1] : q[0][3];
  return even > odd ? even : odd;
}

SPARAMX_INLINE float Sum(const Lanes& x) {
  HalfLanes h[2];
  __builtin_memcpy(h, &x, sizeof h);
  h[0] += h[1];
  QuarterLanes q[2];
  __builtin_memcpy(q, h, sizeof q);
  q[0] += q[1];
  return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

// exp, and exactly zero from where fp32 has no normal number left.
SPARAMX_INLINE void ExpOrZero(Lanes* x) {
  const Lanes v = *x;
  Exp(x);
  Lanes zero = {}, low;
  Splat(-87.0f, &low);
  *x = v < low ? zero : *x;
}

// Minus infinity hides whatever the score is.
SPARAMX_INLINE float Added(float score, float bias) {
  return bias == kMinusInfinity ? bias : score + bias;
}

// Softcap, biases, and minus infinity for keys that the row does not see or that are not there.
SPARAMX_INLINE void FinishScores(const AttentionJob& job, size_t r, Lanes (&x)[kKeyBlock / kVecFloats],
                                 size_t vectors) {
  float row[kKeyBlock];
  const VisibleKeys seen = job.visible[r];
  if (job.softcap > 0.0f)
    for (size_t n = 0; n < vectors; ++n) Softcap(job.softcap, &x[n]);
  if (job.bias != nullptr || job.mask != nullptr) {
    __builtin_memcpy(row, x, vectors * sizeof(Lanes));
    // Not beyond what the row sees: a bias may have fewer numbers than there are keys.
    const size_t biased = seen.last > job.first_key ? Smaller(job.keys, seen.last - job.first_key) : 0;
    for (size_t t = 0; t < biased; ++t) {
      if (job.bias != nullptr) row[t] = Added(row[t], job.bias[r][job.first_key + t]);
      if (job.mask != nullptr) row[t] = Added(row[t], job.mask[r][job.first_key + t]);
    }
    __builtin_memcpy(x, row, vectors * sizeof(Lanes));
  }
  const size_t end = job.first_key + job.keys;
  if (seen.first > job.first_key || seen.last < end || job.keys != vectors * kVecFloats) {
    __builtin_memcpy(row, x, vectors * sizeof(Lanes));
    for (size_t t = 0; t < vectors * kVecFloats; ++t)
      if (job.first_key + t < seen.first || job.first_key + t >= Smaller(seen.last, end)) row[t] = kMinusInfinity;
    __builtin_memcpy(x, row, vectors * sizeof(Lanes));
  }
}

// Whether a row does not see key t of the call.
SPARAMX_INLINE bool IsHidden(const AttentionJob& job, size_t r, size_t t) {
  const size_t key = job.first_key + t;
  return key < job.visible[r].first || key >= job.visible[r].last ||
         (job.bias != nullptr && job.bias[r][key] == kMinusInfinity) ||
         (job.mask != nullptr && job.mask[r][key] == kMinusInfinity);
}

// Whether a row may not see one of the keys [first, last). A value that is no number must not come out of such a key,
// whose weight is zero.
SPARAMX_INLINE bool MayHide(const AttentionJob& job, size_t first, size_t last) {
  if (job.bias != nullptr || job.mask != nullptr) return true;
  for (size_t r = 0; r < job.rows; ++r)
    if (job.visible[r].first > first || job.visible[r].last < last) return true;
  return false;
}

// Takes new scores into the row's largest one. Weights are exp(score - base); returns the factor for what was summed
// before.
SPARAMX_INLINE float RaiseLargest(const AttentionJob& job, size_t r, const Lanes& scores, float* base) {
  const float before = job.max[r], block = Largest(scores);
  const float now = block > before ? block : before;
  *base = now == kMinusInfinity ? 0.0f : now;  // nothing seen yet: all of exp(-inf - 0) are zeros
  Lanes factor;
  Splat(before - *base, &factor);
  ExpOrZero(&factor);
  job.max[r] = now;
  return factor[0];
}

}  // namespace
}  // namespace sparamx
