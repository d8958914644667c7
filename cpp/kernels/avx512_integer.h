// Integer sums of the AVX-512 levels: 16 int32, one register, and how they are scaled into fp32 sums.
#pragma once

#include "kernels/avx512_vec.h"
#include "kernels/quantized_loop.h"

namespace sparamx {
namespace {

struct Avx512Integer : Avx512Base {
  using IntVec = __m512i;
  static constexpr size_t kDirectRows = 4;
  static constexpr int kInt8Strips = 1;
  static constexpr size_t kBlockRows = 6;
  // An expanded row comes every 3 cycles or more, and an integer product takes 5: two turns suffice, and every turn
  // more costs an addition per segment.
  static constexpr int kTurns = 2;

  static SPARAMX_INLINE IntVec ZeroInt() { return _mm512_setzero_si512(); }
  static SPARAMX_INLINE IntVec StartInt(int32_t v) { return _mm512_set1_epi32(v); }
  static SPARAMX_INLINE IntVec LoadInts(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static SPARAMX_INLINE IntVec AddInt(IntVec a, IntVec b) { return _mm512_add_epi32(a, b); }
  static SPARAMX_INLINE IntVec Settled(IntVec sum) { return sum; }
  static SPARAMX_INLINE Vec Scales(const uint8_t* p, bool fp16) {
    if (fp16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_loadu_ps(p);
  }
  static SPARAMX_INLINE Vec Flush(Vec sum, IntVec ints, Vec scales, float x_scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), _mm512_mul_ps(scales, _mm512_set1_ps(x_scale)), sum);
  }
};

#ifdef __AVX512VNNI__
// vpdpbusd takes unsigned weights, as codes are stored: one instruction per row of X and strip.
struct Avx512Vnni : Avx512Integer {
  using Weight = __m512i;
  static constexpr bool kStoredCodes = true;

  static SPARAMX_INLINE Weight Weights(const uint8_t* tile, int row) { return _mm512_load_si512(tile + row * 64); }
  // Left alone, GCC 12 puts the expansions of eight rows before their products and runs out of registers: 4-bit weights
  // then take 23 % longer. What the barrier names is computed before what follows it.
  static SPARAMX_INLINE IntVec Dot(IntVec sum, Weight w, const uint8_t* x) {
    sum = _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(LoadInt(x)));
    __asm__ volatile("" : "+v"(sum));
    return sum;
  }
};
#endif

}  // namespace
}  // namespace sparamx
