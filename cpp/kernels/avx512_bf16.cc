// AVX-512 with VBMI2 and BF16 (Zen 4 and 5; Sapphire Rapids and later where AMX is not to be had): bf16 weights and
// activations meet in vdpbf16ps, two products per lane.
//
// A row of 32 weights: the expansion (expand_vbmi2.h), a load, then one vdpbf16ps per row of X with its broadcast from
// memory (Zen 5: 0.75 cycles; Granite Rapids: 2.1, half the rate of two FMAs).
// Registers at M <= 8: one sum per row of X (4 at M = 1, 2 at M = 2 and 3). Above: 12 x 2 sums and 2 weight rows.
//
// int8 and int4 weights take the instructions of avx512_vbmi2.cc, arranged as suits Zen 5. int8: one strip at a time,
// asked for at every row, 4 KB ahead, as memory is further away there: at M <= 4 1.04 to 1.4 times as fast as two
// strips and 2 KB. No panel up to 12 rows (int4: 8): expansion overlaps products, 1.2 to 2 times as fast. Registers:
// M integer (2 at M = 1 and 2) and M float sums, the code of zero, 2 matrices of int4.
#include "kernels/avx512_integer.h"
#include "kernels/expand_vbmi2.h"
#include "kernels/half.h"
#include "kernels/pack_rows.h"
#include "kernels/quantized_loop.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

struct Bf16Bf16 : Avx512Base {
  static constexpr int kSteps = 16;
  static constexpr size_t kPanelTileBytes = 16 * 64;

  static SPARAMX_INLINE Vec Multiply(Vec sum, Vec w, const uint8_t* x) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(LoadU32(x)));
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)pair);
  }

  template <bool Sparse>
  static SPARAMX_INLINE const uint8_t* Expand(Cursor* cursor, uint8_t* out) {
    ExpandWords<Sparse>(cursor, out);
    return out;
  }
};

template <size_t DirectRows>
struct Bf16Quantized : Avx512Vnni {
  static constexpr size_t kDirectRows = DirectRows;
  static constexpr size_t kAhead = 4096;

  template <bool Int4, bool Sparse>
  using Stream = CodeStream<Int4, Sparse, CodeForm::kStored, kAhead, true>;

  template <bool Int4, bool Sparse>
  static SPARAMX_INLINE void Expand(Cursor* cursor, uint8_t* out) {
    ExpandCodes<Int4, Sparse, CodeForm::kStored, kAhead, true>(cursor, out);
  }
};

}  // namespace

const Level kAvx512Bf16Level = {
    "avx512_bf16",
    kAvx2 | kAvx512 | kAvx512Vbmi2 | kAvx512Vnni | kGfni | kAvx512Bf16,
    {
        {},
        {{}, {"avx512_bf16", 1, RowBytesBf16, PackRowsBf16, MultiplyStrips<Bf16Bf16>, true}},
        {{},
         {},
         {"avx512_bf16", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantized<Bf16Quantized<12>, false>, false}},
        {{},
         {},
         {"avx512_bf16", 1, RowBytesQuantized, PackRowsGrouped, MultiplyQuantized<Bf16Quantized<8>, true>, false}},
    },
    FinishRows,
    HalvesToFloats,
    FloatsToHalves,
    nullptr,
    nullptr,
};

}  // namespace sparamx
