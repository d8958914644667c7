// The vector of the AVX2 level: 16 numbers, two registers.
#pragma once

#include <immintrin.h>
#include <stddef.h>

#include "kernels/lanes.h"

namespace sparamx {
namespace {

struct Avx2Lanes {
  struct Vec {
    __m256 low, high;
  };

  static SPARAMX_INLINE __m256i Columns(size_t columns, int first) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(columns) - first), lane);
  }
  static SPARAMX_INLINE Vec Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static SPARAMX_INLINE Vec Load(const float* p, size_t columns) {
    if (columns >= 16) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
    return {_mm256_maskload_ps(p, Columns(columns, 0)), _mm256_maskload_ps(p + 8, Columns(columns, 8))};
  }
  static SPARAMX_INLINE void Store(float* p, size_t columns, const Vec& v) {
    if (columns >= 16) {
      _mm256_storeu_ps(p, v.low);
      _mm256_storeu_ps(p + 8, v.high);
      return;
    }
    _mm256_maskstore_ps(p, Columns(columns, 0), v.low);
    _mm256_maskstore_ps(p + 8, Columns(columns, 8), v.high);
  }
};

}  // namespace
}  // namespace sparamx
