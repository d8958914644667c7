// AVX2 with FMA (Haswell to Alder Lake, Zen to Zen 3): no expand instruction, so each byte of the bitmap selects a
// shuffle from a table in L1.
//
// Sixteen int8 or int4 weights: vpaddb of two table rows, vpxor, vpshufb, popcnt and the extraction of two mask bytes
// (int4: vpand and vpxor more, in the lower half of a tile a vpsrlw too). Measured in L1, Granite Rapids: 166 cycles
// per 1024 int8 weights; shuffles of 8 bytes 480, prefix sums in registers as in expand_bytes.h 194, pdep 275. Products
// of int8: vpabsb, vpsignb, vpmaddubsw (cannot saturate: both sides are at most 127), vpmaddwd with ones, vpaddd. Of
// int4: vpmaddubsw and vpaddw; codes as stored, at most 15, so 8 rows of sums of two products stay below 2^15. Eight
// fp32 weights: one table load (vpmovsxbd), vpermd (port 5), a shift and an andnot for the holes, popcnt. Eight bf16
// weights: one pshufb (port 5) with a 16-byte table row that zeroes the holes, then a shift and an and to two fp32
// rows. Registers: a strip is two ymm. M <= 4: 8 sums (4 chains at M = 1). Above: 6 rows x 1 strip = 12 sums, 2
// weights, 1 broadcast.
#include "kernels/avx2_vec.h"
#include "kernels/expand_words.h"
#include "kernels/half.h"
#include "kernels/pack_rows.h"
#include "kernels/quantized_loop.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

// lane[mask][i]: which packed element goes to position i, or a byte with the top bit set where the mask has no bit.
struct ShuffleTables {
  alignas(64) int8_t lane[256][8];  // for 32-bit elements, widened at use
  // For 16 bytes: the sum of a row for their first mask byte and one for the second. `first` holds in its upper half
  // how many bytes the lower half takes up.
  alignas(64) uint8_t first[256][16], second[256][16];
};

constexpr ShuffleTables MakeTables() {
  ShuffleTables t = {};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool set = (mask >> i & 1) != 0;
      t.lane[mask][i] = static_cast<int8_t>(set ? next : -128);
      t.first[mask][i] = t.second[mask][8 + i] = static_cast<uint8_t>(set ? next : 0x80);
      next += set;
    }
    for (int i = 8; i < 16; ++i) t.first[mask][i] = static_cast<uint8_t>(next);
  }
  return t;
}

constexpr ShuffleTables kTables = MakeTables();
constexpr size_t kPrefetchBytes = 1024;

SPARAMX_INLINE void Prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

struct Avx2Base : Avx2Lanes {
  static constexpr size_t kDirectRows = 4;
  static constexpr size_t kRowsOfTwoStrips = 0;
  static constexpr size_t kBlockRows = 6;
  static constexpr size_t kBlockStrips = 1;
  static constexpr int kStepBytes = 4;

  static SPARAMX_INLINE Vec Add(const Vec& a, const Vec& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  static SPARAMX_INLINE Vec Weights(const uint8_t* panel, int step) {
    const float* row = reinterpret_cast<const float*>(panel + step * 64);
    return {_mm256_loadu_ps(row), _mm256_loadu_ps(row + 8)};
  }
  static SPARAMX_INLINE Vec Multiply(const Vec& sum, const Vec& w, const uint8_t* x) {
    const __m256 broadcast = _mm256_broadcast_ss(reinterpret_cast<const float*>(x));
    return {_mm256_fmadd_ps(w.low, broadcast, sum.low), _mm256_fmadd_ps(w.high, broadcast, sum.high)};
  }
};

struct Avx2Fp32 : Avx2Base {
  static constexpr int kSteps = 16;
  static constexpr size_t kPanelTileBytes = 16 * 64;

