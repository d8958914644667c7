// What docs/amx.md says of the AMX kernels' work, counted by the emulator: that forcing `amx` runs nothing else, and
// how many products, loads and expansions there are.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "amx_emulator.h"
#include "format/packed_format.h"
#include "runtime/cpu.h"
#include "runtime/matmul.h"

namespace sparamx {
namespace {

// A CPU without the AVX-512 that the kernels need beside AMX cannot run them, emulated or not.
bool CanRun() {
  return MissingFeatures(kAmxLevel.features).empty();
}

struct Matrix {
  uint64_t k, n;
  WeightType type;
  uint32_t group_size = 0;
  Form form = Form::kSparse;
};

std::vector<uint8_t> Packed(const Matrix& m) {
  std::mt19937 random(1);
  std::vector<float> w(m.k * m.n);
  for (float& v : w) v = random() % 2 ? 0.0f : static_cast<float>(random() % 1000) / 500 - 1;
  const SourceMatrix source = {w.data(), m.k, m.n, static_cast<int64_t>(m.n), 1, SourceType::kFp32};
  PackOptions options;
  options.type = m.type;
  options.form = m.form;
  options.group_size = m.group_size;
  options.threads = 1;
  uint64_t size = 0;
  EXPECT_TRUE(PackedSize(source, options, &size).ok());
  std::vector<uint8_t> blob(size);
  EXPECT_TRUE(Pack(source, options, blob.data(), size).ok());
  return blob;
}

// Weight tiles pass through two tile registers and lie in buffers that are used again and again: a tile with another
// address or content than the last one there was expanded anew.
struct WeightTiles {
  std::map<const void*, uint64_t> contents;
  uint64_t expanded = 0;
};
WeightTiles* weight_tiles;

constexpr int kFirstWeightTile = 6;

void OnLoad(amx_instruction instruction, int tile, const void* address, int64_t stride) {
  if (instruction != AMX_TILELOADD || tile < kFirstWeightTile) return;
  EXPECT_EQ(stride, 64);
  const auto* bytes = static_cast<const uint8_t*>(address);
  const uint64_t content =
      std::accumulate(bytes, bytes + 1024, uint64_t{1}, [](uint64_t sum, uint8_t b) { return sum * 1000003 + b; });
  const auto [at, is_new] = weight_tiles->contents.try_emplace(address, content);
  if (is_new || at->second != content) ++weight_tiles->expanded;
  at->second = content;
}

struct Work {
  uint64_t products, sum_loads, x_loads, weight_loads, expanded;
};

void RunHere(void*, size_t count, void (*body)(void*, size_t), void* user) {
  for (size_t i = 0; i < count; ++i) {
    body(user, i);
    EXPECT_EQ(amx_emulator_is_configured(), 0);
  }
}

Work WorkOf(const std::vector<uint8_t>& blob, size_t rows, bool count_expanded = false) {
  MatMul matmul;
  MatMul::Options options;
  options.isa = "amx";
  EXPECT_EQ(matmul.Init(blob.data(), blob.size(), options).message, "");
  const PackedView& w = matmul.weights();
  const std::vector<float> x(rows * w.k, 0.5f);
  std::vector<float> y(rows * w.n);
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  const std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, (matmul.ScratchBytes(rows) + 64) / 64 * 64));
  WeightTiles tiles;
  weight_tiles = &tiles;
  amx_emulator_observe(count_expanded ? OnLoad : nullptr);
  void* outputs[] = {y.data()};
  amx_emulator_reset_counts();
  matmul.Run(x.data(), rows, nullptr, outputs, scratch.get(), {RunHere, nullptr});
  amx_emulator_counts counts;
  amx_emulator_read_counts(&counts);
  amx_emulator_observe(nullptr);
  Work work = {};
  for (int i = AMX_TDPBF16PS; i <= AMX_TDPBUUD; ++i)
    for (const uint64_t count : counts.of[i]) work.products += count;
  const uint64_t* loads = counts.of[AMX_TILELOADD];
  work.sum_loads = loads[0] + loads[1] + loads[2] + loads[3];
  work.x_loads = loads[4] + loads[5];
  work.weight_loads = loads[6] + loads[7];
  work.expanded = tiles.expanded;
  return work;
}

uint64_t Parts(uint64_t total, uint64_t of) {
  return (total + of - 1) / of;
}

