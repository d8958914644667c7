// Expansion of 8-bit and 4-bit codes on AVX-512 without VBMI2, whose vpexpandb would do it in two operations.
//
// Four loads, one for every 16 weights of a row, bring the codes of each 128-bit lane into it; one vpshufb moves them
// to their places. Its control is the number of mask bits below each place. A byte per nibble of the mask, `base`,
// holds the bits of the lane below that nibble and, above them, the nibble's lower three bits; for 8 rows at once these
// cost 13 operations. Then a row spreads its 16 bases over 64 places (a broadcast load, vpshufb), adds the bits below
// the place within its nibble (vpsrlw, vpand, vpshufb as a table of 8 counts, vpaddb), and shuffles under the mask
// (kmovq, vpshufb).
//
// Per row: 3 vpshufb and a kmovq on port 5, 3 vinserti32x4 from memory and 3 more operations on port 0 or 5, four
// popcnt on port 1. Measured in L1, cycles per tile of 1024 weights, Granite Rapids: this 127; shuffles of 16 weights
// with controls from two tables of 4 KiB 198, with lanes inserted 190; pdep 275; vpexpandd of widened bytes 387;
// VBMI2 54.
#pragma once

#include "kernels/avx512_vec.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

SPARAMX_INLINE __m128i LoadLane(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Bits set in a number of four bits, as a table for vpshufb.
SPARAMX_INLINE __m512i BitCounts() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
}

// Where the packed bytes of a tile of 64-byte rows go.
class BytePlaces {
 public:
  SPARAMX_INLINE void Begin(const uint8_t* masks) {
    const __m512i nibble = _mm512_set1_epi8(15), low_three = _mm512_set1_epi8(0x70);
    for (int half = 0; half < 2; ++half) {
      const __m512i m = _mm512_loadu_si512(masks + 64 * half);
      const __m512i low = _mm512_shuffle_epi8(BitCounts(), _mm512_and_si512(m, nibble));
      const __m512i high = _mm512_shuffle_epi8(BitCounts(), _mm512_and_si512(_mm512_srli_epi16(m, 4), nibble));
      // The lower byte of every 16 mask bits counts for the upper one.
      const __m512i below_low = _mm512_slli_epi16(_mm512_add_epi8(low, high), 8);
      const __m512i below_high = _mm512_add_epi8(below_low, low);
      constexpr int kAndOr = 0xea;  // (a & b) | c
      const __m512i bases_low = _mm512_ternarylogic_epi32(_mm512_slli_epi16(m, 4), low_three, below_low, kAndOr);
      const __m512i bases_high = _mm512_ternarylogic_epi32(m, low_three, below_high, kAndOr);
      _mm512_store_si512(bases_ + 128 * half, _mm512_unpacklo_epi64(bases_low, bases_high));
      _mm512_store_si512(bases_ + 128 * half + 64, _mm512_unpackhi_epi64(bases_low, bases_high));
    }
    // Otherwise GCC takes the rows from registers, with two shuffles each in place of a broadcast load.
    __asm__ volatile("" : "+m"(bases_));
  }

  // The control of vpshufb for a row; places without a weight hold anything.
  SPARAMX_INLINE __m512i Row(int row) const {
    const __m512i spread = _mm512_set_epi32(0x0f0f0f0f, 0x07070707, 0x0e0e0e0e, 0x06060606, 0x0d0d0d0d, 0x05050505,
                                            0x0c0c0c0c, 0x04040404, 0x0b0b0b0b, 0x03030303, 0x0a0a0a0a, 0x02020202,
                                            0x09090909, 0x01010101, 0x08080808, 0x00000000);
    const __m512i below = _mm512_set1_epi32(0x07030100);  // the bits of a nibble that lie below each of its places
    // Even rows of each half come first: unpacking took them from the even quadwords.
    const uint8_t* bases = bases_ + row / 8 * 128 + row % 2 * 64 + row % 8 / 2 * 16;
    const __m512i base = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(LoadLane(bases)), spread);
    // Bits 4 to 6 of the sum are left overs, which vpshufb ignores.
    return _mm512_add_epi8(base, _mm512_shuffle_epi8(BitCounts(), _mm512_and_si512(_mm512_srli_epi16(base, 4), below)));
  }

 private:
  alignas(64) uint8_t bases_[256];
};