  template <bool Sparse>
  static SPARAMX_INLINE const uint8_t* Expand(Cursor* cursor, uint8_t* out) {
    const uint8_t* values = cursor->values;
    if (Sparse) Prefetch(cursor->masks + kPrefetchBytes / 8);
#pragma GCC unroll 4
    for (int half = 0; half < 32; ++half) {
      __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
      Prefetch(values + kPrefetchBytes);
      if (Sparse) {
        const uint32_t mask = cursor->masks[half];
        const __m256i lanes =
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.lane[mask])));
        v = _mm256_andnot_si256(_mm256_srai_epi32(lanes, 31), _mm256_permutevar8x32_epi32(v, lanes));
        values += 4 * static_cast<size_t>(__builtin_popcount(mask));
      } else {
        values += 32;
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half * 32), v);
    }
    if (Sparse) cursor->masks += 32;
    cursor->values = values;
    return out;
  }
};

struct Avx2Bf16 : Avx2Base {
  static constexpr int kSteps = 32;
  static constexpr size_t kPanelTileBytes = 32 * 64;

  // Eight bf16: four columns of two parts.
  template <bool Sparse>
  static SPARAMX_INLINE __m128i Quarter(const uint8_t** values, uint32_t mask) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(*values));
    if (!Sparse) {
      *values += 16;
      return packed;
    }
    *values += 2 * static_cast<size_t>(__builtin_popcount(mask));
    return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kWordTable.places[mask])));
  }

  template <bool Sparse>
  static SPARAMX_INLINE const uint8_t* Expand(Cursor* cursor, uint8_t* out) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const uint8_t* values = cursor->values;
    if (Sparse) Prefetch(cursor->masks + kPrefetchBytes / 8);
#pragma GCC unroll 2
    for (int row = 0; row < 16; ++row) {
      Prefetch(values + kPrefetchBytes);
      for (int half = 0; half < 2; ++half) {
        const uint8_t* masks = Sparse ? cursor->masks + 4 * row + 2 * half : nullptr;
        const __m128i a = Quarter<Sparse>(&values, Sparse ? masks[0] : 0u);
        const __m128i b = Quarter<Sparse>(&values, Sparse ? masks[1] : 0u);
        const __m256i pairs = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
        uint8_t* at = out + row * 128 + half * 32;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_slli_epi32(pairs, 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 64), _mm256_and_si256(pairs, upper));
      }
    }
    if (Sparse) cursor->masks += 64;
    cursor->values = values;
    return out;
  }
};

// What int8 and int4 share: sums of 16 columns, and the expansion.
struct Avx2Integer : Avx2Base {
  struct Pair {
    __m256i low, high;
  };
  using Weight = Pair;
  static constexpr size_t kDirectRows = 2;
  static constexpr int kInt8Strips = 1;
  static constexpr size_t kRowsOfTwoStrips = 0;
  static constexpr size_t kBlockRows = 4;

