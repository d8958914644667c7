// AVX-512 with VNNI but without VBMI2 (Cascade Lake, Cooper Lake): int8 and int4 weights are expanded as on Skylake
// (expand_bytes.h) and multiplied as on Ice Lake, one vpdpbusd per row of X. fp32 and bf16 are avx512's: Cooper Lake's
// vdpbf16ps is no faster than the two FMAs that it replaces.
//
// Registers at M <= 4: one sum per row (2 at M = 1 and 2). Above: 6 x 2 sums, 2 weight rows, broadcasts from memory.
#include "kernels/avx512_integer.h"
#include "kernels/expand_bytes.h"
#include "kernels/half.h"

namespace sparamx {
namespace {

struct VnniQuantized : Avx512Vnni {
  template <bool Int4, bool Sparse>
  using Stream = ByteStream<Int4, Sparse>;

  template <bool Int4, bool Sparse>
  static SPARAMX_INLINE void Expand(Cursor* cursor, uint8_t* out) {
    ExpandBytes<Int4, Sparse>(cursor, out);
  }
};

}  // namespace

const Level kAvx512VnniLevel = {
    "avx512_vnni",
    kAvx2 | kAvx512 | kAvx512Vnni,
    {
        {},
        {},
        {{},
         {},
         {"avx512_vnni", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantized<VnniQuantized, false>, false}},
        {{}, {}, {"avx512_vnni", 1, RowBytesQuantized, PackRowsGrouped, MultiplyQuantized<VnniQuantized, true>, false}},
    },
    FinishRows,
    HalvesToFloats,
    FloatsToHalves,
    nullptr,
    nullptr,
};

}  // namespace sparamx
