#include "format/stage.h"

#include <algorithm>
#include <cstring>

#include "format/number.h"

namespace sparamx {
namespace internal {
namespace {

template <typename Load>
void StageElements(const SourceMatrix& m, size_t k0, size_t n0, const Load& load, Stage* stage) {
  const size_t rows = std::min<size_t>(kRunK, m.k - k0);
  const size_t columns = std::min<size_t>(kStagedColumns, m.n - n0);
  if (rows < kRunK || columns < kStagedColumns) std::memset(stage, 0, sizeof *stage);
  const int64_t origin = static_cast<int64_t>(k0) * m.stride_k + static_cast<int64_t>(n0) * m.stride_n;
  if (m.stride_n == 1) {
    for (size_t k = 0; k < rows; ++k) {
      const int64_t row = origin + static_cast<int64_t>(k) * m.stride_k;
      for (size_t n = 0; n < columns; ++n) stage->w[k][n] = load(row + static_cast<int64_t>(n));
    }
    return;
  }
  constexpr size_t kBlock = 16;  // along K, so that a transposed source is read a cache line at a time
  for (size_t k = 0; k < rows; k += kBlock) {
    const size_t end = std::min(rows, k + kBlock);
    for (size_t n = 0; n < columns; ++n) {
      const int64_t column = origin + static_cast<int64_t>(n) * m.stride_n;
      for (size_t i = k; i < end; ++i) stage->w[i][n] = load(column + static_cast<int64_t>(i) * m.stride_k);
    }
  }
}

}  // namespace

void LoadStage(const SourceMatrix& m, size_t run, size_t strip, Stage* stage) {
  const size_t k0 = run * kRunK, n0 = strip * kStripColumns;
  switch (m.type) {
    case SourceType::kFp32: {
      const auto* p = static_cast<const float*>(m.data);
      return StageElements(
          m, k0, n0, [p](int64_t i) { return p[i]; }, stage);
    }
    case SourceType::kFp16: {
      const auto* p = static_cast<const uint16_t*>(m.data);
      return StageElements(
          m, k0, n0, [p](int64_t i) { return FloatFromFp16(p[i]); }, stage);
    }
    case SourceType::kBf16: {
      const auto* p = static_cast<const uint16_t*>(m.data);
      return StageElements(
          m, k0, n0, [p](int64_t i) { return FloatFromBf16(p[i]); }, stage);
    }
  }
}

}  // namespace internal
}  // namespace sparamx
