// AVX-512 F, BW, DQ, VL without VBMI2 and VNNI (Skylake): the only expansion is vpexpandd, of 32-bit elements.
//
// Expanding a row of 16 fp32 weights: kmovw (port 5), vpexpandd (2 x port 5), popcnt. A row of 32 bf16 weights: every
// mask byte selects a row of a table in L1, the control of a vpshufb for the 128-bit lane that its 8 words fill; four
// loads each (three of them vinserti32x4 from memory, port 0 or 5) bring lanes and controls together, one vpshufb
// (port 5) moves the words, a shift and an and make two fp32 rows of them. (Widening to 32 bits, two vpexpandd and two
// vpermt2ps keep port 5 busy for 10 cycles: one row of X then takes half as long again.)
// Registers at larger M: 12 x 2 sums, 2 weight rows, broadcasts from memory. At M <= 8: one sum per row (4 at M = 1) of
// two strips. fp32 weights at M = 9 to 16: one sum per row of one strip, so that a tile's expansion overlaps the
// products of the one before (147 to 231 cycles a tile; through a panel 194 to 275, half of whose blocks are small).
//
// A row of 64 int8 weights: expand_bytes.h, then vpxord, vpabsb and vpcmpub make magnitudes and a mask of the negative;
// per row of X a masked vpsubb, vpmaddubsw (cannot saturate: both sides are at most 127), vpmaddwd with ones, vpaddd:
// as many operations as fp32 takes. Registers at M > 4: 6 x 2 sums, 2 weight rows and 2 masks.
//
// A row of 64 int4 weights: expand_bytes.h and a vpand (a vpsrlw more in the lower half of a tile); per row of X
// vpmaddubsw and vpaddw: codes as stored, at most 15, so 8 rows of sums of two products stay below 2^15. Registers at
// M > 4: 6 x 2 sums of 32 bits and as many of 16, 2 weight rows.
#include "kernels/avx512_integer.h"
#include "kernels/expand_bytes.h"
#include "kernels/expand_words.h"
#include "kernels/half.h"
#include "kernels/pack_rows.h"
#include "kernels/quantized_loop.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

struct Avx512Fp32 : Avx512Base {
  static constexpr size_t kDirectRows = 16;

  static constexpr int kSteps = 16;
  static constexpr size_t kPanelTileBytes = 16 * 64;

  template <bool Sparse>
  static SPARAMX_INLINE const uint8_t* Expand(Cursor* cursor, uint8_t* out) {
    const uint8_t* values = cursor->values;
    if (!Sparse) {
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) {
        _mm512_store_si512(out + row * 64, _mm512_loadu_si512(values + row * 64));
        Prefetch(values + row * 64 + kPrefetchBytes);
      }
      cursor->values = values + 16 * 64;
      return out;
    }
    Prefetch(cursor->masks + kPrefetchBytes / 8);
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) {
      const uint32_t mask = LoadU16(cursor->masks + 2 * row);
      const __m512i packed = _mm512_loadu_si512(values);
      _mm512_store_si512(out + row * 64, _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), packed));
      Prefetch(values + kPrefetchBytes);
      values += 4 * static_cast<size_t>(__builtin_popcount(mask));
    }
    cursor->masks += 32;
    cursor->values = values;
    return out;
  }
};

struct Avx512Bf16 : Avx512Base {
  static constexpr int kSteps = 32;
  static constexpr size_t kPanelTileBytes = 32 * 64;

  template <bool Sparse>
  static SPARAMX_INLINE const uint8_t* Expand(Cursor* cursor, uint8_t* out) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const uint8_t* values = cursor->values;
    if (Sparse) Prefetch(cursor->masks + kPrefetchBytes / 8);
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) {
      const uint8_t* masks = Sparse ? cursor->masks + 4 * row : nullptr;
      const __m512i pairs = Sparse ? ExpandByTable(values, masks) : _mm512_loadu_si512(values);
      _mm512_store_si512(out + row * 128, _mm512_slli_epi32(pairs, 16));
      _mm512_store_si512(out + row * 128 + 64, _mm512_and_si512(pairs, upper));
      Prefetch(values + kPrefetchBytes);
      values += Sparse ? 2 * static_cast<size_t>(__builtin_popcount(LoadU32(masks))) : 64;
    }
    if (Sparse) cursor->masks += 64;
    cursor->values = values;
    return out;
  }
};

