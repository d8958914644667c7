// Scalar: the specification that every other level is held against, and what runs on a CPU without AVX2.
// Register plan: none; the compiler uses the baseline's SSE2 for the 16 sums of a strip (4 registers each).
#include "kernels/pack_rows.h"
#include "kernels/quantized_loop.h"
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

struct ScalarQuantized : ScalarBase {
  struct IntVec {
    int32_t v[16];
  };
  struct Weight {
    int8_t v[64];
  };
  template <bool Int4, bool Sparse>
  using Stream = TileStream<ScalarQuantized, Int4, Sparse>;
  static constexpr bool kStoredCodes = false;
  static constexpr size_t kBlockRows = 2;

  static IntVec ZeroInt() { return {}; }
  static IntVec StartInt(int32_t v) {
    IntVec out;
    for (int32_t& i : out.v) i = v;
    return out;
  }
  static IntVec AddInt(const IntVec& a, const IntVec& b) {
    IntVec out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] + b.v[i];
    return out;
  }
  static Weight Weights(const uint8_t* tile, int row) {
    Weight out;
    __builtin_memcpy(&out, tile + row * 64, sizeof out);
    return out;
  }
  static IntVec Dot(const IntVec& sum, const Weight& w, const uint8_t* x) {
    int8_t codes[4];
    __builtin_memcpy(codes, x, sizeof codes);
    IntVec out;
    for (int i = 0; i < 16; ++i)
      out.v[i] = sum.v[i] + w.v[4 * i] * codes[0] + w.v[4 * i + 1] * codes[1] + w.v[4 * i + 2] * codes[2] +
                 w.v[4 * i + 3] * codes[3];
    return out;
  }
  static float HalfToFloat(uint32_t half) {
    const uint32_t magnitude = half & 0x7fffu;
    const float value = magnitude < 0x400u ? static_cast<float>(magnitude) * 0x1p-24f : 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    if (magnitude >= 0x400u) bits = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
    bits |= (half & 0x8000u) << 16;
    float out;
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
  }
  static Vec Scales(const uint8_t* p, bool fp16) {
    Vec out;
    if (!fp16) {
      __builtin_memcpy(&out, p, sizeof out);
      return out;
    }
    for (int i = 0; i < 16; ++i) {
      uint16_t half;
      __builtin_memcpy(&half, p + 2 * i, sizeof half);
      out.v[i] = HalfToFloat(half);
    }
    return out;
  }
  static Vec Flush(const Vec& sum, const IntVec& ints, const Vec& scales, float x_scale) {
    Vec out;
    for (int i = 0; i < 16; ++i) out.v[i] = sum.v[i] + static_cast<float>(ints.v[i]) * (scales.v[i] * x_scale);
    return out;
  }

  template <bool Int4, bool Sparse>
  static void Expand(Cursor* cursor, uint8_t* out) {
    for (size_t row = 0; row < 16; ++row) {
      size_t next = 0;  // of the row's values
      for (size_t e = 0; e < 64; ++e) {
        uint8_t* code = out + row * 64 + e;
        *code = 0;
        if (Sparse && (cursor->masks[row * 8 + e / 8] >> (e % 8) & 1) == 0) continue;
        if (Int4)
          *code = static_cast<uint8_t>((cursor->values[next / 2] >> (next % 2 * 4) & 15) - 8);
        else
          *code = static_cast<uint8_t>(cursor->values[next] - 128);
        ++next;
      }
      cursor->values += Int4 ? (next + 1) / 2 : next;
    }
    if (Sparse) cursor->masks += 128;
  }
};

}  // namespace

const Level kScalarLevel = {
    "scalar",
    0,
    {
        {{"scalar", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<ScalarFp32>}, {}},
        {{"scalar", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<ScalarBf16>},
         {"scalar", 1, RowBytesFp32, PackRowsRounded, MultiplyStrips<ScalarBf16>}},
        {{}, {}, {"scalar", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantized<ScalarQuantized, false>}},
        {{}, {}, {"scalar", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantized<ScalarQuantized, true>}},
    },
    FinishRows,
};

}  // namespace sparamx
