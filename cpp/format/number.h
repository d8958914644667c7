// Conversions between fp32 and the 16-bit formats, bit by bit, so that every compiler and CPU rounds alike.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparamx {

inline uint32_t BitsOf(float f) {
  uint32_t b;
  std::memcpy(&b, &f, sizeof b);
  return b;
}

inline float FloatOf(uint32_t b) {
  float f;
  std::memcpy(&f, &b, sizeof f);
  return f;
}

// Nearest even; fp32 denormals become zero, as VCVTNEPS2BF16 makes them; NaN stays NaN.
inline uint16_t Bf16FromFloat(float f) {
  const uint32_t b = BitsOf(f);
  const auto magnitude = static_cast<int32_t>(b & 0x7fffffffu);  // signed: SSE2 compares nothing else
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const uint32_t nan = (b >> 16) | 0x40u;
  const uint32_t normal = magnitude > 0x7f800000 ? nan : rounded;
  return static_cast<uint16_t>(magnitude < 0x00800000 ? 0u : normal);
}

inline float FloatFromBf16(uint16_t b) {
  return FloatOf(static_cast<uint32_t>(b) << 16);
}

inline float FloatFromFp16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return FloatOf(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x0400u) {  // zero and denormals: exact as an integer times 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return FloatOf(sign | BitsOf(value));
  }
  return FloatOf(sign | ((magnitude << 13) + (112u << 23)));
}

// Nearest even; overflow becomes infinity, denormals are kept.
inline uint16_t Fp16FromFloat(float f) {
  const uint32_t b = BitsOf(f);
  const uint32_t sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the multiple of 2^-24, rounded, in the low bits
    return static_cast<uint16_t>(sign | (BitsOf(FloatOf(magnitude) + 0.5f) - BitsOf(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13));
}

// The nearest integer, ties to even, for |f| < 2^22.
inline float RoundToInteger(float f) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (f + kMagic) - kMagic;
}

}  // namespace sparamx
