// Bias and activation, 16 lanes at a time, in GCC's vector extension: one text for every level, the same bits from each
// (only +, -, *, / and selections; contraction to FMA is off for the whole project).
//
// Per 16 outputs: relu 2 operations; silu and gelu_tanh about 25 (exp of degree 6 and one division); gelu about 45.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernel_table.h"
#include "kernels/lanes.h"

namespace sparamx {
namespace {

SPARAMX_INLINE void Relu(Lanes* x) {
  *x = *x < 0.0f ? Lanes{} : *x;  // not a product: -infinity is zero too, and zero is not negative
}

SPARAMX_INLINE void Silu(Lanes* x) {
  Lanes e = -*x;
  Exp(&e);
  *x = *x / (e + 1.0f);
}

// x / (1 + exp(-2 u)) is x/2 (1 + tanh u) without its cancellation.
SPARAMX_INLINE void GeluTanh(Lanes* x) {
  const Lanes u = *x * (*x * *x * 0.044715f + 1.0f);
  Lanes e = u * -1.59576912f;  // -2 sqrt(2/pi)
  Exp(&e);
  *x = *x / (e + 1.0f);
}

// With z = |x| / sqrt 2 and q = erfc(z): gelu is x q / 2 for negative x and x - x q / 2 otherwise, without
// cancellation.
SPARAMX_INLINE void Gelu(Lanes* x) {
  const Lanes z = (*x < 0.0f ? -*x : *x) * 0.707106781f;
  Lanes e = -z * z;
  Exp(&e);
  const Lanes t = 1.0f / (z * 0.4f + 1.0f);
  // erfc(z) = exp(-z^2) t P(t); P is a minimax-weighted fit over z in [0, 9.5], relative error 6e-8 before rounding.
  Lanes p = t * 0.040268287f - 0.13547489f;
  p = p * t + 0.07384989f;
  p = p * t + 0.09972085f;
  p = p * t + 0.071514234f;
  p = p * t + 0.19696055f;
  p = p * t + 0.2009592f;
  p = p * t + 0.22657563f;
  p = p * t + 0.2256263f;
  const Lanes half = *x * 0.5f * (p * t * e);
  *x = *x < 0.0f ? half : *x - half;
}

SPARAMX_INLINE void Activate(Epilogue epilogue, Lanes* x) {
  switch (epilogue) {
    case Epilogue::kNone:
      return;
    case Epilogue::kRelu:
      return Relu(x);
    case Epilogue::kGelu:
      return Gelu(x);
    case Epilogue::kGeluTanh:
      return GeluTanh(x);
    case Epilogue::kSilu:
      return Silu(x);
  }
}

// y[rows, columns] = epilogue(y + bias), in place.
void FinishRows(float* y, size_t y_stride, size_t rows, size_t columns, const float* bias, Epilogue epilogue) {
  if (bias == nullptr && epilogue == Epilogue::kNone) return;
  for (size_t m = 0; m < rows; ++m) {
    float* row = y + m * y_stride;
    for (size_t c = 0; c < columns; c += 16) {
      const size_t bytes = (columns - c < 16 ? columns - c : 16) * sizeof(float);
      Lanes v = {}, b = {};
      if (bytes == sizeof v) {
        __builtin_memcpy(&v, row + c, sizeof v);
        if (bias != nullptr) __builtin_memcpy(&b, bias + c, sizeof b);
      } else {
        __builtin_memcpy(&v, row + c, bytes);
        if (bias != nullptr) __builtin_memcpy(&b, bias + c, bytes);
      }
      v += b;
      Activate(epilogue, &v);
      if (bytes == sizeof v)
        __builtin_memcpy(row + c, &v, sizeof v);
      else
        __builtin_memcpy(row + c, &v, bytes);
    }
  }
}

}  // namespace
}  // namespace sparamx
