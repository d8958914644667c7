// What every instruction-set level offers, as one table of function pointers per level. Kernel files are compiled with
// flags of their own, so neither this header nor any that they include may define a function with external linkage or
// use a standard-library template: the linker could pick the copy that was compiled for AVX-512 for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "format/layout.h"
#include "kernels/attention_kernel.h"
#include "kernels/packed_attention_kernel.h"

namespace sparamx {

enum class Epilogue : uint8_t { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };
constexpr int kEpilogues = 5;

// What the products see of X. kBf16 rounds to nearest even with denormals as zero; kInt8 quantizes every row (int8
// weights) or every group of a row (int4 weights) to [-127, 127].
enum class Activations : uint8_t { kFp32 = 0, kBf16 = 1, kInt8 = 2 };
constexpr int kActivationTypes = 3;

// A rectangle of Y: some strips of columns, some rows, over some runs of K.
struct MatMulJob {
  const PackedView* weights;
  const void* x;  // rows as Kernel::pack_rows left them
  size_t x_row_bytes;
  size_t rows;
  size_t first_strip, last_strip;
  size_t first_run, last_run;
  float* y;           // row 0, column 0 of the whole Y; columns beyond N are never written
  size_t y_stride;    // floats
  bool finish;        // apply bias and epilogue; false: leave the bare sums of this part of K
  const float* bias;  // N floats or null
  Epilogue epilogue;
};

struct Kernel {
  const char* path;       // as reports name it, e.g. "avx512_bf16"; null: this level lacks the combination
  size_t x_row_multiple;  // multiply may read packed rows up to this multiple
  // Bytes of a packed row of X for these weights.
  size_t (*x_row_bytes)(const PackedView& weights);
  // Packs rows [0, rows) of X[rows, K] to out, padded with zeros to whole tiles.
  void (*pack_rows)(const PackedView& weights, const float* x, size_t rows, void* out, size_t out_row_bytes);
  void (*multiply)(const MatMulJob& job);
  bool goes_by_runs;  // with many rows multiply needs X run by run, otherwise all of K for every strip
};

struct Level {
  const char* name;
  uint64_t features;  // CpuFeature bits that it needs
  Kernel kernels[kWeightTypes][kActivationTypes];
  // y[rows, columns] = epilogue(y + bias), in place.
  void (*finish)(float* y, size_t y_stride, size_t rows, size_t columns, const float* bias, Epilogue epilogue);
  // fp16 in and out, see half.h.
  void (*halves_to_floats)(const uint16_t* in, size_t count, float* out);
  void (*floats_to_halves)(const float* in, size_t in_stride, size_t rows, size_t columns, uint16_t* out,
                           size_t out_stride);
  const AttentionKernel* attention;               // null: that of a lower level
  const PackedAttentionKernel* packed_attention;  // likewise
};

enum CpuFeature : uint64_t {
  kAvx2 = 1u << 0,         // with FMA, F16C, BMI1, BMI2, LZCNT and POPCNT
  kAvx512 = 1u << 1,       // F, BW, DQ, VL
  kAvx512Vbmi2 = 1u << 2,  // VBMI and VBMI2
  kAvx512Vnni = 1u << 3,
  kAvx512Bf16 = 1u << 4,
  kAmxTile = 1u << 5,
  kAmxBf16 = 1u << 6,
  kAmxInt8 = 1u << 7,
  kGfni = 1u << 8,  // with 512-bit registers; every CPU that has VBMI2 has it
};

extern const Level kScalarLevel;
extern const Level kAvx2Level;
extern const Level kAvx512Level;
extern const Level kAvx512VnniLevel;
extern const Level kAvx512Vbmi2Level;
extern const Level kAvx512Bf16Level;
extern const Level kAmxLevel;

}  // namespace sparamx
