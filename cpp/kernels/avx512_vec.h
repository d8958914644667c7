// The 512-bit vector of the AVX-512 levels: 16 numbers, one register.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/lanes.h"

namespace sparamx {
namespace {

struct Avx512Lanes {
  using Vec = __m512;

  static SPARAMX_INLINE __mmask16 Columns(size_t columns) {
    return columns >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << columns) - 1);
  }
  static SPARAMX_INLINE Vec Zero() { return _mm512_setzero_ps(); }
  static SPARAMX_INLINE Vec Load(const float* p, size_t columns) { return _mm512_maskz_loadu_ps(Columns(columns), p); }
  static SPARAMX_INLINE void Store(float* p, size_t columns, Vec v) { _mm512_mask_storeu_ps(p, Columns(columns), v); }
};

// What matrix products add to it.
struct Avx512Base : Avx512Lanes {
  static constexpr size_t kDirectRows = 8;
  static constexpr size_t kRowsOfTwoStrips = 8;
  static constexpr size_t kBlockRows = 12;
  static constexpr size_t kBlockStrips = 2;
  static constexpr int kStepBytes = 4;

  static SPARAMX_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static SPARAMX_INLINE Vec Weights(const uint8_t* panel, int step) { return _mm512_loadu_ps(panel + step * 64); }
  static SPARAMX_INLINE Vec Multiply(Vec sum, Vec w, const uint8_t* x) {
    float broadcast;
    __builtin_memcpy(&broadcast, x, sizeof broadcast);
    return _mm512_fmadd_ps(w, _mm512_set1_ps(broadcast), sum);
  }
};

SPARAMX_INLINE uint32_t LoadU32(const uint8_t* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

SPARAMX_INLINE uint32_t LoadU16(const uint8_t* p) {
  uint16_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The packed stream has no fixed stride, which the hardware's prefetchers follow badly.
constexpr size_t kPrefetchBytes = 2048;

SPARAMX_INLINE void Prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace
}  // namespace sparamx
