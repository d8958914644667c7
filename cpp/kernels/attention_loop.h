// One block of keys against one block of rows, for every level. With many rows, keys are turned over so that both
// products are the same small matrix multiplication (scores = Q K^T, sums += P V); with few, scores are dot products,
// and the keys and values of the next block are asked for early: of both a little at every step, as memory gives most
// to two streams that never pause. Softmax runs along: each row keeps the largest score so far and rescales its sums
// where a larger one comes.
//
// An Isa has a vector of 16 floats (Vec, Zero, Load, Store, Scale, Multiply: sum + w * broadcast of x[0], MultiplyVec:
// sum + w * x), Reduce (the sum of each of 16 vectors), Transpose (up to 16 keys x 16 numbers, zeros beyond), Prefetch,
// and the register block kRows x kVecs.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/attention_kernel.h"
#include "kernels/attention_softmax.h"
#include "kernels/lanes.h"

namespace sparamx {
namespace {

// Up to so many rows, reading keys and values is what takes the time.
constexpr size_t kFewRows = 8;

// Asks for the lines of keys and values that are read next, one of the keys, then one of the values. Between two of
// them stands a load of what is read now: with two together Granite Rapids reads up to a tenth more slowly. A
// block's work asks for a little more than a block: what is asked for twice costs next to nothing.
template <class Isa>
struct Ahead {
  const float *k, *v;

  // One of each: for work that loads little.
  SPARAMX_INLINE void AskBoth() {
    Isa::Prefetch(k);
    Isa::Prefetch(v);
    k += kVecFloats;
    v += kVecFloats;
  }
  // The one after the load of vector `n`, which the compiler must not move past it.
  SPARAMX_INLINE void AskAfter(size_t n) {
    const float*& next = n % 2 == 0 ? k : v;
    asm volatile("" ::: "memory");
    Isa::Prefetch(next);
    next += kVecFloats;
  }
};

// c[Rows][columns] = (scales ? c * scale of the row : 0) + a[Rows][depth] b[depth][columns], Vecs vectors of columns of
// which the last may be partial.
template <class Isa, int Rows, int Vecs, bool Full>
SPARAMX_INLINE void Tile(const float* a, size_t a_stride, size_t depth, const float* b, size_t b_stride, float* c,
                         size_t c_stride, const float* scales, size_t columns, Ahead<Isa>* ahead) {
  typename Isa::Vec sums[Rows][Vecs];
  const size_t last = Full ? kVecFloats : columns - (Vecs - 1) * kVecFloats;
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Vecs; ++n)
      sums[r][n] =
          scales == nullptr
              ? Isa::Zero()
              : Isa::Scale(Isa::Load(c + r * c_stride + n * kVecFloats, n + 1 < Vecs ? kVecFloats : last), scales[r]);
  Ahead<Isa> lines = ahead != nullptr ? *ahead : Ahead<Isa>{};
  for (size_t d = 0; d < depth; ++d) {
    typename Isa::Vec row[Vecs] = {};
#pragma GCC unroll 8
    for (int n = 0; n < Vecs; ++n) {
      row[n] = Isa::Load(b + n * kVecFloats, Full || n + 1 < Vecs ? kVecFloats : last);
      if (ahead != nullptr) lines.AskAfter(Vecs > 1 ? static_cast<size_t>(n) : d);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < Vecs; ++n) sums[r][n] = Isa::Multiply(sums[r][n], row[n], a + r * a_stride + d);
    b += b_stride;
  }
  if (ahead != nullptr) *ahead = lines;
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Vecs; ++n)
      Isa::Store(c + r * c_stride + n * kVecFloats, n + 1 < Vecs ? kVecFloats : last, sums[r][n]);
}

// Columns of Rows rows: whole register blocks, then vector by vector.
template <class Isa, int Rows>
void Strip(const float* a, size_t a_stride, size_t depth, const float* b, size_t b_stride, float* c, size_t c_stride,
           const float* scales, size_t columns, Ahead<Isa>* ahead) {
  constexpr size_t kBlock = Isa::kVecs * kVecFloats;
  size_t n = 0;
  for (; n + kBlock <= columns; n += kBlock)
    Tile<Isa, Rows, Isa::kVecs, true>(a, a_stride, depth, b + n, b_stride, c + n, c_stride, scales, kBlock, ahead);
  for (; n < columns; n += kVecFloats)
    Tile<Isa, Rows, 1, false>(a, a_stride, depth, b + n, b_stride, c + n, c_stride, scales,
                              Smaller(kVecFloats, columns - n), ahead);
}

