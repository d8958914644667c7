// Expansion of a tile with VBMI2's vpexpandw and vpexpandb.
//
// A row of 32 weights: kmovd (port 5 on Intel), vpexpandw (2 x port 5), popcnt, a store. Through L1 even where the
// product could take the register: on Zen 5 the result of an expand is slow to reach a floating-point unit (6.8 cycles
// a row directly, 3.4 through L1), and AMX reads tiles from memory anyway.
#pragma once

#include "kernels/avx512_vec.h"
#include "kernels/quantized_loop.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

// Writes one tile (16 rows of 64 bytes) and advances.
template <bool Sparse>
SPARAMX_INLINE void ExpandWords(Cursor* cursor, uint8_t* out) {
  const uint8_t* values = cursor->values;
  if (!Sparse) {
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) {
      _mm512_store_si512(out + row * 64, _mm512_loadu_si512(values + row * 64));
      Prefetch(values + row * 64 + kPrefetchBytes);
    }
    cursor->values = values + 16 * 64;
    return;
  }
  Prefetch(cursor->masks + kPrefetchBytes / 8);
#pragma GCC unroll 16
  for (int row = 0; row < 16; row += 2) {
    const uint64_t masks = LoadU64(cursor->masks + 4 * row);
    const uint32_t low = static_cast<uint32_t>(masks), high = static_cast<uint32_t>(masks >> 32);
    const uint8_t* second = values + 2 * static_cast<size_t>(__builtin_popcount(low));
    _mm512_store_si512(out + row * 64, _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(values)));
    _mm512_store_si512(out + row * 64 + 64, _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(second)));
    Prefetch(values + kPrefetchBytes);
    values += 2 * static_cast<size_t>(__builtin_popcountll(masks));
  }
  cursor->masks += 64;
  cursor->values = values;
}

// `count` 4-bit codes as bytes; reads whole 32 bytes and may write up to 63 bytes more.
SPARAMX_INLINE void WidenNibbles(const uint8_t* values, size_t count, uint8_t* out) {
  const __m512i low = _mm512_set1_epi8(15);
  for (size_t i = 0; i < count; i += 64) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i / 2)));
    // (words | words << 4) & 15: the low nibble to the low byte, the high one to the high byte.
    _mm512_storeu_si512(out + i, _mm512_ternarylogic_epi32(words, _mm512_slli_epi16(words, 4), low, 0xa8));
  }
}

// 8-bit or 4-bit codes as stored, one a byte, with the code of zero in the holes.
template <bool Int4, bool Sparse>
SPARAMX_INLINE void ExpandCodes(QuantizedCursor* cursor, uint8_t* out) {
  if (!Sparse) {
    if (Int4) {
      WidenNibbles(cursor->values, 1024, out);
    } else {
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row)
        _mm512_store_si512(out + row * 64, _mm512_loadu_si512(cursor->values + row * 64));
    }
    for (size_t i = 0; i < (Int4 ? 512 : 1024); i += 64) Prefetch(cursor->values + kPrefetchBytes + i);
    cursor->values += Int4 ? 512 : 1024;
    return;
  }
  alignas(64) uint8_t widened[1024 + 128];
  const uint8_t* values = cursor->values;
  Prefetch(cursor->masks + kPrefetchBytes / 4);
  Prefetch(cursor->masks + kPrefetchBytes / 4 + 64);
  if (Int4) {
    size_t count = cursor->odd;
#pragma GCC unroll 16
    for (size_t i = 0; i < 128; i += 8) count += static_cast<size_t>(__builtin_popcountll(LoadU64(cursor->masks + i)));
    WidenNibbles(cursor->values, count, widened);
    values = widened + cursor->odd;
    for (size_t i = 0; i < count / 2; i += 64) Prefetch(cursor->values + kPrefetchBytes + i);
    cursor->values += count / 2;
    cursor->odd = count % 2;
  }
  const __m512i holes = _mm512_set1_epi8(static_cast<char>(CodeBias(Int4 ? WeightType::kInt4 : WeightType::kInt8)));
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) {
    const uint64_t mask = LoadU64(cursor->masks + 8 * row);
    _mm512_store_si512(out + row * 64, _mm512_mask_expand_epi8(holes, mask, _mm512_loadu_si512(values)));
    if (!Int4 && row % 2 == 0) Prefetch(values + kPrefetchBytes);
    values += __builtin_popcountll(mask);
  }
  cursor->masks += 128;
  if (!Int4) cursor->values = values;
}

}  // namespace
}  // namespace sparamx
