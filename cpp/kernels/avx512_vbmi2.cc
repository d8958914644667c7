// AVX-512 with VBMI2 and VNNI but without BF16 (Ice Lake, Tiger Lake, Rocket Lake; int8 and int4 everywhere): bf16
// weights are expanded as words and become two fp32 rows by a shift and a mask.
//
// A row of 32 bf16 weights: kmovd (port 5), vpexpandw (2 x port 5), a shift, an and, popcnt; then two FMAs per row of
// X. fp32 weights have nothing to gain from VBMI2: the table entry is avx512's.
//
// A row of 64 codes (expand_vbmi2.h) is one vpdpbusd with a broadcast from memory per row of X. Registers at M <= 4: M
// integer and M float sums a strip (two strips of int8, one of int4), the code of zero, 2 matrices of int4. Per 1024
// weights of int4: 69 cycles at M = 1, 83 at 2, 116 at 4, of which 48 are port 5's for the expansion.
#include "kernels/avx512_integer.h"
#include "kernels/avx512_vec.h"
#include "kernels/expand_vbmi2.h"
#include "kernels/half.h"
#include "kernels/pack_rows.h"
#include "kernels/quantized_loop.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

struct Vbmi2Bf16 : Avx512Base {
  static constexpr int kSteps = 32;
  static constexpr size_t kPanelTileBytes = 32 * 64;

  template <bool Sparse>
  static SPARAMX_INLINE const uint8_t* Expand(Cursor* cursor, uint8_t* out) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const uint8_t* values = cursor->values;
    if (Sparse) Prefetch(cursor->masks + kPrefetchBytes / 8);
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) {
      __m512i pairs = _mm512_loadu_si512(values);
      if (Sparse) {
        const uint32_t mask = LoadU32(cursor->masks + 4 * row);
        pairs = _mm512_maskz_expand_epi16(static_cast<__mmask32>(mask), pairs);
        Prefetch(values + kPrefetchBytes);
        values += 2 * static_cast<size_t>(__builtin_popcount(mask));
      } else {
        Prefetch(values + kPrefetchBytes);
        values += 64;
      }
      _mm512_store_si512(out + row * 128, _mm512_slli_epi32(pairs, 16));
      _mm512_store_si512(out + row * 128 + 64, _mm512_and_si512(pairs, upper));
    }
    if (Sparse) cursor->masks += 64;
    cursor->values = values;
    return out;
  }
};

struct Vbmi2Quantized : Avx512Vnni {
  static constexpr int kInt8Strips = 2;

  template <bool Int4, bool Sparse>
  using Stream = CodeStream<Int4, Sparse>;

  template <bool Int4, bool Sparse>
  static SPARAMX_INLINE void Expand(Cursor* cursor, uint8_t* out) {
    ExpandCodes<Int4, Sparse>(cursor, out);
  }
};

}  // namespace

const Level kAvx512Vbmi2Level = {
    "avx512_vbmi2",
    kAvx2 | kAvx512 | kAvx512Vbmi2 | kAvx512Vnni | kGfni,
    {
        {},
        {{"avx512_vbmi2", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<Vbmi2Bf16>, true},
         {"avx512_vbmi2", 1, RowBytesFp32, PackRowsRounded, MultiplyStrips<Vbmi2Bf16>, true}},
        {{},
         {},
         {"avx512_vbmi2", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantized<Vbmi2Quantized, false>, false}},
        {{},
         {},
         {"avx512_vbmi2", 1, RowBytesQuantized, PackRowsGrouped, MultiplyQuantized<Vbmi2Quantized, true>, false}},
    },
    FinishRows,
    HalvesToFloats,
    FloatsToHalves,
    nullptr,
    &kAvx512Vbmi2PackedAttention,
};

}  // namespace sparamx