template <class Isa, int Rows = Isa::kRows>
SPARAMX_INLINE void Strips(const float* a, size_t a_stride, size_t rows, size_t depth, const float* b, size_t b_stride,
                           float* c, size_t c_stride, const float* scales, size_t columns, Ahead<Isa>* ahead) {
  if constexpr (Rows > 0) {
    for (; rows >= Rows; rows -= Rows) {
      Strip<Isa, Rows>(a, a_stride, depth, b, b_stride, c, c_stride, scales, columns, ahead);
      a += Rows * a_stride;
      c += Rows * c_stride;
      if (scales != nullptr) scales += Rows;
      ahead = nullptr;  // once is enough
    }
    Strips<Isa, Rows - 1>(a, a_stride, rows, depth, b, b_stride, c, c_stride, scales, columns, ahead);
  }
}

// turned[number][key], zeros beyond the last key up to whole vectors.
template <class Isa>
void Turn(const AttentionJob& job) {
  for (size_t t = 0; t < job.keys; t += kVecFloats) {
    const size_t keys = Smaller(kVecFloats, job.keys - t);
    for (size_t c = 0; c < job.key_size; c += kVecFloats)
      Isa::Transpose(job.k + t * job.k_stride + c, job.k_stride, keys, Smaller(kVecFloats, job.key_size - c),
                     job.turned + c * kKeyBlock + t, kKeyBlock);
  }
}

// sums[row * 4 + key] += q[row][column] * key[column], one vector of columns.
template <class Isa, int Rows>
SPARAMX_INLINE void DotColumns(const float* q, size_t q_stride, const float* k, size_t k_stride, size_t columns,
                               typename Isa::Vec (&sums)[16], Ahead<Isa>* ahead) {
  typename Isa::Vec key[4] = {};
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    key[i] = Isa::Load(k + i * k_stride, columns);
    if (ahead != nullptr) ahead->AskAfter(i);
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const typename Isa::Vec row = Isa::Load(q + r * q_stride, columns);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[r * 4 + i] = Isa::MultiplyVec(sums[r * 4 + i], key[i], row);
  }
}

// Scores of Rows rows with the four keys from t on (or, four times over, with that one), by dot products.
template <class Isa, int Rows, bool One>
SPARAMX_INLINE void DotFour(const AttentionJob& job, const float* q, size_t t, float* scores, Ahead<Isa>* ahead) {
  typename Isa::Vec sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = Isa::Zero();
  const float* k = job.k + t * job.k_stride;
  const size_t stride = One ? 0 : job.k_stride;
  Ahead<Isa> lines = ahead != nullptr ? *ahead : Ahead<Isa>{};
  size_t c = 0;
  for (; c + kVecFloats <= job.key_size; c += kVecFloats)
    DotColumns<Isa, Rows>(q + c, job.q_stride, k + c, stride, kVecFloats, sums, ahead != nullptr ? &lines : nullptr);
  if (ahead != nullptr) *ahead = lines;
  if (c < job.key_size) DotColumns<Isa, Rows>(q + c, job.q_stride, k + c, stride, job.key_size - c, sums, nullptr);
  alignas(64) float totals[16];
  Isa::Reduce(sums, totals);
  constexpr size_t kBytes = (One ? 1 : 4) * sizeof(float);
  for (int r = 0; r < Rows; ++r) __builtin_memcpy(scores + r * kKeyBlock + t, totals + 4 * r, kBytes);
}

template <class Isa, bool One, int Rows = 4>
SPARAMX_INLINE void DotRows(const AttentionJob& job, const float* q, size_t rows, size_t t, float* scores,
                            Ahead<Isa>* ahead) {
  if constexpr (Rows > 0) {
    for (; rows >= Rows; rows -= Rows) {
      DotFour<Isa, Rows, One>(job, q, t, scores, ahead);
      q += Rows * job.q_stride;
      scores += Rows * kKeyBlock;
      ahead = nullptr;  // once is enough
    }
    DotRows<Isa, One, Rows - 1>(job, q, rows, t, scores, ahead);
  }
}

