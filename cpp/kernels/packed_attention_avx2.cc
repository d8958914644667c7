// Attention over a packed cache with AVX2.
//
// Eight of 32 words: a load, a vpshufb by a table row (port 5), popcnt; two such become eight fp32 of the even and
// eight of the odd rows by a shift and an and.
#include <immintrin.h>

#include "kernels/expand_words.h"
#include "kernels/packed_attention_loop.h"

namespace sparamx {
namespace {

struct Avx2Packed {
  static constexpr const AttentionKernel* kAttention = &kAvx2Attention;

  static SPARAMX_INLINE __m128i Load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static SPARAMX_INLINE __m128i Words(const uint8_t** values, uint8_t mask) {
    const __m128i words = _mm_shuffle_epi8(Load(*values), Load(kWordTable.places[mask]));
    *values += 2 * static_cast<size_t>(__builtin_popcount(mask));
    return words;
  }

  template <bool Sparse>
  static SPARAMX_INLINE size_t Row(const uint8_t* masks, const uint8_t* values, float* even, float* odd) {
    const uint8_t* next = values;
    for (int half = 0; half < 2; ++half) {
      __m256i pairs;
      if (Sparse) {
        const __m128i low = Words(&next, masks[2 * half]);
        pairs = _mm256_inserti128_si256(_mm256_castsi128_si256(low), Words(&next, masks[2 * half + 1]), 1);
      } else {
        pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * half));
      }
      const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
      _mm256_storeu_ps(even + 8 * half, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
      _mm256_storeu_ps(odd + 8 * half, _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)));
    }
    return Sparse ? static_cast<size_t>(next - values) / 2 : 32;
  }
};

}  // namespace

const PackedAttentionKernel kAvx2PackedAttention = {"avx2", ExpandedBytes, AttendExpanded<Avx2Packed>};

}  // namespace sparamx
