#include "format/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>

#include "format/number.h"
#include "format/stage.h"

namespace sparamx {
namespace internal {
namespace {

// column: of int8 scales, what they are multiples of.
float Rounded(float scale, ScaleType type, float column) {
  switch (type) {
    case ScaleType::kInt8:
      return ScaleNumber(scale, column) * column;
    case ScaleType::kFp16:
      return FloatFromFp16(Fp16FromFloat(scale));
    default:
      return scale;
  }
}

// Candidates for an int4 scale, as multiples of the weight of largest magnitude, sign included. -1/8 uses the whole
// range and is what others take; 1/7 is the symmetric choice; the rest clip the largest weight a little for the sake of
// the others.
constexpr float kInt4Candidates[] = {-1 / 8.0f, -1 / 7.8f, -1 / 7.55f, -1 / 8.3f,
                                     -1 / 8.6f, -1 / 9.0f, 1 / 7.0f,   1 / 7.4f};
// A candidate may cost the large weights so many times what the first one costs them.
constexpr float kLargeWeightsTolerance = 1.5f;
constexpr size_t kLargestGroup = 256;  // IsGroupSize
// The largest weight of a column in its column scales: the largest candidate, 1/7, must be at most 127 of these, and
// this and -1/8 are whole numbers of them, 120 and 105.
constexpr float kLargestInColumnScales = 840;

// For 16 columns at once, of which the compiler makes vector code.
struct Columns {
  float v[kStripColumns];
};

// The squared errors that a scale leaves in a group, summed with two weightings of the weights.
struct GroupErrors {
  Columns by_root;    // the root of the magnitude: what the best candidate has least of
  Columns by_square;  // the square, which the largest weights dominate
};

GroupErrors ErrorsOf(const Stage& stage, size_t column, size_t k0, size_t k1, const Columns* roots,
                     const Columns& scale) {
  GroupErrors errors = {};
  for (size_t k = k0; k < k1; ++k) {
    for (size_t n = 0; n < kStripColumns; ++n) {
      const float w = stage.w[k][column + n];
      const float ratio = RoundToInteger(w / scale.v[n]);
      const float code = ratio < -8.0f ? -8.0f : ratio > 7.0f ? 7.0f : ratio;
      const float difference = w - code * scale.v[n], square = difference * difference;
      errors.by_root.v[n] += square * roots[k - k0].v[n];
      errors.by_square.v[n] += square * (w * w);
    }
  }
  return errors;
}

// The scales of one group of K of one strip. In trained layers the largest weights of a group may be those that meet
// the largest activations, so the plain sum of squared errors would clip them too readily (docs/numerics.md).
void Int4GroupScales(const Stage& stage, size_t column, size_t k0, size_t k1, ScaleType type,
                     const Columns& column_scales, float* scales) {
  Columns largest = {}, roots[kLargestGroup];
  for (size_t k = k0; k < k1; ++k)
    for (size_t n = 0; n < kStripColumns; ++n) {
      const float w = stage.w[k][column + n];
      largest.v[n] = std::fabs(w) > std::fabs(largest.v[n]) ? w : largest.v[n];
      roots[k - k0].v[n] = std::sqrt(std::fabs(w));
    }
  Columns best_error, limit;
  for (size_t n = 0; n < kStripColumns; ++n) {
    best_error.v[n] = limit.v[n] = INFINITY;
    // Stays where no candidate has a finite error: infinite if it is beyond the scale type, which the caller refuses.
    const float first = Rounded(largest.v[n] * kInt4Candidates[0], type, column_scales.v[n]);
    scales[n] = first == 0.0f ? 0.0f : first;
  }
  for (size_t i = 0; i < std::size(kInt4Candidates); ++i) {
    Columns rounded, divisor;
    for (size_t n = 0; n < kStripColumns; ++n) {
      rounded.v[n] = Rounded(largest.v[n] * kInt4Candidates[i], type, column_scales.v[n]);
      divisor.v[n] = rounded.v[n] == 0.0f ? 1.0f : rounded.v[n];
    }
    const GroupErrors errors = ErrorsOf(stage, column, k0, k1, roots, divisor);
    for (size_t n = 0; n < kStripColumns; ++n) {
      const bool better =
          rounded.v[n] != 0.0f && errors.by_root.v[n] < best_error.v[n] && errors.by_square.v[n] <= limit.v[n];
      best_error.v[n] = better ? errors.by_root.v[n] : best_error.v[n];
      scales[n] = better ? rounded.v[n] : scales[n];
      if (i == 0 && better) limit.v[n] = kLargeWeightsTolerance * errors.by_square.v[n];
    }
  }
}

// What the int8 scales of every column are multiples of, [strips][16]; 0 where that would be a denormal number.
std::vector<float> ColumnScales(const SourceMatrix& source, const PackedView& g, unsigned threads) {
  std::vector<float> scales(g.strips * kStripColumns, 0.0f);
  ForEachRun(source, g, threads, [&](size_t strip, size_t run, const Stage& stage, size_t column) {
    float* largest = &scales[strip * kStripColumns];
    const size_t rows = std::min<size_t>(kRunK, g.k - run * kRunK);
    for (size_t k = 0; k < rows; ++k)
      for (size_t n = 0; n < kStripColumns; ++n) largest[n] = std::max(largest[n], std::fabs(stage.w[k][column + n]));
  });
  for (float& scale : scales) {
    scale /= kLargestInColumnScales;
    if (scale < std::numeric_limits<float>::min()) scale = 0.0f;
  }
  return scales;
}

Status CopyScales(const float* given, const PackedView& g, std::vector<float>* scales) {
  for (size_t group = 0; group < g.groups; ++group) {
    for (size_t n = 0; n < g.n; ++n) {
      const float scale = given[group * g.n + n];
      if (!std::isfinite(scale)) return Status::Invalid("a given scale is not finite");
      if (Rounded(scale, g.scale_type, 0.0f) != scale) return Status::Invalid("a given scale is no fp16 number");
      (*scales)[(n / kStripColumns * g.groups + group) * kStripColumns + n % kStripColumns] = scale;
    }
  }
  return {};
}

}  // namespace

Status ComputeScales(const SourceMatrix& source, const PackedView& g, const float* given, unsigned threads,
                     Scales* result) {
  std::vector<float>* const scales = &result->of_groups;
  scales->assign(g.strips * g.groups * kStripColumns, 0.0f);
  result->of_columns.clear();
  if (g.groups == 0) return {};
  if (g.scale_type == ScaleType::kInt8) result->of_columns = ColumnScales(source, g, threads);
  std::atomic<bool> finite{true};
  ForEachRun(source, g, threads, [&](size_t strip, size_t run, const Stage& stage, size_t column) {
    const size_t k0 = run * kRunK, rows = std::min<size_t>(kRunK, g.k - k0);
    Columns largest = {}, undefined = {};
    for (size_t k = 0; k < rows; ++k)
      for (size_t n = 0; n < kStripColumns; ++n) {
        const float magnitude = std::fabs(stage.w[k][column + n]);
        largest.v[n] = largest.v[n] >= magnitude ? largest.v[n] : magnitude;
        undefined.v[n] += magnitude * 0.0f;  // not 0 from the first weight on that is not finite
      }
    for (const float v : undefined.v)
      if (v != 0.0f) finite = false;
    if (given != nullptr) return;
    float* out = &(*scales)[strip * g.groups * kStripColumns];
    if (g.type == WeightType::kInt8) {
      for (size_t n = 0; n < kStripColumns; ++n) out[n] = std::max(out[n], largest.v[n] / 127.0f);
      return;
    }
    Columns column_scales = {};
    if (!result->of_columns.empty())
      std::copy_n(&result->of_columns[strip * kStripColumns], kStripColumns, column_scales.v);
    for (size_t k = 0; k < rows; k += g.group_size)
      Int4GroupScales(stage, column, k, std::min<size_t>(rows, k + g.group_size), g.scale_type, column_scales,
                      out + (k0 + k) / g.group_size * kStripColumns);
  });
  if (!finite) return Status::Invalid("it has weights that are not finite, which int8 and int4 cannot hold");
  if (given != nullptr) return CopyScales(given, g, scales);
  for (const float s : *scales)
    if (!std::isfinite(s)) return Status::Invalid("its weights are too large for fp16 scales: take fp32 scales");
  return {};
}

}  // namespace internal
}  // namespace sparamx
