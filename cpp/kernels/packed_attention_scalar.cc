// Attention over a packed cache, scalar: the specification of the other levels.
#include "kernels/packed_attention_loop.h"

namespace sparamx {
namespace {

struct ScalarPacked {
  static constexpr const AttentionKernel* kAttention = &kScalarAttention;

  template <bool Sparse>
  static SPARAMX_INLINE size_t Row(const uint8_t* masks, const uint8_t* values, float* even, float* odd) {
    uint32_t mask = 0xffffffffu;
    if (Sparse) __builtin_memcpy(&mask, masks, sizeof mask);
    size_t stored = 0;
    for (int i = 0; i < 32; ++i) {
      uint16_t word = 0;
      if ((mask >> i & 1u) != 0) __builtin_memcpy(&word, values + 2 * stored++, sizeof word);
      const uint32_t bits = static_cast<uint32_t>(word) << 16;
      __builtin_memcpy((i % 2 == 0 ? even : odd) + i / 2, &bits, sizeof bits);
    }
    return stored;
  }
};

}  // namespace

const PackedAttentionKernel kScalarPackedAttention = {"scalar", ExpandedBytes, AttendExpanded<ScalarPacked>};

}  // namespace sparamx