  static SPARAMX_INLINE Weight Weights(const uint8_t* tile, int row) {
    const auto* p = reinterpret_cast<const __m256i*>(tile + row * 64);
    return {_mm256_load_si256(p), _mm256_load_si256(p + 1)};
  }
  static SPARAMX_INLINE __m256 Int8Scales(const uint8_t* p, const uint8_t* columns) {
    const __m256i numbers = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(numbers), _mm256_loadu_ps(reinterpret_cast<const float*>(columns)));
  }
  static SPARAMX_INLINE Vec Scales(const uint8_t* p, ScaleType type, const uint8_t* columns) {
    if (type == ScaleType::kInt8) return {Int8Scales(p, columns), Int8Scales(p + 8, columns + 32)};
    if (type == ScaleType::kFp16)
      return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
              _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
    return {_mm256_loadu_ps(reinterpret_cast<const float*>(p)), _mm256_loadu_ps(reinterpret_cast<const float*>(p) + 8)};
  }
  static SPARAMX_INLINE Vec FlushPair(const Vec& sum, const Pair& ints, const Vec& scales, float x_scale) {
    const __m256 xs = _mm256_set1_ps(x_scale);
    return {_mm256_fmadd_ps(_mm256_cvtepi32_ps(ints.low), _mm256_mul_ps(scales.low, xs), sum.low),
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints.high), _mm256_mul_ps(scales.high, xs), sum.high)};
  }

  // What is in a byte of values: an int8 code, or the int4 code in its lower or its upper half.
  enum class Code { kWhole, kLower, kUpper };

  // Bytes with the code of zero turned to 0, and how they become what the products want: numbers (int8) or codes as
  // stored (int4).
  template <Code code>
  static SPARAMX_INLINE __m128i ZeroBased(const uint8_t* values) {
    const __m128i zero = _mm_set1_epi8(static_cast<char>(code == Code::kWhole ? 0x80 : 0x88));
    return _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), zero);
  }
  template <Code code>
  static SPARAMX_INLINE __m128i Finished(__m128i bytes) {
    if (code == Code::kWhole) return bytes;
    const __m128i nibbles = code == Code::kUpper ? _mm_srli_epi16(bytes, 4) : bytes;
    return _mm_xor_si128(_mm_and_si128(nibbles, _mm_set1_epi8(15)), _mm_set1_epi8(8));
  }

  // Sixteen weights of which the mask bytes say which are there.
  template <Code code>
  static SPARAMX_INLINE void Spread(const uint8_t* values, const uint8_t* masks, uint8_t* out) {
    const __m128i places = _mm_add_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(kTables.first[masks[0]])),
                                        _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.second[masks[1]])));
    _mm_store_si128(reinterpret_cast<__m128i*>(out), Finished<code>(_mm_shuffle_epi8(ZeroBased<code>(values), places)));
  }

  // Eight rows; returns where the values after them are.
  template <Code code, bool Sparse>
  static SPARAMX_INLINE const uint8_t* ExpandHalf(const uint8_t* values, const uint8_t* masks, uint8_t* out) {
#pragma GCC unroll 2
    for (size_t row = 0; row < 8; ++row) {
      uint8_t* to = out + 64 * row;
      if (!Sparse || row % 2 == 0) Prefetch(values + kPrefetchBytes);
      if (!Sparse) {
        for (size_t i = 0; i < 64; i += 16)
          _mm_store_si128(reinterpret_cast<__m128i*>(to + i), Finished<code>(ZeroBased<code>(values + i)));
        values += 64;
        continue;
      }
      // Counted from the beginning of the row: four short chains instead of a long one, a sixth less time.
      const uint8_t* row_masks = masks + 8 * row;
      const uint64_t mask = LoadU64(row_masks);
      Spread<code>(values, row_masks, to);
      Spread<code>(values + __builtin_popcount(static_cast<uint16_t>(mask)), row_masks + 2, to + 16);
      Spread<code>(values + __builtin_popcount(static_cast<uint32_t>(mask)), row_masks + 4, to + 32);
      Spread<code>(values + __builtin_popcountll(mask << 16), row_masks + 6, to + 48);
      values += __builtin_popcountll(mask);
    }
    return values;
  }

  template <bool Int4, bool Sparse>
  static void Expand(Cursor* cursor, uint8_t* out) {
    if (Sparse) {
      Prefetch(cursor->masks + kPrefetchBytes / 2);
      Prefetch(cursor->masks + kPrefetchBytes / 2 + 64);
    }
    constexpr Code kUpperRows = Int4 ? Code::kLower : Code::kWhole, kLowerRows = Int4 ? Code::kUpper : Code::kWhole;
    const uint8_t* upper_end = ExpandHalf<kUpperRows, Sparse>(cursor->values, cursor->masks, out);
    const uint8_t* lower = Int4 ? cursor->values : upper_end;
    const uint8_t* lower_end = ExpandHalf<kLowerRows, Sparse>(lower, cursor->masks + 64, out + 512);
    cursor->values = upper_end > lower_end ? upper_end : lower_end;
    if (Sparse) cursor->masks += 128;
  }
};

