// AVX2 with FMA (Haswell to Alder Lake, Zen to Zen 3): no expand instruction, so each byte of the bitmap selects a
// shuffle from a table in L1.
//
// Eight fp32 weights: one table load (vpmovsxbd), vpermd (port 5), a shift and an andnot for the holes, popcnt. Eight
// bf16 weights: one pshufb (port 5) with a 16-byte table row that zeroes the holes, then a shift and an and to two fp32
// rows. Registers: a strip is two ymm. M <= 4: 8 sums (4 chains at M = 1). Above: 6 rows x 1 strip = 12 sums, 2
// weights, 1 broadcast.
#include <immintrin.h>

#include "kernels/pack_rows.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

// lane[mask][i]: which packed element goes to position i, or a byte with the top bit set where the mask has no bit.
struct ShuffleTables {
  alignas(64) int8_t lane[256][8];    // for 32-bit elements, widened at use
  alignas(64) uint8_t word[256][16];  // for 16-bit elements, as pshufb takes it
};

constexpr ShuffleTables MakeTables() {
  ShuffleTables t = {};
  for (int mask = 0; mask < 256; ++mask) {
    int next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool set = (mask >> i & 1) != 0;
      t.lane[mask][i] = static_cast<int8_t>(set ? next : -128);
      t.word[mask][2 * i] = static_cast<uint8_t>(set ? 2 * next : 0x80);
      t.word[mask][2 * i + 1] = static_cast<uint8_t>(set ? 2 * next + 1 : 0x80);
      next += set;
    }
  }
  return t;
}

constexpr ShuffleTables kTables = MakeTables();
constexpr size_t kPrefetchBytes = 1024;

SPARAMX_INLINE void Prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

struct Avx2Base {
  struct Vec {
    __m256 low, high;
  };
  static constexpr size_t kDirectRows = 4;
  static constexpr size_t kBlockRows = 6;
  static constexpr size_t kBlockStrips = 1;
  static constexpr int kStepBytes = 4;

  static SPARAMX_INLINE __m256i Columns(size_t columns, int first) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(columns) - first), lane);
  }
  static SPARAMX_INLINE Vec Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static SPARAMX_INLINE Vec Add(const Vec& a, const Vec& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  static SPARAMX_INLINE Vec Load(const float* p, size_t columns) {
    if (columns >= 16) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
    return {_mm256_maskload_ps(p, Columns(columns, 0)), _mm256_maskload_ps(p + 8, Columns(columns, 8))};
  }
  static SPARAMX_INLINE void Store(float* p, size_t columns, const Vec& v) {
    if (columns >= 16) {
      _mm256_storeu_ps(p, v.low);
      _mm256_storeu_ps(p + 8, v.high);
      return;
    }
    _mm256_maskstore_ps(p, Columns(columns, 0), v.low);
    _mm256_maskstore_ps(p + 8, Columns(columns, 8), v.high);
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
  static constexpr size_t kPanelTiles = 16;

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
  static constexpr size_t kPanelTiles = 8;

  // Eight bf16: four columns of two parts.
  template <bool Sparse>
  static SPARAMX_INLINE __m128i Quarter(const uint8_t** values, uint32_t mask) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(*values));
    if (!Sparse) {
      *values += 16;
      return packed;
    }
    *values += 2 * static_cast<size_t>(__builtin_popcount(mask));
    return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.word[mask])));
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

}  // namespace

const Level kAvx2Level = {
    "avx2",
    kAvx2,
    {
        {{"avx2", 4, 1, PackRowsFp32, MultiplyStrips<Avx2Fp32>}, {}},
        {{"avx2", 4, 1, PackRowsFp32, MultiplyStrips<Avx2Bf16>},
         {"avx2", 4, 1, PackRowsRounded, MultiplyStrips<Avx2Bf16>}},
        {},
        {},
    },
    FinishRows,
};

}  // namespace sparamx
