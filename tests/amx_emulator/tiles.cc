#include "tiles.h"

#include <cstring>
#include <initializer_list>

#include <immintrin.h>

namespace amx_emulator {
namespace {

bool IsValid(const Config& c) {
  if (c.palette > 1) return false;
  for (const uint8_t byte : c.reserved)
    if (byte != 0) return false;
  for (int t = 0; t < 16; ++t) {
    if (t >= kTiles && (c.column_bytes[t] != 0 || c.rows[t] != 0)) return false;
    if (c.column_bytes[t] > kRowBytes || c.rows[t] > kMaxRows) return false;
    if ((c.column_bytes[t] == 0) != (c.rows[t] == 0)) return false;
  }
  return true;
}

// Products fill whole rows of the sums: what lies beyond the columns of a tile is never seen.
struct Sizes {
  int rows, pairs;  // of the sums; of B
};

// In this order of operands, of two NaNs the first wins, as in the tile unit. The compiler would swap them.
__m512 MultiplyAdd(__m512 x, __m512 w, __m512 sum) {
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
}
__m512 Add(__m512 a, __m512 b) {
  __asm__("vaddps %1, %0, %0" : "+v"(a) : "v"(b));
  return a;
}

// sums[m][n] += sum over even k of a[m][k] b[k][n] + sum over odd k of the same: two chains of fused multiply-adds, in
// ascending order, from zero. MXCSR must say round to nearest even, denormals are zeros, flush to zero.
__attribute__((noinline)) void MultiplyBf16(uint8_t (*sums)[kRowBytes], const uint8_t (*a)[kRowBytes],
                                            const uint8_t (*b)[kRowBytes], Sizes sizes) {
  const __m512i high_half = _mm512_set1_epi32(-65536);
  const auto even_of = [&](__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); };
  const auto odd_of = [&](__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, high_half)); };
  for (int m = 0; m < sizes.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < sizes.pairs; ++k) {
      int pair;
      std::memcpy(&pair, a[m] + 4 * k, sizeof pair);
      const __m512i x = _mm512_set1_epi32(pair), w = _mm512_loadu_si512(b[k]);
      even = MultiplyAdd(even_of(x), even_of(w), even);
      odd = MultiplyAdd(odd_of(x), odd_of(w), odd);
    }
    _mm512_storeu_ps(sums[m], Add(_mm512_loadu_ps(sums[m]), Add(even, odd)));
  }
}

template <class A, class B>
void MultiplyBytes(uint8_t (*sums)[kRowBytes], const uint8_t (*a)[kRowBytes], const uint8_t (*b)[kRowBytes],
                   Sizes sizes) {
  for (int m = 0; m < sizes.rows; ++m) {
    uint32_t sum[16];  // wraps around
    std::memcpy(sum, sums[m], sizeof sum);
    for (int k = 0; k < sizes.pairs; ++k) {
      A x[4];
      B w[kRowBytes];
      std::memcpy(x, a[m] + 4 * k, sizeof x);
      std::memcpy(w, b[k], sizeof w);
      for (int n = 0; n < 16; ++n)
        for (int i = 0; i < 4; ++i) sum[n] += static_cast<uint32_t>(int32_t{x[i]} * int32_t{w[4 * n + i]});
    }
    std::memcpy(sums[m], sum, sizeof sum);
  }
}

}  // namespace

Fault State::LoadConfig(const Config& from) {
  if (from.palette == 0) {
    Release();
    return Fault::kNone;
  }
  if (!IsValid(from)) return Fault::kGeneralProtection;
  Release();
  config = from;
  return Fault::kNone;
}

void State::Release() {
  std::memset(this, 0, sizeof *this);
}

Fault State::Zero(int tile) {
  if (!IsUsable(tile)) return Fault::kInvalidOpcode;
  std::memset(data[tile], 0, sizeof data[tile]);
  config.start_row = 0;
  return Fault::kNone;
}

Fault State::Load(int tile, const uint8_t* base, int64_t stride) {
  if (!IsUsable(tile) || config.column_bytes[tile] % 4 != 0 || config.start_row >= config.rows[tile])
    return Fault::kInvalidOpcode;
  const int first = config.start_row;
  if (first == 0) std::memset(data[tile], 0, sizeof data[tile]);
  for (int m = first; m < config.rows[tile]; ++m)
    std::memcpy(data[tile][m], base + m * stride, config.column_bytes[tile]);
  config.start_row = 0;
  return Fault::kNone;
}

Fault State::Store(int tile, uint8_t* base, int64_t stride) {
  if (!IsUsable(tile) || config.column_bytes[tile] % 4 != 0 || config.start_row >= config.rows[tile])
    return Fault::kInvalidOpcode;
  for (int m = config.start_row; m < config.rows[tile]; ++m)
    std::memcpy(base + m * stride, data[tile][m], config.column_bytes[tile]);
  config.start_row = 0;
  return Fault::kNone;
}

Fault State::Multiply(Product product, int sum, int a, int b) {
  if (sum == a || sum == b || a == b) return Fault::kInvalidOpcode;
  for (const int tile : {sum, a, b})
    if (!IsUsable(tile) || config.column_bytes[tile] % 4 != 0) return Fault::kInvalidOpcode;
  if (config.rows[sum] != config.rows[a] || config.column_bytes[sum] != config.column_bytes[b] ||
      config.column_bytes[a] / 4 != config.rows[b])
    return Fault::kInvalidOpcode;
  const Sizes sizes = {config.rows[sum], config.rows[b]};
  switch (product) {
    case Product::kBf16: {
      constexpr unsigned kMaskedNearestFlushed = 0x9fc0;
      const unsigned saved = _mm_getcsr();
      _mm_setcsr(kMaskedNearestFlushed);
      MultiplyBf16(data[sum], data[a], data[b], sizes);
      _mm_setcsr(saved);
      break;
    }
    case Product::kSignedSigned:
      MultiplyBytes<int8_t, int8_t>(data[sum], data[a], data[b], sizes);
      break;
    case Product::kSignedUnsigned:
      MultiplyBytes<int8_t, uint8_t>(data[sum], data[a], data[b], sizes);
      break;
    case Product::kUnsignedSigned:
      MultiplyBytes<uint8_t, int8_t>(data[sum], data[a], data[b], sizes);
      break;
    case Product::kUnsignedUnsigned:
      MultiplyBytes<uint8_t, uint8_t>(data[sum], data[a], data[b], sizes);
      break;
  }
  config.start_row = 0;
  return Fault::kNone;
}

}  // namespace amx_emulator
