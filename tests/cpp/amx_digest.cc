// Prints a digest of Y for products of many types and shapes, each run by the AMX kernels: to compare hardware, the
// emulator of the tests and other emulators, which must agree to the bit.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "amx_emulator.h"
#include "format/packed_format.h"
#include "runtime/cpu.h"
#include "runtime/matmul.h"

#pragma weak amx_emulator_read_counts  // null where the emulator is not part of the program

namespace sparamx {
namespace {

struct Matrix {
  const char* name;
  uint64_t k, n;
  WeightType type;
  Form form;
  uint32_t group_size = 0;
  ScaleType scale_type = ScaleType::kNone;
};

constexpr Matrix kMatrices[] = {
    {"bf16", 300, 80, WeightType::kBf16, Form::kSparse},
    {"bf16", 1031, 161, WeightType::kBf16, Form::kSparse},
    {"bf16 dense", 300, 80, WeightType::kBf16, Form::kDense},
    {"bf16", 20000, 17, WeightType::kBf16, Form::kSparse},
    {"int8", 300, 80, WeightType::kInt8, Form::kSparse},
    {"int8", 1031, 161, WeightType::kInt8, Form::kSparse},
    {"int8 dense", 300, 80, WeightType::kInt8, Form::kDense},
    {"int8", 20000, 17, WeightType::kInt8, Form::kSparse},
    {"int4 group 16 fp16", 300, 80, WeightType::kInt4, Form::kSparse, 16, ScaleType::kFp16},
    {"int4 group 32 fp16", 1031, 161, WeightType::kInt4, Form::kSparse, 32, ScaleType::kFp16},
    {"int4 group 32 fp32", 1031, 161, WeightType::kInt4, Form::kDense, 32, ScaleType::kFp32},
    {"int4 group 64 fp32", 300, 80, WeightType::kInt4, Form::kSparse, 64, ScaleType::kFp32},
    {"int4 group 128 fp16", 1031, 161, WeightType::kInt4, Form::kSparse, 128, ScaleType::kFp16},
    {"int4 group 16 int8", 300, 80, WeightType::kInt4, Form::kSparse, 16, ScaleType::kInt8},
    {"int4 group 32 int8", 1031, 161, WeightType::kInt4, Form::kSparse, 32, ScaleType::kInt8},
    {"int4 group 128 int8", 1031, 161, WeightType::kInt4, Form::kDense, 128, ScaleType::kInt8},
    {"int4 group 256 fp16", 20000, 17, WeightType::kInt4, Form::kSparse, 256, ScaleType::kFp16},
};
constexpr size_t kRows[] = {1, 5, 16, 17, 33, 64, 70};

// Numbers of many magnitudes, denormals among them.
float Any(std::mt19937* random) {
  const auto mantissa = static_cast<float>((*random)() % 20001) / 10000 - 1;
  const unsigned kind = static_cast<unsigned>((*random)() % 64);
  return kind == 0 ? mantissa * 1e-39f : kind < 4 ? mantissa * 1e-20f : kind < 8 ? mantissa * 50 : mantissa;
}

bool Print(const Matrix& m) {
  std::mt19937 random(static_cast<uint32_t>(m.k * 31 + m.n));
  std::vector<float> w(m.k * m.n), bias(m.n);
  for (float& v : w) v = random() % 2 ? 0.0f : Any(&random);
  for (float& v : bias) v = Any(&random);
  const SourceMatrix source = {w.data(), m.k, m.n, static_cast<int64_t>(m.n), 1, SourceType::kFp32};
  PackOptions pack;
  pack.type = m.type;
  pack.form = m.form;
  pack.group_size = m.group_size;
  pack.scale_type = m.scale_type;
  pack.threads = 1;
  uint64_t size = 0;
  if (!PackedSize(source, pack, &size).ok()) return false;
  std::vector<uint8_t> blob(size);
  if (!Pack(source, pack, blob.data(), size).ok()) return false;
  for (const size_t rows : kRows) {
    MatMul matmul;
    MatMul::Options options;
    options.isa = "amx";
    options.epilogues = {static_cast<Epilogue>(rows % kEpilogues)};
    const Status status = matmul.Init(blob.data(), size, options);
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", status.message.c_str());
      return false;
    }
    std::vector<float> x(rows * m.k), y(rows * m.n);
    for (float& v : x) v = Any(&random);
    struct Free {
      void operator()(void* block) const { std::free(block); }
    };
    const std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, (matmul.ScratchBytes(rows) + 64) / 64 * 64));
    void* const outputs[] = {y.data()};
    const auto run = [](void*, size_t count, void (*body)(void*, size_t), void* user) {
      for (size_t i = 0; i < count; ++i) body(user, i);
    };
    matmul.Run(x.data(), rows, bias.data(), outputs, scratch.get(), {run, nullptr});
    uint64_t digest = 14695981039346656037u;
    for (const float v : y) {
      uint32_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      digest = (digest ^ bits) * 1099511628211u;
    }
    std::printf("%-20s M %2zu K %5llu N %3llu %s %016llx\n", m.name, rows, static_cast<unsigned long long>(m.k),
                static_cast<unsigned long long>(m.n), matmul.path(rows), static_cast<unsigned long long>(digest));
  }
  return true;
}

}  // namespace
}  // namespace sparamx

int main() {
  if (!sparamx::MissingFeatures(sparamx::kAmxLevel.features).empty()) {
    std::puts("this CPU cannot run the AMX kernels");
    return 0;
  }
  if (!std::all_of(std::begin(sparamx::kMatrices), std::end(sparamx::kMatrices), sparamx::Print)) return 1;
  if (amx_emulator_read_counts != nullptr) {
    amx_emulator_counts counts;
    amx_emulator_read_counts(&counts);
    std::fprintf(stderr, "emulated products: %llu\n", static_cast<unsigned long long>(counts.of[AMX_TDPBF16PS][0]));
  }
  return 0;
}
