// Attention over a packed cache with AVX-512 F, BW, DQ, VL.
//
// A row of 32 words: expand_words.h (four loads, three of them inserts on port 0 or 5, as many for the control, one
// vpshufb on port 5), a shift and an and to two fp32 rows, two stores.
#include <immintrin.h>

#include "kernels/expand_words.h"
#include "kernels/packed_attention_loop.h"

namespace sparamx {
namespace {

struct Avx512Packed {
  static constexpr const AttentionKernel* kAttention = &kAvx512Attention;

  template <bool Sparse>
  static SPARAMX_INLINE size_t Row(const uint8_t* masks, const uint8_t* values, float* even, float* odd) {
    const __m512i pairs = Sparse ? ExpandByTable(values, masks) : _mm512_loadu_si512(values);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    _mm512_storeu_si512(even, _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(odd, _mm512_and_si512(pairs, upper));
    _mm_prefetch(reinterpret_cast<const char*>(values + kPackedAheadBytes), _MM_HINT_T0);
    if (!Sparse) return 32;
    uint32_t mask;
    __builtin_memcpy(&mask, masks, sizeof mask);
    return static_cast<size_t>(__builtin_popcount(mask));
  }
};

}  // namespace

const PackedAttentionKernel kAvx512PackedAttention = {"avx512", ExpandedBytes, AttendExpanded<Avx512Packed>};

}  // namespace sparamx
