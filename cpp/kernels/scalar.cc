// Scalar: the specification that every other level is held against, and what runs on a CPU without AVX2.
// Register plan: none; the compiler uses the baseline's SSE2 for the 16 sums of a strip (4 registers each).
#include "kernels/half.h"
#include "kernels/pack_rows.h"
#include "kernels/quantized_loop.h"
#include "kernels/scalar_vec.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

struct ScalarBase : ScalarLanes {
  static constexpr size_t kDirectRows = 2;
  static constexpr int kInt8Strips = 1;
  static constexpr size_t kRowsOfTwoStrips = 0;
  static constexpr size_t kBlockRows = 4;
  static constexpr size_t kBlockStrips = 1;
  static constexpr int kStepBytes = 4;

  static Vec Add(const Vec& a, const Vec& b) {
    Vec out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i] + b.v[i];
    return out;
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

// --- int8 and int4

// One tile to 16 rows of 64 signed numbers, without scales.
template <bool Int4>
void ExpandNumbers(bool sparse, Cursor* cursor, int8_t* out) {
  size_t taken[2] = {0, 0};  // from the upper and the lower eight rows
  for (size_t row = 0; row < 16; ++row) {
    const size_t half = row / 8;
    for (size_t e = 0; e < 64; ++e) {
      int8_t* number = out + row * 64 + e;
      *number = 0;
      if (sparse && (cursor->masks[row * 8 + e / 8] >> (e % 8) & 1) == 0) continue;
      if (Int4)
        *number = static_cast<int8_t>((cursor->values[taken[half]] >> (4 * half) & 15) - 8);
      else
        *number = static_cast<int8_t>(cursor->values[taken[0] + taken[1]] - 128);
      ++taken[half];
    }
  }
  cursor->values += Int4 ? StoredInTile(WeightType::kInt4, taken[0], taken[1]) / 2 : taken[0] + taken[1];
  if (sparse) cursor->masks += 128;
}

float ScaleAt(const PackedView& w, size_t strip, size_t group, size_t column) {
  const uint8_t* scales = ScalesOf(w, strip, group);
  if (w.scale_type == ScaleType::kInt8)
    return static_cast<float>(static_cast<int8_t>(scales[column])) * LoadFloat(ColumnScalesOf(w, strip) + 4 * column);
  if (w.scale_type == ScaleType::kFp32) return LoadFloat(scales + 4 * column);
  uint16_t half;
  __builtin_memcpy(&half, scales + 2 * column, sizeof half);
  return FloatFromFp16(half);
}

// sums[16] += scaled integer sums of one segment: numbers [segment K / 4][16][4] with codes [segment K].
void AddSegment(const int8_t* numbers, const int8_t* codes, size_t segment_k, const PackedView& w, size_t strip,
                size_t group, float x_scale, float* sums) {
  for (size_t c = 0; c < 16; ++c) {
    int32_t sum = 0;
    for (size_t k = 0; k < segment_k; ++k) sum += numbers[k / 4 * 64 + c * 4 + k % 4] * codes[k];
    sums[c] += static_cast<float>(sum) * (ScaleAt(w, strip, group, c) * x_scale);
  }
}

// What a row's offset adds to every output: sums of weights times it.
void AddOffset(const PackedView& w, size_t strip, float offset, float* sums) {
  for (size_t c = 0; c < 16; ++c) {
    const auto weight_sum = static_cast<float>(LoadInt(w.sums + (strip * kStripColumns + c) * 4));
    sums[c] += weight_sum * (ScaleAt(w, strip, 0, c) * offset);
  }
}

template <bool Int4>
void MultiplyQuantizedScalar(const MatMulJob& job) {
  const PackedView& w = *job.weights;
  const QuantizedRowLayout layout = QuantizedLayout(w);
  constexpr size_t kTiles = TilesPerRun(WeightType::kInt8);
  int8_t numbers[kTiles * 1024];
  for (size_t strip = job.first_strip; strip < job.last_strip; ++strip) {
    float* y = job.y + strip * kStripColumns;
    for (size_t run = job.first_run; run < job.last_run; ++run) {
      Cursor cursor = StartOf(w, strip, run);
      const size_t tiles = Min(kTiles, w.tiles - run * kTiles);
      for (size_t t = 0; t < tiles; ++t) ExpandNumbers<Int4>(w.form == Form::kSparse, &cursor, numbers + t * 1024);
      for (size_t m = 0; m < job.rows; ++m) {
        const uint8_t* row = static_cast<const uint8_t*>(job.x) + m * job.x_row_bytes;
        float sums[16] = {};
        const size_t bytes = ColumnsOf(w, strip) * sizeof(float);
        if (run != job.first_run)
          __builtin_memcpy(sums, y + m * job.y_stride, bytes);
        else if (run == 0 && !Int4)
          AddOffset(w, strip, LoadFloat(row + layout.offset_at), sums);
        for (size_t k = 0; k < tiles * 64 && run * kRunK + k < w.k; k += layout.segment_k) {
          const size_t group = Int4 ? (run * kRunK + k) / w.group_size : 0;
          AddSegment(numbers + k * 16, reinterpret_cast<const int8_t*>(row) + run * kRunK + k,
                     Min(layout.segment_k, tiles * 64 - k), w, strip, group,
                     LoadFloat(row + layout.scales_at + 4 * group), sums);
        }
        __builtin_memcpy(y + m * job.y_stride, sums, bytes);
      }
    }
    FinishStrips(job, strip, 1);
  }
}

}  // namespace

const Level kScalarLevel = {
    "scalar",
    0,
    {
        {{"scalar", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<ScalarFp32>, true}, {}},
        {{"scalar", 1, RowBytesFp32, PackRowsFp32, MultiplyStrips<ScalarBf16>, true},
         {"scalar", 1, RowBytesFp32, PackRowsRounded, MultiplyStrips<ScalarBf16>, true}},
        {{}, {}, {"scalar", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantizedScalar<false>, false}},
        {{}, {}, {"scalar", 1, RowBytesQuantized, PackRowsQuantized, MultiplyQuantizedScalar<true>, false}},
    },
    FinishRows,
    HalvesToFloats,
    FloatsToHalves,
    &kScalarAttention,
    &kScalarPackedAttention,
};

}  // namespace sparamx
