// Attention, scalar: the specification of the other levels.
// Register plan: two rows of one vector, each four registers of the baseline's SSE2.
#include "kernels/attention_loop.h"
#include "kernels/scalar_vec.h"

namespace sparamx {
namespace {

struct ScalarAttention : ScalarLanes {
  static constexpr int kRows = 2;
  static constexpr int kVecs = 1;

  static Vec Scale(const Vec& v, float by) {
    Vec out;
    for (int i = 0; i < 16; ++i) out.v[i] = v.v[i] * by;
    return out;
  }
  static Vec Multiply(const Vec& sum, const Vec& w, const float* x) {
    Vec out;
    for (int i = 0; i < 16; ++i) out.v[i] = sum.v[i] + w.v[i] * *x;
    return out;
  }
  static Vec MultiplyVec(const Vec& sum, const Vec& w, const Vec& x) {
    Vec out;
    for (int i = 0; i < 16; ++i) out.v[i] = sum.v[i] + w.v[i] * x.v[i];
    return out;
  }
  static void Reduce(const Vec (&v)[16], float* sums) {
    for (int i = 0; i < 16; ++i) {
      sums[i] = 0.0f;
      for (int j = 0; j < 16; ++j) sums[i] += v[i].v[j];
    }
  }
  static void Prefetch(const float* p) { __builtin_prefetch(p); }
  static void Transpose(const float* in, size_t stride, size_t keys, size_t numbers, float* out, size_t out_stride) {
    for (size_t c = 0; c < numbers; ++c)
      for (size_t t = 0; t < 16; ++t) out[c * out_stride + t] = t < keys ? in[t * stride + c] : 0.0f;
  }
};

}  // namespace

const AttentionKernel kScalarAttention = {"scalar", Attend<ScalarAttention>};

}  // namespace sparamx
