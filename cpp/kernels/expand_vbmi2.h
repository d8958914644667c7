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

// 64 codes of 4 bits as bytes.
SPARAMX_INLINE __m512i WidenNibbles(const uint8_t* values) {
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  // (words | words << 4) & 15: the low nibble to the low byte, the high one to the high byte.
  return _mm512_ternarylogic_epi32(words, _mm512_slli_epi16(words, 4), _mm512_set1_epi8(15), 0xa8);
}

// The rows of a strip of 8-bit or 4-bit codes as stored, one a byte, with the code of zero in the holes.
template <bool Int4, bool Sparse>
class CodeStream {
 public:
  explicit CodeStream(const Cursor& start) : cursor_(start) {}

  SPARAMX_INLINE void BeginTile() {
    if (!Sparse) return;
    Prefetch(cursor_.masks + kPrefetchBytes / 4);
    Prefetch(cursor_.masks + kPrefetchBytes / 4 + 64);
  }

  // The next row; `row` is its number in the tile.
  SPARAMX_INLINE __m512i Row(int row) {
    const uint8_t* values = cursor_.values;
    if (row % (Int4 ? 4 : 2) == 0) Prefetch(values + kPrefetchBytes);
    const __m512i codes = Int4 ? WidenNibbles(values) : _mm512_loadu_si512(values);
    if (!Sparse) {
      cursor_.values = values + (Int4 ? 32 : 64);
      return codes;
    }
    const uint64_t mask = LoadU64(cursor_.masks);
    const auto count = static_cast<size_t>(__builtin_popcountll(mask));
    cursor_.masks += 8;
    cursor_.values = values + (Int4 ? (count + 1) / 2 : count);
    const __m512i holes = _mm512_set1_epi8(static_cast<char>(CodeBias(Int4 ? WeightType::kInt4 : WeightType::kInt8)));
    return _mm512_mask_expand_epi8(holes, mask, codes);
  }

  const Cursor& cursor() const { return cursor_; }

 private:
  Cursor cursor_;
};

// A tile of such rows in memory.
template <bool Int4, bool Sparse>
SPARAMX_INLINE void ExpandCodes(Cursor* cursor, uint8_t* out) {
  CodeStream<Int4, Sparse> stream(*cursor);
  stream.BeginTile();
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) _mm512_store_si512(out + row * 64, stream.Row(row));
  *cursor = stream.cursor();
}

}  // namespace
}  // namespace sparamx
