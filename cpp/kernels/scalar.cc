// Scalar: the specification that every other level is held against, and what runs on a CPU without AVX2.
// Register plan: none; the compiler uses the baseline's SSE2 for the 16 sums of a strip (4 registers each).
#include "kernels/pack_rows.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

struct ScalarBase {
  struct Vec {
    float v[16];
  };
  static constexpr size_t kDirectRows = 2;
  static constexpr size_t kBlockRows = 4;
  static constexpr size_t kBlockStrips = 1;
  static constexpr int kStepBytes = 4;

  static Vec Zero() { return {}; }
  static Vec Add(const Vec& a, const Vec& b) {
    Vec out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] + b.v[i];
    return out;
  }
  static Vec Load(const float* p, size_t columns) {
    Vec out = {};
    for (size_t i = 0; i < columns; ++i) out.v[i] = p[i];
    return out;
  }
  static void Store(float* p, size_t columns, const Vec& v) {
    for (size_t i = 0; i < columns; ++i) p[i] = v.v[i];
  }
  static Vec Weights(const uint8_t* panel, int step) {
    Vec out;
    __builtin_memcpy(&out, panel + step * 64, sizeof out);
    return out;
  }
  static Vec Multiply(const Vec& sum, const Vec& w, const uint8_t* x) {
    float broadcast;
    __builtin_memcpy(&broadcast, x, sizeof broadcast);
    Vec out;
    for (int i = 0; i < 16; ++i) out.v[i] = sum.v[i] + w.v[i] * broadcast;
    return out;
  }
};

struct ScalarFp32 : ScalarBase {
  static constexpr int kSteps = 16;
  static constexpr size_t kPanelTileBytes = 16 * 64;
  static constexpr size_t kPanelTiles = 16;

  template <bool Sparse>
  static const uint8_t* Expand(Cursor* cursor, uint8_t* out) {
    if (!Sparse) {
      __builtin_memcpy(out, cursor->values, kPanelTileBytes);
      cursor->values += kPanelTileBytes;
      return out;
    }
    __builtin_memset(out, 0, kPanelTileBytes);
    for (size_t e = 0; e < 256; ++e) {
      if ((cursor->masks[e / 8] >> (e % 8) & 1) == 0) continue;
      __builtin_memcpy(out + 4 * e, cursor->values, 4);
      cursor->values += 4;
    }
    cursor->masks += 32;
    return out;
  }
};

struct ScalarBf16 : ScalarBase {
  static constexpr int kSteps = 32;
  static constexpr size_t kPanelTileBytes = 32 * 64;  // expanded to fp32, one row per k
  static constexpr size_t kPanelTiles = 8;

  template <bool Sparse>
  static const uint8_t* Expand(Cursor* cursor, uint8_t* out) {
    __builtin_memset(out, 0, kPanelTileBytes);
    for (size_t e = 0; e < 512; ++e) {
      if (Sparse && (cursor->masks[e / 8] >> (e % 8) & 1) == 0) continue;
      const size_t k = e / 32 * 2 + e % 2, column = e % 32 / 2;
      // A bf16 is the upper half of an fp32.
      __builtin_memcpy(out + k * 64 + column * 4 + 2, cursor->values, 2);
      cursor->values += 2;
    }
    if (Sparse) cursor->masks += 64;
    return out;
  }
};

}  // namespace

const Level kScalarLevel = {
    "scalar",
    0,
    {
        {{"scalar", 4, 1, PackRowsFp32, MultiplyStrips<ScalarFp32>}, {}},
        {{"scalar", 4, 1, PackRowsFp32, MultiplyStrips<ScalarBf16>},
         {"scalar", 4, 1, PackRowsRounded, MultiplyStrips<ScalarBf16>}},
        {},
        {},
    },
    FinishRows,
};

}  // namespace sparamx
