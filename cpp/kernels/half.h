// fp16 inputs and outputs: rows of X and the bias become fp32 before anything else is done with them, results fp16
// after everything else. Rounding is to nearest, ties to even; what is beyond 65504 rounds to infinity, NaN stays NaN.
//
// Per 16 numbers: vcvtph2ps 2 operations of port 5, vcvtps2ph 2 of ports 0 and 5 (AVX-512), twice that with F16C; about
// 10 integer operations each without (scalar level).
#pragma once

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#include <stddef.h>
#include <stdint.h>

#include "format/number.h"

namespace sparamx {
namespace {

[[maybe_unused]] void HalvesToFloats(const uint16_t* in, size_t count, float* out) {
  size_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < count; ++i) out[i] = FloatFromFp16(in[i]);
}

// Row by row: strides count elements.
[[maybe_unused]] void FloatsToHalves(const float* in, size_t in_stride, size_t rows, size_t columns, uint16_t* out,
                                     size_t out_stride) {
  for (size_t m = 0; m < rows; ++m) {
    const float* from = in + m * in_stride;
    uint16_t* to = out + m * out_stride;
    size_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= columns; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    for (; i + 8 <= columns; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < columns; ++i) to[i] = Fp16FromFloat(from[i]);
  }
}

}  // namespace
}  // namespace sparamx
