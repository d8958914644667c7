// Conversions between fp32 and the 16-bit formats, bit by bit, so that every compiler and CPU rounds alike. Kernel
// files include this header too, so its functions are static, as in layout.h.
#pragma once

#include <stdint.h>

namespace sparamx {

static inline uint32_t BitsOf(float f) {
  uint32_t b;
  __builtin_memcpy(&b, &f, sizeof b);
  return b;
}

static inline float FloatOf(uint32_t b) {
  float f;
  __builtin_memcpy(&f, &b, sizeof f);
  return f;
}

// Nearest even; fp32 denormals become zero, as VCVTNEPS2BF16 makes them; NaN stays NaN.
static inline uint16_t Bf16FromFloat(float f) {
  const uint32_t b = BitsOf(f);
  const auto magnitude = static_cast<int32_t>(b & 0x7fffffffu);  // signed: SSE2 compares nothing else
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const uint32_t nan = (b >> 16) | 0x40u;
  const uint32_t normal = magnitude > 0x7f800000 ? nan : rounded;
  return static_cast<uint16_t>(magnitude < 0x00800000 ? 0u : normal);
}

static inline float FloatFromBf16(uint16_t b) {
  return FloatOf(static_cast<uint32_t>(b) << 16);
}

// As vcvtph2ps: NaN becomes a quiet one.
static inline float FloatFromFp16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits = BitsOf(static_cast<float>(magnitude) * 0x1p-24f);  // exact for zero and denormals
  if (magnitude >= 0x400u) bits = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
  if (magnitude > 0x7c00u) bits |= 0x400000u;
  return FloatOf(bits | (half & 0x8000u) << 16);
}

// As vcvtps2ph: nearest even; overflow becomes infinity, denormals are kept, NaN becomes a quiet one.
static inline uint16_t Fp16FromFloat(float f) {
  const uint32_t b = BitsOf(f), magnitude = b & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 65536
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14: a carry out of the mantissa is right, up to infinity
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // adding 0.5 leaves the multiple of 2^-24, rounded, in the low bits
    half = BitsOf(FloatOf(magnitude) + 0.5f) - BitsOf(0.5f);
  }
  return static_cast<uint16_t>((b >> 16 & 0x8000u) | half);
}

// The nearest integer, ties to even, for |f| < 2^22.
static inline float RoundToInteger(float f) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (f + kMagic) - kMagic;
}

}  // namespace sparamx
