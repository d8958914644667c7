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
  static SPARAMX_INLINE Vec Scales(const uint8_t* p, ScaleType type, const uint8_t* columns) {
    if (type == ScaleType::kInt8) {
      const __m512i numbers = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(numbers), _mm512_loadu_ps(columns));
    }
    if (type == ScaleType::kFp16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_loadu_ps(p);
  }
  static SPARAMX_INLINE Vec Flush(Vec sum, IntVec ints, Vec scales, float x_scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), _mm512_mul_ps(scales, _mm512_set1_ps(x_scale)), sum);
  }
};

// PackRowsQuantized, the same bits, for rows of whole groups of 32: 8 ns a group from the caches, where the compiler's
// vectors take 14. The other threads wait for it.
[[maybe_unused]] void PackRowsGrouped(const PackedView& w, const float* x, size_t rows, void* out,
                                      size_t out_row_bytes) {
  if (w.group_size != 32 || w.k % 32 != 0) return PackRowsQuantized(w, x, rows, out, out_row_bytes);
  const QuantizedRowLayout layout = QuantizedLayout(w);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), most = _mm512_set1_epi32(127);
  const auto codes_of = [&](__m512 v, float inverse) __attribute__((always_inline)) {
    const __m512 shifted = _mm512_add_ps(_mm512_mul_ps(v, _mm512_set1_ps(inverse)), _mm512_set1_ps(12582912.0f));
    const __m512i codes = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x4b400000));  // see Nearest
    return _mm512_max_epi32(_mm512_min_epi32(codes, most), _mm512_sub_epi32(_mm512_setzero_si512(), most));
  };
  for (size_t m = 0; m < rows; ++m, x += w.k) {
    uint8_t* const row = static_cast<uint8_t*>(out) + m * out_row_bytes;
    for (size_t g = 0; g < w.groups; ++g) {
      const __m512 low = _mm512_loadu_ps(x + g * 32), high = _mm512_loadu_ps(x + g * 32 + 16);
      const float largest = FloatOfBits(
          _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                                   _mm512_and_si512(_mm512_castps_si512(high), magnitude))));
      __m512i low_codes = _mm512_setzero_si512(), high_codes = low_codes;
      float scale = largest < 0x1p-100f ? 0.0f : __builtin_nanf("");
      if (largest >= 0x1p-100f && largest < __builtin_inff()) {
        scale = largest / 127.0f;
        low_codes = codes_of(low, 127.0f / largest);
        high_codes = codes_of(high, 127.0f / largest);
      }
      const int32_t correction =
          -CodeBias(WeightType::kInt4) * _mm512_reduce_add_epi32(_mm512_add_epi32(low_codes, high_codes));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + g * 32), _mm512_cvtepi32_epi8(low_codes));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row + g * 32 + 16), _mm512_cvtepi32_epi8(high_codes));
      __builtin_memcpy(row + layout.scales_at + g * sizeof scale, &scale, sizeof scale);
      __builtin_memcpy(row + layout.corrections_at + g * sizeof correction, &correction, sizeof correction);
    }
    __builtin_memset(row + w.k, 0, layout.scales_at - w.k);
  }
}

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
