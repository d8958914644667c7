// Expansion of a tile with VBMI2's vpexpandw and vpexpandb, and GFNI's bit matrices.
//
// A row of 32 weights: kmovd (port 5 on Intel), vpexpandw (2 x port 5), popcnt, a store. Through L1 even where the
// product could take the register: on Zen 5 the result of an expand is slow to reach a floating-point unit (6.8 cycles
// a row directly, 3.4 through L1), and AMX reads tiles from memory anyway. (At M = 1 and 2 GCC 12 keeps rows in
// registers all the same; making it store them was no faster there.)
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
  const uint8_t* const masks = cursor->masks;
  Prefetch(masks + kPrefetchBytes / 8);
#pragma GCC unroll 16
  for (int row = 0; row < 16; row += 2) {
    const uint32_t low = LoadU32(masks + 4 * row), high = LoadU32(masks + 4 * row + 4);
    const uint8_t* second = values + 2 * static_cast<size_t>(__builtin_popcount(low));
    _mm512_store_si512(out + row * 64, _mm512_maskz_expand_epi16(low, _mm512_loadu_si512(values)));
    _mm512_store_si512(out + row * 64 + 64, _mm512_maskz_expand_epi16(high, _mm512_loadu_si512(second)));
    Prefetch(values + kPrefetchBytes);
    values += 2 * static_cast<size_t>(__builtin_popcountll(LoadU64(masks + 4 * row)));
  }
  cursor->masks = masks + 64;
  cursor->values = values;
}

enum class CodeForm { kStored, kSigned };

// 64 codes of 4 bits from the low or high halves of 64 bytes, as stored or as the signed numbers that they mean: bits
// are picked, inverted and copied (to extend the sign) by one affine map over GF(2), in which byte 7 - i of the matrix
// says which bits of the source make up bit i. Runs on port 0, where vpandd would compete with the expansion for 5.
template <bool High, CodeForm Form>
SPARAMX_INLINE __m512i Nibbles(__m512i bytes) {
  if (Form == CodeForm::kStored)
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(High ? 0x1020408000000000 : 0x0102040800000000), 0);
  return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(High ? 0x1020408080808080 : 0x0102040808080808), 0xf8);
}

// The rows of a strip of 8-bit or 4-bit codes, one a byte, with the code of zero in the holes. Of a 4-bit tile the
// lower eight rows are the high halves of the bytes whose low halves are the upper eight.
//
// A row of 64 sparse codes: kmovq (port 5), vpexpandb (2 x port 5), popcnt; of 4 bits vgf2p8affineqb (port 0) more.
//
// Of 8-bit codes, Ahead says how far ahead they are asked for, and EveryRow whether at every row or, as suits rows of
// half a line, at every second one.
template <bool Int4, bool Sparse, CodeForm Form = CodeForm::kStored, size_t Ahead = kPrefetchBytes,
          bool EveryRow = !Sparse>
class CodeStream {
 public:
  explicit CodeStream(const Cursor& start) : cursor_(start) {}

  SPARAMX_INLINE void BeginTile() {
    is_small_ = Int4 && Sparse && tile_ != nullptr && cursor_.values - tile_ <= kSmallTile;
    tile_ = cursor_.values;
    if (!Sparse) return;
    Prefetch(cursor_.masks + kMasksAhead);
    Prefetch(cursor_.masks + kMasksAhead + 64);
  }

  // The next row; `row` is its number in the tile.
  SPARAMX_INLINE __m512i Row(int row) {
    if (Int4 && row == 8) {
      upper_end_ = cursor_.values;
      cursor_.values = tile_;
    }
    const uint8_t* values = cursor_.values;
    if (Int4 && Sparse && is_small_) {
      if (row < 8 && row % 2 == 0) Prefetch(tile_ + kValuesAhead + row * 32);
      if (row == 7) Prefetch(tile_ + kValuesAhead + 256);
    } else if (Int4 ? row < 8 : EveryRow || row % 2 == 0) {
      Prefetch(values + kValuesAhead);
    }
    __m512i codes = _mm512_loadu_si512(values);
    if (Int4) codes = row < 8 ? Nibbles<false, Form>(codes) : Nibbles<true, Form>(codes);
    size_t count = 64;
    if (Sparse) {
      uint64_t mask = LoadU64(cursor_.masks);
      // Loaded once: GCC would let kmovq and popcnt load it each, and codes that cross lines keep the load ports busy.
      __asm__ volatile("" : "+r"(mask));
      constexpr int kBias = CodeBias(Int4 ? WeightType::kInt4 : WeightType::kInt8);
      codes = Form == CodeForm::kSigned
                  ? _mm512_maskz_expand_epi8(mask, codes)
                  : _mm512_mask_expand_epi8(_mm512_set1_epi8(static_cast<char>(kBias)), mask, codes);
      count = static_cast<size_t>(__builtin_popcountll(mask));
      cursor_.masks += 8;
    }
    cursor_.values = values + count;
    if (Int4 && row == 15 && upper_end_ > cursor_.values) cursor_.values = upper_end_;
    return codes;
  }

  const Cursor& cursor() const { return cursor_; }

 private:
  static_assert(Int4 || Form == CodeForm::kStored, "8-bit codes come as stored");
  // A 4-bit tile has fewer bytes and takes less time, so what is asked for in time lies further ahead (12 tiles).
  static constexpr size_t kValuesAhead = Int4 ? kPrefetchBytes * 3 / 2 : Ahead;
  static constexpr size_t kMasksAhead = Int4 ? kPrefetchBytes * 3 / 4 : Ahead / 4;

  // Up to so many bytes of 4-bit codes, five lines are asked for at every tile; of larger ones, one at every row, some
  // twice. What a tile takes is known when it has been read: the next ones are about as large.
  static constexpr ptrdiff_t kSmallTile = 5 * 64 - 16;

  Cursor cursor_;
  bool is_small_ = false;
  const uint8_t* tile_ = nullptr;  // where the present tile begins; at first none does
  const uint8_t* upper_end_ = nullptr;
};

// A tile of such rows in memory.
template <bool Int4, bool Sparse, CodeForm Form = CodeForm::kStored, size_t Ahead = kPrefetchBytes,
          bool EveryRow = !Sparse>
SPARAMX_INLINE void ExpandCodes(Cursor* cursor, uint8_t* out) {
  CodeStream<Int4, Sparse, Form, Ahead, EveryRow> stream(*cursor);
  stream.BeginTile();
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) _mm512_store_si512(out + row * 64, stream.Row(row));
  *cursor = stream.cursor();
}

}  // namespace
}  // namespace sparamx