// docs/amx.md
uint64_t ExpectedProducts(const Matrix& m, uint64_t rows) {
  const uint64_t blocks = Parts(rows, 16) * Parts(m.n, 16);
  switch (m.type) {
    case WeightType::kFp32:
      return 0;
    case WeightType::kBf16:
      return blocks * Parts(m.k, 32);
    case WeightType::kInt8:
      return blocks * Parts(m.k, 64);
    case WeightType::kInt4:
      return blocks * Parts(m.k, 64) * (rows > 23 ? 2 : m.group_size < 64 ? 64 / m.group_size : 1);
  }
  return 0;
}

TEST(AmxKernels, TheProductsAreThoseOfTheFormulaForEveryM) {
  if (!CanRun()) return;
  const std::vector<Matrix> matrices = {
      {300, 80, WeightType::kFp32},
      {300, 80, WeightType::kBf16},
      {1, 1, WeightType::kBf16},
      {5000, 17, WeightType::kBf16},
      {300, 80, WeightType::kInt8},
      {5000, 17, WeightType::kInt8},
      {300, 80, WeightType::kInt4, 16},
      {300, 80, WeightType::kInt4, 32},
      {300, 80, WeightType::kInt4, 64},
      {900, 33, WeightType::kInt4, 128},
      {5000, 17, WeightType::kInt4, 32},
      {5000, 17, WeightType::kInt4, 256},
      {300, 80, WeightType::kBf16, 0, Form::kDense},
      {300, 80, WeightType::kInt8, 0, Form::kDense},
      {300, 80, WeightType::kInt4, 32, Form::kDense},
  };
  for (const Matrix& m : matrices) {
    const std::vector<uint8_t> blob = Packed(m);
    for (const size_t rows : {1u, 2u, 4u, 5u, 15u, 16u, 17u, 31u, 32u, 33u, 48u, 49u, 64u, 65u, 127u, 513u, 1100u})
      EXPECT_EQ(WorkOf(blob, rows).products, ExpectedProducts(m, rows))
          << "type " << static_cast<int>(m.type) << " K " << m.k << " N " << m.n << " group size " << m.group_size
          << " M " << rows;
  }
}

TEST(AmxKernels, AProductPerTileLoadAt64Rows) {
  if (!CanRun()) return;
  const Matrix m = {4096, 4096, WeightType::kBf16};
  const Work work = WorkOf(Packed(m), 64, true);
  EXPECT_EQ(work.products, ExpectedProducts(m, 64));
  EXPECT_LE(work.x_loads + work.weight_loads, work.products);
  EXPECT_EQ(work.expanded, 4096 / 32 * 4096 / 16);
}

// The largest cases take several passes over the weights.
TEST(AmxKernels, AWeightTileIsExpandedOncePer64RowsOrMore) {
  if (!CanRun()) return;
  for (const WeightType type : {WeightType::kBf16, WeightType::kInt8, WeightType::kInt4}) {
    const bool is_int4 = type == WeightType::kInt4;
    for (const uint64_t k : {640u, 9024u}) {
      const Matrix m = {k, 40, type, is_int4 ? 64u : 0u};
      const std::vector<uint8_t> blob = Packed(m);
      for (const size_t rows : {1u, 17u, 33u, 64u, 65u, 100u, k == 640 ? 1100u : 200u}) {
        const uint64_t tiles = k / (type == WeightType::kBf16 || (is_int4 && rows > 23) ? 32 : 64) * Parts(m.n, 16);
        const Work work = WorkOf(blob, rows, true);
        EXPECT_GE(work.expanded, tiles) << "M " << rows << " K " << k << " type " << static_cast<int>(type);
        EXPECT_LE(work.expanded, tiles * Parts(rows, 64)) << "M " << rows << " K " << k;
      }
    }
  }
}

TEST(AmxKernels, OneRowLoadsItsActivationsAtMostOncePerProduct) {
  if (!CanRun()) return;
  for (const Matrix& m : {Matrix{1000, 200, WeightType::kBf16}, Matrix{1000, 200, WeightType::kInt8},
                          Matrix{1000, 200, WeightType::kInt4, 32}}) {
    const Work work = WorkOf(Packed(m), 1);
    EXPECT_EQ(work.weight_loads, work.products);
    EXPECT_LE(work.x_loads, work.products);
    EXPECT_EQ(work.sum_loads, 0u);
  }
}

}  // namespace
}  // namespace sparamx