struct Avx512Int8 : Avx512Integer {
  struct Weight {
    __m512i magnitudes;
    __mmask64 negative;
  };
  static constexpr bool kStoredCodes = false;

  static SPARAMX_INLINE Weight Signed(__m512i codes) {
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(CodeBias(WeightType::kInt8)));
    return {_mm512_abs_epi8(_mm512_xor_si512(codes, zero)), _mm512_cmplt_epu8_mask(codes, zero)};
  }
  static SPARAMX_INLINE Weight Weights(const uint8_t* tile, int row) {
    return Signed(_mm512_load_si512(tile + row * 64));
  }
  static SPARAMX_INLINE IntVec Dot(IntVec sum, const Weight& w, const uint8_t* x) {
    const __m512i codes = _mm512_set1_epi32(LoadInt(x));
    const __m512i signs = _mm512_mask_sub_epi8(codes, w.negative, _mm512_setzero_si512(), codes);
    const __m512i words = _mm512_maddubs_epi16(w.magnitudes, signs);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(words, _mm512_set1_epi16(1)));
  }

  template <bool Int4, bool Sparse>
  struct Stream {
    ByteStream<false, Sparse> codes;
    explicit Stream(const Cursor& start) : codes(start) {}
    SPARAMX_INLINE void BeginTile() { codes.BeginTile(); }
    SPARAMX_INLINE Weight Row(int row) { return Signed(codes.Row(row)); }
  };
  template <bool Int4, bool Sparse>
  static SPARAMX_INLINE void Expand(Cursor* cursor, uint8_t* out) {
    ExpandBytes<false, Sparse>(cursor, out);
  }
};

struct Avx512Int4 : Avx512Integer {
  struct IntVec {
    __m512i sums, words;
  };
  using Weight = __m512i;
  static constexpr bool kStoredCodes = true;
  static constexpr int kTurns = 1;
  template <bool Int4, bool Sparse>
  using Stream = ByteStream<true, Sparse>;

  static SPARAMX_INLINE IntVec ZeroInt() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  static SPARAMX_INLINE IntVec StartInt(int32_t v) { return {_mm512_set1_epi32(v), _mm512_setzero_si512()}; }
  static SPARAMX_INLINE IntVec LoadInts(const uint8_t* p) { return {_mm512_loadu_si512(p), _mm512_setzero_si512()}; }
  static SPARAMX_INLINE IntVec AddInt(const IntVec& a, const IntVec& b) {
    return {_mm512_add_epi32(a.sums, b.sums), a.words};
  }
  static SPARAMX_INLINE Weight Weights(const uint8_t* tile, int row) { return _mm512_load_si512(tile + row * 64); }
  static SPARAMX_INLINE IntVec Dot(const IntVec& sum, Weight w, const uint8_t* x) {
    return {sum.sums, _mm512_add_epi16(sum.words, _mm512_maddubs_epi16(w, _mm512_set1_epi32(LoadInt(x))))};
  }
  static SPARAMX_INLINE IntVec Settled(const IntVec& sum) {
    return {_mm512_add_epi32(sum.sums, _mm512_madd_epi16(sum.words, _mm512_set1_epi16(1))), _mm512_setzero_si512()};
  }
  static SPARAMX_INLINE Vec Flush(Vec sum, const IntVec& ints, Vec scales, float x_scale) {
    return Avx512Integer::Flush(sum, ints.sums, scales, x_scale);
  }
  template <bool Int4, bool Sparse>
  static SPARAMX_INLINE void Expand(Cursor* cursor, uint8_t* out) {
    ExpandBytes<true, Sparse>(cursor, out);
  }
};

}  // namespace

const Level kAvx512Level = {
    "avx512",
    kAvx2 | kAvx512,
    {
        {{"avx512", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<Avx512Fp32>, true}, {}},
        {{"avx512", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<Avx512Bf16>, true},
         {"avx512", 1, RowBytesFp32, PackRowsRounded, MultiplyStrips<Avx512Bf16>, true}},
        {{}, {}, {"avx512", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantized<Avx512Int8, false>, false}},
        {{}, {}, {"avx512", 1, RowBytesQuantized, PackRowsGrouped, MultiplyQuantized<Avx512Int4, true>, false}},
    },
    FinishRows,
    HalvesToFloats,
    FloatsToHalves,
    &kAvx512Attention,
    &kAvx512PackedAttention,
};

}  // namespace sparamx
