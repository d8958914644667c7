// Packing of activations, one text for every level: a copy in fp32 (rounded to bf16 where the products want that) or
// bf16 itself, padded with zeros to whole tiles. The compiler vectorises these loops for each level's flags.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#include <stddef.h>
#include <stdint.h>

#include "format/layout.h"

namespace sparamx {
namespace {

inline uint32_t RoundedToBf16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t finite = magnitude > 0x7f800000u ? bits | 0x400000u : rounded;
  return magnitude < 0x00800000u ? 0u : finite & 0xffff0000u;
}

[[maybe_unused]] size_t RowBytesFp32(const PackedView& w) {
  return w.tiles * TileK(w.type) * sizeof(float);
}

[[maybe_unused]] void PackRowsFp32(const PackedView& w, const float* x, size_t rows, void* out, size_t out_row_bytes) {
  for (size_t m = 0; m < rows; ++m) {
    uint8_t* row = static_cast<uint8_t*>(out) + m * out_row_bytes;
    __builtin_memcpy(row, x + m * w.k, w.k * sizeof(float));
    __builtin_memset(row + w.k * sizeof(float), 0, RowBytesFp32(w) - w.k * sizeof(float));
  }
}

[[maybe_unused]] void PackRowsRounded(const PackedView& w, const float* x, size_t rows, void* out,
                                      size_t out_row_bytes) {
  for (size_t m = 0; m < rows; ++m) {
    uint32_t* row = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(out) + m * out_row_bytes);
    for (size_t i = 0; i < w.k; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, x + m * w.k + i, sizeof bits);
      row[i] = RoundedToBf16(bits);
    }
    __builtin_memset(row + w.k, 0, RowBytesFp32(w) - w.k * sizeof(float));
  }
}

#ifdef __AVX512BF16__
[[maybe_unused]] size_t RowBytesBf16(const PackedView& w) {
  return w.tiles * TileK(w.type) * 2;
}

// Rows of X as bf16. vcvtneps2bf16 rounds to nearest even and takes denormals as zero, as docs/numerics.md says.
[[maybe_unused]] void PackRowsBf16(const PackedView& w, const float* x, size_t rows, void* out, size_t out_row_bytes) {
  const size_t k = w.k;
  for (size_t m = 0; m < rows; ++m) {
    uint8_t* row = static_cast<uint8_t*>(out) + m * out_row_bytes;
    for (size_t i = 0; i < w.tiles * TileK(w.type); i += 16) {
      const size_t there = i >= k ? 0 : k - i < 16 ? k - i : 16;
      const __m512 v = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << there) - 1), x + m * k + (there ? i : 0));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * i), (__m256i)_mm512_cvtneps_pbh(v));
    }
  }
}
#endif

}  // namespace
}  // namespace sparamx
