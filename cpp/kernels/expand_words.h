// Expansion of 16-bit words without VBMI2's vpexpandw: each byte of the bitmap selects a row of a table in L1, the
// control of a byte shuffle that moves eight words to their places and puts zeros in the holes.
#pragma once

#ifdef __AVX512BW__
#include <immintrin.h>
#endif
#include <stddef.h>
#include <stdint.h>

namespace sparamx {
namespace {

struct WordTable {
  alignas(64) uint8_t places[256][16];
};

constexpr WordTable MakeWordTable() {
  WordTable t = {};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool set = (mask >> i & 1) != 0;
      t.places[mask][2 * i] = static_cast<uint8_t>(set ? 2 * next : 0x80);
      t.places[mask][2 * i + 1] = static_cast<uint8_t>(set ? 2 * next + 1 : 0x80);
      next += set;
    }
  }
  return t;
}

constexpr WordTable kWordTable = MakeWordTable();

#ifdef __AVX512BW__
inline __attribute__((always_inline)) __m512i FourLanes(const uint8_t* a, const uint8_t* b, const uint8_t* c,
                                                        const uint8_t* d) {
  const auto load = [](const uint8_t* p) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  };
  __m512i lanes = _mm512_castsi128_si512(load(a));
  lanes = _mm512_inserti32x4(lanes, load(b), 1);
  lanes = _mm512_inserti32x4(lanes, load(c), 2);
  return _mm512_inserti32x4(lanes, load(d), 3);
}

// 32 words, of which the bitmap's four bytes say which are stored.
inline __attribute__((always_inline)) __m512i ExpandByTable(const uint8_t* values, const uint8_t* masks) {
  uint32_t mask;
  __builtin_memcpy(&mask, masks, sizeof mask);
  const uint8_t* second = values + 2 * static_cast<size_t>(__builtin_popcount(mask & 0xff));
  const uint8_t* third = values + 2 * static_cast<size_t>(__builtin_popcount(mask & 0xffff));
  const uint8_t* fourth = values + 2 * static_cast<size_t>(__builtin_popcount(mask & 0xffffff));
  const auto& places = kWordTable.places;
  return _mm512_shuffle_epi8(FourLanes(values, second, third, fourth),
                             FourLanes(places[masks[0]], places[masks[1]], places[masks[2]], places[masks[3]]));
}
#endif

}  // namespace
}  // namespace sparamx
