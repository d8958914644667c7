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

namespace sparamx {
namespace {

inline float FloatOfHalf(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const float small = static_cast<float>(magnitude) * 0x1p-24f;  // denormal halves
  uint32_t bits;
  __builtin_memcpy(&bits, &small, sizeof bits);
  if (magnitude >= 0x400u) bits = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
  if (magnitude > 0x7c00u) bits |= 0x400000u;  // as the instruction does: a quiet NaN
  bits |= (half & 0x8000u) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

inline uint16_t HalfOfFloat(float number) {
  uint32_t bits;
  __builtin_memcpy(&bits, &number, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 65536
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14: a carry out of the mantissa is right, up to infinity
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {
    float shifted;
    __builtin_memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;  // its last mantissa bit is 2^-24, that of denormal halves
    __builtin_memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000u;
  }
  return static_cast<uint16_t>(sign | half);
}

[[maybe_unused]] void HalvesToFloats(const uint16_t* in, size_t count, float* out) {
  size_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < count; ++i) out[i] = FloatOfHalf(in[i]);
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
    for (; i < columns; ++i) to[i] = HalfOfFloat(from[i]);
  }
}

}  // namespace
}  // namespace sparamx
