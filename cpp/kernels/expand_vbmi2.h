// Expansion of a tile of 16-bit weights with VBMI2's vpexpandw.
//
// A row of 32 weights: kmovd (port 5 on Intel), vpexpandw (2 x port 5), popcnt, a store. Through L1 even where the
// product could take the register: on Zen 5 the result of an expand is slow to reach a floating-point unit (6.8 cycles
// a row directly, 3.4 through L1), and AMX reads tiles from memory anyway.
#pragma once

#include "kernels/avx512_vec.h"
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

}  // namespace
}  // namespace sparamx