struct Avx2Int8 : Avx2Integer {
  using IntVec = Pair;
  template <bool Int4, bool Sparse>
  using Stream = TileStream<Avx2Int8, Int4, Sparse>;
  static constexpr bool kStoredCodes = false;
  static constexpr int kTurns = 2;

  static SPARAMX_INLINE IntVec ZeroInt() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static SPARAMX_INLINE IntVec StartInt(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static SPARAMX_INLINE IntVec LoadInts(const uint8_t* p) {
    const auto* halves = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  static SPARAMX_INLINE IntVec AddInt(const IntVec& a, const IntVec& b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
  }
  static SPARAMX_INLINE __m256i DotHalf(__m256i sum, __m256i w, __m256i x) {
    const __m256i words = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
  }
  static SPARAMX_INLINE IntVec Dot(const IntVec& sum, const Weight& w, const uint8_t* x) {
    const __m256i codes = _mm256_set1_epi32(LoadInt(x));
    return {DotHalf(sum.low, w.low, codes), DotHalf(sum.high, w.high, codes)};
  }
  static SPARAMX_INLINE IntVec Settled(const IntVec& sum) { return sum; }
  static SPARAMX_INLINE Vec Flush(const Vec& sum, const IntVec& ints, const Vec& scales, float x_scale) {
    return FlushPair(sum, ints, scales, x_scale);
  }
};

struct Avx2Int4 : Avx2Integer {
  struct IntVec {
    __m256i low, high, words_low, words_high;
  };
  template <bool Int4, bool Sparse>
  using Stream = TileStream<Avx2Int4, Int4, Sparse>;
  static constexpr bool kStoredCodes = true;
  static constexpr int kTurns = 1;

  static SPARAMX_INLINE IntVec ZeroInt() { return StartInt(0); }
  static SPARAMX_INLINE IntVec StartInt(int32_t v) {
    return {_mm256_set1_epi32(v), _mm256_set1_epi32(v), _mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  static SPARAMX_INLINE IntVec LoadInts(const uint8_t* p) {
    const auto* halves = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1), _mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  static SPARAMX_INLINE IntVec AddInt(const IntVec& a, const IntVec& b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high), a.words_low, a.words_high};
  }
  static SPARAMX_INLINE IntVec Dot(const IntVec& sum, const Weight& w, const uint8_t* x) {
    const __m256i codes = _mm256_set1_epi32(LoadInt(x));
    return {sum.low, sum.high, _mm256_add_epi16(sum.words_low, _mm256_maddubs_epi16(w.low, codes)),
            _mm256_add_epi16(sum.words_high, _mm256_maddubs_epi16(w.high, codes))};
  }
  static SPARAMX_INLINE IntVec Settled(const IntVec& sum) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(sum.words_low, one)),
            _mm256_add_epi32(sum.high, _mm256_madd_epi16(sum.words_high, one)), _mm256_setzero_si256(),
            _mm256_setzero_si256()};
  }
  static SPARAMX_INLINE Vec Flush(const Vec& sum, const IntVec& ints, const Vec& scales, float x_scale) {
    return FlushPair(sum, {ints.low, ints.high}, scales, x_scale);
  }
};

}  // namespace

const Level kAvx2Level = {
    "avx2",
    kAvx2,
    {
        {{"avx2", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<Avx2Fp32>, true}, {}},
        {{"avx2", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<Avx2Bf16>, true},
         {"avx2", 1, RowBytesFp32, PackRowsRounded, MultiplyStrips<Avx2Bf16>, true}},
        {{}, {}, {"avx2", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantized<Avx2Int8, false>, false}},
        {{}, {}, {"avx2", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantized<Avx2Int4, true>, false}},
    },
    FinishRows,
    HalvesToFloats,
    FloatsToHalves,
    &kAvx2Attention,
    &kAvx2PackedAttention,
};

}  // namespace sparamx
