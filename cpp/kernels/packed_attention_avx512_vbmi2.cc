// Attention over a packed cache with AVX-512 and VBMI2.
//
// A row of 32 words: kmovd (port 5), vpexpandw (2 x port 5), popcnt, a shift and an and to two fp32 rows, two stores.
// vdpbf16ps would take pairs as they are, but has half the rate of two FMAs where it was measured (Granite Rapids).
#include <immintrin.h>

#include "kernels/packed_attention_loop.h"

namespace sparamx {
namespace {

struct Vbmi2Packed {
  static constexpr const AttentionKernel* kAttention = &kAvx512Attention;

  template <bool Sparse>
  static SPARAMX_INLINE size_t Row(const uint8_t* masks, const uint8_t* values, float* even, float* odd) {
    __m512i pairs = _mm512_loadu_si512(values);
    size_t stored = 32;
    if (Sparse) {
      uint32_t mask;
      __builtin_memcpy(&mask, masks, sizeof mask);
      pairs = _mm512_maskz_expand_epi16(mask, pairs);
      stored = static_cast<size_t>(__builtin_popcount(mask));
    }
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    _mm512_storeu_si512(even, _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(odd, _mm512_and_si512(pairs, upper));
    _mm_prefetch(reinterpret_cast<const char*>(values + kPackedAheadBytes), _MM_HINT_T0);
    return stored;
  }
};

}  // namespace

const PackedAttentionKernel kAvx512Vbmi2PackedAttention = {"avx512_vbmi2", ExpandedBytes, AttendExpanded<Vbmi2Packed>};

}  // namespace sparamx