// The packed bytes of a row, those of every 16 weights in a lane of their own.
SPARAMX_INLINE __m512i GatherLanes(const uint8_t* values, uint64_t mask) {
  const uint8_t* second = values + __builtin_popcount(static_cast<uint16_t>(mask));
  const uint8_t* third = values + __builtin_popcount(static_cast<uint32_t>(mask));
  const uint8_t* fourth = values + __builtin_popcountll(mask << 16);
  __m512i lanes = _mm512_castsi128_si512(LoadLane(values));
  lanes = _mm512_inserti32x4(lanes, LoadLane(second), 1);
  lanes = _mm512_inserti32x4(lanes, LoadLane(third), 2);
  return _mm512_inserti32x4(lanes, LoadLane(fourth), 3);
}

// The rows of a strip of 8-bit or 4-bit codes as stored, one a byte, with the code of zero in the holes.
template <bool Int4, bool Sparse>
class ByteStream {
 public:
  explicit ByteStream(const Cursor& start) : cursor_(start) {}

  SPARAMX_INLINE void BeginTile() {
    tile_ = cursor_.values;
    if (!Sparse) return;
    Prefetch(cursor_.masks + kPrefetchBytes / 4);
    Prefetch(cursor_.masks + kPrefetchBytes / 4 + 64);
    places_.Begin(cursor_.masks);
  }

  // The next row; `row` is its number in the tile.
  SPARAMX_INLINE __m512i Row(int row) {
    if (Int4 && row == 8) {
      upper_end_ = cursor_.values;
      cursor_.values = tile_;
    }
    const uint8_t* values = cursor_.values;
    if (Int4 ? row < 8 : !Sparse || row % 2 == 0) Prefetch(values + kPrefetchBytes);
    __m512i codes;
    if (Sparse) {
      const uint64_t mask = LoadU64(cursor_.masks);
      constexpr int kZero = CodeBias(Int4 ? WeightType::kInt4 : WeightType::kInt8);
      const __m512i holes = _mm512_set1_epi8(static_cast<char>(kZero));
      codes = _mm512_mask_shuffle_epi8(holes, mask, Codes(GatherLanes(values, mask), row), places_.Row(row));
      cursor_.masks += 8;
      cursor_.values = values + __builtin_popcountll(mask);
    } else {
      codes = Codes(_mm512_loadu_si512(values), row);
      cursor_.values = values + 64;
    }
    if (Int4 && row == 15 && upper_end_ > cursor_.values) cursor_.values = upper_end_;
    return codes;
  }

  const Cursor& cursor() const { return cursor_; }

 private:
  // The codes of this row out of its bytes.
  static SPARAMX_INLINE __m512i Codes(__m512i bytes, int row) {
    if (!Int4) return bytes;
    if (row < 8) return _mm512_and_si512(bytes, _mm512_set1_epi8(0x0f));
    return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(0x0f));
  }

  Cursor cursor_;
  const uint8_t* tile_ = nullptr;
  const uint8_t* upper_end_ = nullptr;
  BytePlaces places_;
};

// A tile of such rows in memory.
template <bool Int4, bool Sparse>
SPARAMX_INLINE void ExpandBytes(Cursor* cursor, uint8_t* out) {
  ByteStream<Int4, Sparse> stream(*cursor);
  stream.BeginTile();
#pragma GCC unroll 16
  for (int row = 0; row < 16; ++row) _mm512_store_si512(out + row * 64, stream.Row(row));
  *cursor = stream.cursor();
}

}  // namespace
}  // namespace sparamx
