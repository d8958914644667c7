// Attention with AVX2 and FMA.
//
// Register block: 6 rows x 16 columns = 12 sums, 2 registers of B, 1 broadcast. Turning 8 x 8 keys over takes 24
// shuffles (port 5).
#include "kernels/attention_loop.h"
#include "kernels/avx2_vec.h"

namespace sparamx {
namespace {

struct Avx2Attention : Avx2Lanes {
  static constexpr int kRows = 6;
  static constexpr int kVecs = 1;

  static SPARAMX_INLINE Vec Scale(const Vec& v, float by) {
    const __m256 factor = _mm256_set1_ps(by);
    return {_mm256_mul_ps(v.low, factor), _mm256_mul_ps(v.high, factor)};
  }
  static SPARAMX_INLINE Vec Multiply(const Vec& sum, const Vec& w, const float* x) {
    const __m256 broadcast = _mm256_broadcast_ss(x);
    return {_mm256_fmadd_ps(w.low, broadcast, sum.low), _mm256_fmadd_ps(w.high, broadcast, sum.high)};
  }
  static SPARAMX_INLINE Vec MultiplyVec(const Vec& sum, const Vec& w, const Vec& x) {
    return {_mm256_fmadd_ps(w.low, x.low, sum.low), _mm256_fmadd_ps(w.high, x.high, sum.high)};
  }
  static SPARAMX_INLINE void Reduce(const Vec (&v)[16], float* sums) {
#pragma GCC unroll 2
    for (int half = 0; half < 16; half += 8) {
      __m256 a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) a[i] = _mm256_add_ps(v[half + i].low, v[half + i].high);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) a[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]);
      const __m256 low = _mm256_hadd_ps(a[0], a[1]), high = _mm256_hadd_ps(a[2], a[3]);
      _mm256_storeu_ps(sums + half,
                       _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
    }
  }
  static SPARAMX_INLINE void Prefetch(const float* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }

  // 8 x 8, with zeros for keys and numbers that are not there.
  static SPARAMX_INLINE void Transpose8(const float* in, size_t stride, size_t keys, size_t numbers, float* out,
                                        size_t out_stride) {
    const __m256i mask = Columns(numbers, 0);
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; ++i) a[i] = i < keys ? _mm256_maskload_ps(in + i * stride, mask) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
      if (i < numbers) _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      if (i + 4 < numbers) _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }
  static SPARAMX_INLINE void Transpose(const float* in, size_t stride, size_t keys, size_t numbers, float* out,
                                       size_t out_stride) {
    for (size_t t = 0; t < 16; t += 8)
      for (size_t c = 0; c < numbers; c += 8)
        Transpose8(in + t * stride + c, stride, keys > t ? keys - t : 0, numbers - c, out + c * out_stride + t,
                   out_stride);
  }
};

}  // namespace

const AttentionKernel kAvx2Attention = {"avx2", Attend<Avx2Attention>};

}  // namespace sparamx
