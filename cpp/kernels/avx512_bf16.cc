// AVX-512 with VBMI2 and BF16 (Zen 4 and 5, Sapphire Rapids and later without AMX): bf16 weights and activations meet in
// vdpbf16ps, two products per lane.
//
// A row of 32 weights: kmovd (port 5 on Intel), vpexpandw (2 x port 5), popcnt, a store and a load through L1 (on Zen 5 the
// result of an expand is slow to reach a floating-point unit: 6.8 cycles a row directly, 3.4 through L1), then one vdpbf16ps
// per row of X with its broadcast from memory (Zen 5: 0.75 cycles, Golden Cove: 1).
// Registers at M <= 16: one sum per row of X (4 at M = 1, 2 at M = 2 and 3). Above: 12 x 2 sums and 2 weight rows.
#include "kernels/avx512_vec.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

struct Bf16Bf16 : Avx512Base {
  static constexpr int kSteps = 16;
  static constexpr size_t kPanelTileBytes = 16 * 64;
  static constexpr size_t kPanelTiles = 16;

  static SPARAMX_INLINE Vec Multiply(Vec sum, Vec w, const uint8_t* x) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(LoadU32(x)));
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)pair);
  }

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
      const uint32_t mask = LoadU32(cursor->masks + 4 * row);
      const __m512i packed = _mm512_loadu_si512(values);
      _mm512_store_si512(out + row * 64, _mm512_maskz_expand_epi16(static_cast<__mmask32>(mask), packed));
      Prefetch(values + kPrefetchBytes);
      values += 2 * static_cast<size_t>(__builtin_popcount(mask));
    }
    cursor->masks += 64;
    cursor->values = values;
    return out;
  }
};

// Rows of X as bf16. vcvtneps2bf16 rounds to nearest even and takes denormals as zero, as docs/numerics.md says.
void PackRowsBf16(const float* x, size_t rows, size_t k, size_t padded_k, void* out, size_t out_row_bytes) {
  for (size_t m = 0; m < rows; ++m) {
    uint8_t* row = static_cast<uint8_t*>(out) + m * out_row_bytes;
    for (size_t i = 0; i < padded_k; i += 16) {
      const size_t there = i < k ? Min(16, k - i) : 0;
      const __m512 v = _mm512_maskz_loadu_ps(Avx512Base::Columns(there), x + m * k + (there ? i : 0));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * i), (__m256i)_mm512_cvtneps_pbh(v));
    }
  }
}

}  // namespace

const Level kAvx512Bf16Level = {
    "avx512_bf16",
    kAvx2 | kAvx512 | kAvx512Vbmi2 | kAvx512Bf16,
    {
        {},
        {{}, {"avx512_bf16", 2, PackRowsBf16, MultiplyStrips<Bf16Bf16>}},
        {},
        {},
    },
    FinishRows,
};

}  // namespace sparamx