template <class Isa>
void DotKeys(const AttentionJob& job, Ahead<Isa>* ahead) {
  size_t t = 0;
  for (; t + 4 <= job.keys; t += 4) DotRows<Isa, false>(job, job.q, job.rows, t, job.scores, ahead);
  for (; t < job.keys; ++t) DotRows<Isa, true>(job, job.q, job.rows, t, job.scores, nullptr);
}

// scores = exp(scores - largest so far); the factor for what was summed before.
template <class Isa>
SPARAMX_INLINE float SoftmaxRow(const AttentionJob& job, size_t r, Ahead<Isa>* ahead) {
  float* row = job.scores + r * kKeyBlock;
  const size_t vectors = (job.keys + kVecFloats - 1) / kVecFloats;
  Lanes x[kKeyBlock / kVecFloats];
  __builtin_memcpy(x, row, vectors * sizeof(Lanes));
  FinishScores(job, r, x, vectors);
  Lanes top = x[0];
  for (size_t n = 1; n < vectors; ++n) top = x[n] > top ? x[n] : top;
  float base;
  const float factor = RaiseLargest(job, r, top, &base);
  Lanes shift, total = {};
  Splat(base, &shift);
  for (size_t n = 0; n < vectors; ++n) {
    x[n] -= shift;
    ExpOrZero(&x[n]);
    total += x[n];
    if (ahead != nullptr) ahead->AskBoth();
  }
  __builtin_memcpy(row, x, vectors * sizeof(Lanes));
  job.denominator[r] = job.denominator[r] * factor + Sum(total);
  return factor;
}

SPARAMX_INLINE bool AreFinite(const float* v, size_t stride, size_t keys, size_t columns) {
  Lanes all = {};
  float rest = 0.0f;
  for (size_t t = 0; t < keys; ++t, v += stride) {
    size_t c = 0;
    for (; c + kVecFloats <= columns; c += kVecFloats) {
      Lanes x;
      __builtin_memcpy(&x, v + c, sizeof x);
      all += x - x;
    }
    for (; c < columns; ++c) rest += v[c] - v[c];
  }
  return Sum(all) + rest == 0.0f;
}

// sums = sums * factor + scores V, without the keys that a row does not see: what they hold does not matter.
__attribute__((noinline)) void AddSeen(const AttentionJob& job, const float* factors) {
  for (size_t r = 0; r < job.rows; ++r) {
    float* const sums = job.sums + r * job.sums_stride;
    for (size_t c = 0; c < job.value_size; ++c) sums[c] *= factors[r];
    for (size_t t = 0; t < job.keys; ++t) {
      if (IsHidden(job, r, t)) continue;
      const float weight = job.scores[r * kKeyBlock + t];
      for (size_t c = 0; c < job.value_size; ++c) sums[c] += weight * job.v[t * job.v_stride + c];
    }
  }
}

template <class Isa>
void Attend(const AttentionJob& job) {
  float factors[kRowBlock];
  const bool turned = job.k == nullptr, few = job.rows <= kFewRows && !turned;
  Ahead<Isa> lines = {job.ahead_k, job.ahead_v};
  Ahead<Isa>* const ahead = few && job.ahead_k != nullptr ? &lines : nullptr;
  if (few) {
    DotKeys<Isa>(job, ahead);
  } else {
    if (!turned) Turn<Isa>(job);
    const size_t scored = (job.keys + kVecFloats - 1) / kVecFloats * kVecFloats;
    Strips<Isa>(job.q, job.q_stride, job.rows, job.key_size, job.turned, kKeyBlock, job.scores, kKeyBlock, nullptr,
                scored, nullptr);
  }
  for (size_t r = 0; r < job.rows; ++r) factors[r] = SoftmaxRow(job, r, ahead);
  if (MayHide(job, job.first_key, job.first_key + job.keys) &&
      !AreFinite(job.v, job.v_stride, job.keys, job.value_size))
    return AddSeen(job, factors);
  Strips<Isa>(job.scores, kKeyBlock, job.rows, job.keys, job.v, job.v_stride, job.sums, job.sums_stride, factors,
              job.value_size, ahead);
}

}  // namespace
}  // namespace sparamx
