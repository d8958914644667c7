// Attention with AVX-512 F, BW, DQ, VL.
//
// Register block: 6 rows x 64 columns = 24 sums, 4 registers of B, broadcasts from memory. Turning 16 x 16 keys over
// takes 64 shuffles (port 5). Dot products: 4 rows x 4 keys = 16 sums, 4 keys, 1 row; 16 sums are added up with 30
// shuffles. A block of 64 keys of 128 numbers with 4 rows takes about 1500 cycles for the scores and 1100 for the sums,
// where a core takes 8000 to 12000 to read it from memory.
#include <immintrin.h>

#include "kernels/attention_loop.h"
#include "kernels/avx512_vec.h"

namespace sparamx {
namespace {

struct Avx512Attention : Avx512Lanes {
  static constexpr int kRows = 6;
  static constexpr int kVecs = 4;

  static SPARAMX_INLINE Vec Scale(Vec v, float by) { return _mm512_mul_ps(v, _mm512_set1_ps(by)); }
  static SPARAMX_INLINE Vec Multiply(Vec sum, Vec w, const float* x) {
    return _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sum);
  }
  static SPARAMX_INLINE Vec MultiplyVec(Vec sum, Vec w, Vec x) { return _mm512_fmadd_ps(w, x, sum); }
  // Pairs are added lane by lane until lane i of one vector is all of v[i]: 30 shuffles, 15 additions.
  static SPARAMX_INLINE void Reduce(const Vec (&v)[16], float* sums) {
    __m512 a[8], b[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
      b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    // Each 128-bit lane of b[i] now holds a quarter of the sums 4 i to 4 i + 3.
    const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
  }
  static SPARAMX_INLINE void Prefetch(const float* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }

  static SPARAMX_INLINE void Transpose(const float* in, size_t stride, size_t keys, size_t numbers, float* out,
                                       size_t out_stride) {
    const __mmask16 mask = Columns(numbers);
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; ++i) {
      a[i] = _mm512_maskz_loadu_ps(i < keys ? mask : static_cast<__mmask16>(0), in + (i < keys ? i * stride : 0));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    // a[4 * group + c] holds, in its 128-bit lane l, number 4 l + c of the group's four keys.
#pragma GCC unroll 4
    for (size_t c = 0; c < 4; ++c) {
      const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88);
      const __m512 odd_low = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
      const __m512 even_high = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
      const __m512 odd_high = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
      if (c < numbers) _mm512_storeu_ps(out + c * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
      if (c + 4 < numbers) _mm512_storeu_ps(out + (c + 4) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
      if (c + 8 < numbers)
        _mm512_storeu_ps(out + (c + 8) * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
      if (c + 12 < numbers)
        _mm512_storeu_ps(out + (c + 12) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
    }
  }
};

}  // namespace

const AttentionKernel kAvx512Attention = {"avx512", Attend<Avx512Attention>};

}  // namespace sparamx
