// Every kernel against a plain double-precision product, over odd shapes, forms, epilogues and ways to run in parallel.
// Every buffer is a heap block of exactly its size, so that AddressSanitizer sees any access outside.
#include "runtime/matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "amx_emulator.h"
#include "damage.h"
#include "format/for_each.h"
#include "format/number.h"
#include "runtime/choice.h"
#include "runtime/cpu.h"
#include "tested_levels.h"

#pragma weak amx_emulator_is_configured  // null where the emulator is not part of the program

namespace sparamx {
namespace {

struct Case {
  uint64_t rows, k, n;
  double sparsity;
  WeightType type;
  Form form;
  Epilogue epilogue;
  bool bias;
  uint32_t group_size = 0;  // of int4, 0: the default
  ScaleType scale_type = ScaleType::kNone;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "M " << c.rows << " K " << c.k << " N " << c.n << " sparsity " << c.sparsity << " type "
             << static_cast<int>(c.type) << " form " << static_cast<int>(c.form) << " epilogue "
             << static_cast<int>(c.epilogue) << " bias " << c.bias << " group size " << c.group_size << " scale type "
             << static_cast<int>(c.scale_type);
}

struct Problem {
  std::vector<float> w, x, bias;  // w as packed
  std::vector<uint8_t> blob;
  uint32_t group_size;
};

double Activated(double x, Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kNone:
      return x;
    case Epilogue::kRelu:
      return std::max(x, 0.0);
    case Epilogue::kGelu:
      return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case Epilogue::kGeluTanh:
      return x / (1 + std::exp(-2 * std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Epilogue::kSilu:
      return x / (1 + std::exp(-x));
  }
  return 0;
}

// Packs p.w into p.blob, and reads it back as packed.
void Repack(const Case& c, Problem* p) {
  const SourceMatrix source = {p->w.data(), c.k, c.n, static_cast<int64_t>(c.n), 1, SourceType::kFp32};
  PackOptions options;
  options.type = c.type;
  options.form = c.form;
  options.group_size = c.group_size;
  options.scale_type = c.scale_type;
  options.threads = 1;
  uint64_t size = 0;
  EXPECT_TRUE(PackedSize(source, options, &size).ok());
  p->blob.resize(size);
  EXPECT_EQ(Pack(source, options, p->blob.data(), size).message, "");
  PackedView view = {};
  EXPECT_EQ(Parse(p->blob.data(), size, &view).message, "");
  Unpack(view, p->w.data(), 1);
  p->group_size = view.group_size;
}

Problem Make(const Case& c, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> chance(0, 1);
  Problem p;
  p.w.resize(c.k * c.n);
  p.x.resize(c.rows * c.k);
  p.bias.resize(c.bias ? c.n : 0);
  for (uint64_t i = 0; i < p.w.size(); ++i)
    p.w[i] = chance(random) < c.sparsity || i % c.n == 2 ? 0.0f : normal(random);
  for (float& v : p.x) v = normal(random);
  for (float& v : p.bias) v = normal(random);
  Repack(c, &p);
  return p;
}

// docs/numerics.md: one scale for every `group_size` elements of a row, or, where that is 0, one scale and one offset
// for all of it.
std::vector<float> QuantizedX(const Case& c, const Problem& p) {
  std::vector<float> x(p.x.size());
  const uint64_t step = p.group_size == 0 ? c.k : p.group_size;
  for (uint64_t m = 0; m < c.rows; ++m) {
    for (uint64_t first = 0; first < c.k; first += step) {
      const float* from = &p.x[m * c.k + first];
      const uint64_t count = std::min(step, c.k - first);
      float above = 0, below = 0;
      for (uint64_t i = 0; i < count; ++i) {
        above = std::max(above, from[i]);
        below = std::max(below, -from[i]);
      }
      if (std::max(above, below) < 0x1p-100f) continue;
      const float half_range = p.group_size == 0 ? 0.5f * above + 0.5f * below : std::max(above, below);
      for (uint64_t i = 0; i < count; ++i)
        x[m * c.k + first + i] = std::nearbyint(from[i] * (127.0f / half_range)) * (half_range / 127.0f);
    }
  }
  return x;
}

struct Expected {
  std::vector<double> y, magnitude;  // magnitude: what rounding errors are relative to
};

// In double precision, from the operands as the products see them.
Expected Multiplied(const Case& c, const Problem& p, Activations activations) {
  const auto rounded = [&](float v) { return activations == Activations::kBf16 ? FloatFromBf16(Bf16FromFloat(v)) : v; };
  const std::vector<float> seen = activations == Activations::kInt8 ? QuantizedX(c, p) : p.x;
  Expected e;
  e.y.assign(c.rows * c.n, 0);
  e.magnitude.assign(c.rows * c.n, 1);
  for (uint64_t m = 0; m < c.rows; ++m) {
    for (uint64_t k = 0; k < c.k; ++k)
      for (uint64_t n = 0; n < c.n; ++n) {
        const double product =
            static_cast<double>(rounded(seen[m * c.k + k])) * static_cast<double>(rounded(p.w[k * c.n + n]));
        e.y[m * c.n + n] += product;
        e.magnitude[m * c.n + n] += std::abs(product);
      }
    for (uint64_t n = 0; n < c.n; ++n) {
      double& y = e.y[m * c.n + n];
      if (c.bias) y += static_cast<double>(p.bias[n]);
      y = Activated(y, c.epilogue);
    }
  }
  return e;
}

// Whether this thread has tiles configured: on AMX hardware the processor's own word, XGETBV(1), for it.
bool HasTilesConfigured() {
  if (amx_emulator_is_configured != nullptr) return amx_emulator_is_configured() != 0;
  if ((CpuFeatures() & kAmxTile) == 0) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (low & 1u << 17) != 0;
}

struct Threads {
  unsigned count;
  static void Run(void* host, size_t count, void (*body)(void*, size_t), void* user) {
    ForEach(count, static_cast<Threads*>(host)->count, [&](size_t i) {
      body(user, i);
      if (HasTilesConfigured()) ADD_FAILURE() << "a work item left its tile configuration behind";
    });
  }
};

// The outputs of a product, one block of memory each. X, bias and outputs are of type Number.
template <typename Number>
std::vector<std::vector<Number>> RunOutputs(const Case& c, const Problem& p, const MatMul::Options& options,
                                            const Number* x, const Number* bias, unsigned threads, std::string* path) {
  MatMul matmul;
  EXPECT_EQ(matmul.Init(p.blob.data(), p.blob.size(), options).message, "");
  *path = matmul.path(c.rows);
  const size_t bytes = matmul.ScratchBytes(c.rows);
  struct Free {
    void operator()(void* block) const { std::free(block); }
  };
  const std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, RoundUp(std::max<size_t>(bytes, 1), 64)));
  std::vector<std::vector<Number>> outputs;
  std::vector<void*> pointers;
  const auto unwritten =
      std::is_same_v<Number, float> ? static_cast<Number>(std::nanf("")) : static_cast<Number>(0x7e00);
  for (size_t i = 0; i < matmul.outputs(); ++i) outputs.emplace_back(c.rows * matmul.columns(i), unwritten);
  for (std::vector<Number>& y : outputs) pointers.push_back(y.data());
  Threads pool = {threads};
  matmul.Run(x, c.rows, bias, pointers.data(), scratch.get(), {Threads::Run, &pool});
  EXPECT_FALSE(HasTilesConfigured());
  return outputs;
}

std::vector<std::vector<float>> MultiplyOutputs(const Case& c, const Problem& p, const MatMul::Options& options,
                                                unsigned threads, std::string* path) {
  return RunOutputs(c, p, options, p.x.data(), c.bias ? p.bias.data() : nullptr, threads, path);
}

std::vector<float> Multiply(const Case& c, const Problem& p, const char* isa, unsigned threads, std::string* path) {
  MatMul::Options options;
  options.epilogues = {c.epilogue};
  options.isa = isa;
  return MultiplyOutputs(c, p, options, threads, path)[0];
}

// The level whose kernel must run where `level` is forced.
std::string ExpectedPath(const std::string& level, WeightType type) {
  if (level == "scalar" || level == "avx2") return level;
  if (type == WeightType::kFp32) return "avx512";
  // What was new in VNNI says nothing to bf16.
  return type == WeightType::kBf16 && level == "avx512_vnni" ? "avx512" : level;
}

// AMX multiplies int4 weights as bf16 numbers where there are more than 23 rows.
Activations ExpectedActivations(const std::string& path, WeightType type, uint64_t rows) {
  return type == WeightType::kInt4 && path == "amx" && rows > 23 ? Activations::kBf16 : DefaultActivations(type);
}

void CheckEveryLevel(const Case& c, uint32_t seed) {
  SCOPED_TRACE(testing::Message() << c);
  const Problem p = Make(c, seed);
  Expected expected[kActivationTypes];
  for (const Level* level : TestedLevels()) {
    SCOPED_TRACE(level->name);
    std::string path;
    const std::vector<float> y = Multiply(c, p, level->name, 1, &path);
    EXPECT_EQ(path, ExpectedPath(level->name, c.type));
    const Activations activations = ExpectedActivations(path, c.type, c.rows);
    Expected& e = expected[static_cast<int>(activations)];
    if (e.y.empty()) e = Multiplied(c, p, activations);
    for (size_t i = 0; i < y.size(); ++i)
      ASSERT_NEAR(static_cast<double>(y[i]), e.y[i], 2e-6 * e.magnitude[i])
          << "row " << i / c.n << " column " << i % c.n;
    for (const unsigned threads : {2u, 3u, 8u}) {
      const std::vector<float> again = Multiply(c, p, level->name, threads, &path);
      ASSERT_TRUE(y.empty() || std::memcmp(y.data(), again.data(), y.size() * sizeof(float)) == 0)
          << threads << " threads";
    }
  }
}

TEST(MatMul, EveryLevelAgreesWithDoublePrecision) {
  const bool full = std::getenv("SPARAMX_TEST_FULL") != nullptr;
  std::mt19937 random(7);
  const auto pick = [&](std::initializer_list<uint64_t> from) { return from.begin()[random() % from.size()]; };
  for (uint32_t i = 0; i < (full ? 1200u : 120u); ++i) {
    Case c = {};
    c.rows = pick({1, 2, 3, 4, 5, 7, 12, 13, 16, 17, 31, 32, 33, 48, 70, 130});
    c.k = pick({1, 2, 15, 16, 17, 31, 32, 33, 63, 127, 257, 511, 512, 513, 600, 1031});
    c.n = pick({1, 2, 15, 16, 17, 31, 33, 48, 97, 160, 251});
    c.sparsity = static_cast<double>(pick({0, 30, 50, 90, 100})) / 100;
    c.type = static_cast<WeightType>(random() % kWeightTypes);
    if (c.type == WeightType::kInt4) {
      c.group_size = static_cast<uint32_t>(pick({16, 32, 64, 128, 256}));
      c.scale_type = static_cast<ScaleType>(pick({1, 2, 3}));
    }
    c.form = random() % 4 ? Form::kSparse : Form::kDense;
    c.epilogue = static_cast<Epilogue>(random() % kEpilogues);
    c.bias = random() % 2 != 0;
    CheckEveryLevel(c, i);
    if (HasFatalFailure()) return;
  }
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Columns [first, first + count) of a row-major matrix with `columns` columns.
std::vector<float> ColumnsOf(const std::vector<float>& y, size_t columns, size_t first, size_t count) {
  std::vector<float> out;
  for (size_t i = 0; i < y.size(); i += columns) {
    const auto row = y.begin() + static_cast<ptrdiff_t>(i + first);
    out.insert(out.end(), row, row + static_cast<ptrdiff_t>(count));
  }
  return out;
}

// Several outputs are the columns of one, bit for bit, and so is every number of threads.
void CheckOutputs(const Case& c, const std::vector<uint64_t>& splits, uint32_t seed) {
  SCOPED_TRACE(testing::Message() << c);
  const Problem p = Make(c, seed);
  for (const Level* level : TestedLevels()) {
    SCOPED_TRACE(level->name);
    std::string path;
    MatMul::Options options;
    options.isa = level->name;
    options.splits = splits;
    for (size_t i = 0; i < splits.size(); ++i) options.epilogues.push_back(static_cast<Epilogue>(i % kEpilogues));
    for (const unsigned threads : {1u, 3u}) {
      const auto outputs = MultiplyOutputs(c, p, options, threads, &path);
      ASSERT_EQ(outputs.size(), splits.size());
      size_t column = 0;
      for (size_t i = 0; i < splits.size(); ++i) {
        Case whole = c;
        whole.epilogue = options.epilogues[i];
        const std::vector<float> y = Multiply(whole, p, level->name, 1, &path);
        EXPECT_TRUE(SameBits(outputs[i], ColumnsOf(y, c.n, column, splits[i]))) << "output " << i;
        column += splits[i];
      }
    }
  }
}

TEST(MatMul, SeveralOutputsAreColumnsOfOne) {
  uint32_t seed = 30;
  for (int t = 0; t < kWeightTypes; ++t) {
    const auto type = static_cast<WeightType>(t);
    for (const Form form : {Form::kSparse, Form::kDense}) {
      for (const uint64_t rows : {1, 7, 40}) {
        CheckOutputs({rows, 600, 251, 0.5, type, form, Epilogue::kNone, true}, {16, 112, 48, 64, 11}, ++seed);
        CheckOutputs({rows, 70, 80, 0.5, type, form, Epilogue::kNone, false}, {48, 32}, ++seed);
      }
      CheckOutputs({2, 0, 40, 0.5, type, form, Epilogue::kNone, true}, {16, 24}, ++seed);
      CheckOutputs({0, 20, 40, 0.5, type, form, Epilogue::kNone, true}, {16, 24}, ++seed);
    }
    CheckOutputs({2, 20000, 40, 0.5, type, Form::kSparse, Epilogue::kNone, true}, {16, 16, 8}, ++seed);  // K parts
  }
  CheckOutputs({1100, 70, 40, 0.5, WeightType::kBf16, Form::kSparse, Epilogue::kNone, true}, {16, 24}, ++seed);
}

// What fusing promises: where no part is narrow, the outputs of one packed weight are those of its parts on their own.
TEST(MatMul, OutputsAreThoseOfSeparateWeights) {
  const std::vector<uint64_t> splits = {288, 320, 301};
  for (int t = 0; t < kWeightTypes; ++t) {
    for (const uint64_t rows : {1, 16, 130}) {
      const Case c = {rows, 1100, 909, 0.5, static_cast<WeightType>(t), Form::kSparse, Epilogue::kNone, true};
      SCOPED_TRACE(testing::Message() << c);
      Problem p = Make(c, 90);
      const std::vector<float> dense = p.w;  // quantized again, numbers change: both sides begin here
      Repack(c, &p);
      MatMul::Options options;
      options.splits = splits;
      std::string path;
      const auto outputs = MultiplyOutputs(c, p, options, 2, &path);
      size_t column = 0;
      for (size_t i = 0; i < splits.size(); ++i) {
        Case part = c;
        part.n = splits[i];
        Problem q = p;
        q.bias.assign(&p.bias[column], &p.bias[column] + part.n);
        q.w = ColumnsOf(dense, c.n, column, part.n);
        Repack(part, &q);
        EXPECT_TRUE(SameBits(Multiply(part, q, nullptr, 1, &path), outputs[i])) << "output " << i;
        column += part.n;
      }
    }
  }
}

std::vector<uint16_t> Halves(const std::vector<float>& numbers) {
  std::vector<uint16_t> halves;
  for (const float number : numbers) halves.push_back(Fp16FromFloat(number));
  return halves;
}

std::vector<float> Floats(const std::vector<uint16_t>& halves) {
  std::vector<float> numbers;
  for (const uint16_t half : halves) numbers.push_back(FloatFromFp16(half));
  return numbers;
}

// With fp16 numbers, results are those of the same numbers in fp32, rounded.
void CheckHalves(const Case& c, const std::vector<uint64_t>& splits, uint32_t seed, float x_scale = 1) {
  SCOPED_TRACE(testing::Message() << c);
  Problem p = Make(c, seed);
  for (float& x : p.x) x *= x_scale;
  const std::vector<uint16_t> x = Halves(p.x), bias = Halves(p.bias);
  p.x = Floats(x);
  p.bias = Floats(bias);
  for (const Level* level : Levels()) {
    if (!MissingFeatures(level->features).empty()) continue;
    SCOPED_TRACE(level->name);
    std::string path;
    MatMul::Options options;
    options.isa = level->name;
    options.splits = splits;
    options.epilogues = {c.epilogue};
    const auto expected = MultiplyOutputs(c, p, options, 1, &path);
    options.element = Element::kFp16;
    for (const unsigned threads : {1u, 3u}) {
      const auto outputs = RunOutputs(c, p, options, x.data(), c.bias ? bias.data() : nullptr, threads, &path);
      for (size_t i = 0; i < outputs.size(); ++i) EXPECT_EQ(outputs[i], Halves(expected[i])) << "output " << i;
    }
  }
}

TEST(MatMul, HalvesAreFloatsRounded) {
  uint32_t seed = 60;
  for (int t = 0; t < kWeightTypes; ++t) {
    const auto type = static_cast<WeightType>(t);
    for (const uint64_t rows : {1, 5, 40}) {
      CheckHalves({rows, 600, 251, 0.5, type, Form::kSparse, Epilogue::kSilu, true}, {}, ++seed);
      CheckHalves({rows, 512, 93, 0.5, type, Form::kDense, Epilogue::kNone, false}, {48, 16, 29}, ++seed);
    }
    CheckHalves({3, 20000, 40, 0.5, type, Form::kSparse, Epilogue::kGelu, true}, {16, 24}, ++seed);  // K parts
    CheckHalves({1, 40000, 20, 0.5, type, Form::kSparse, Epilogue::kNone, true}, {}, ++seed);
    CheckHalves({2, 0, 40, 0.5, type, Form::kSparse, Epilogue::kNone, true}, {}, ++seed);
    CheckHalves({2, 100, 40, 0.5, type, Form::kSparse, Epilogue::kNone, true}, {}, ++seed, 20000);   // some infinite
    CheckHalves({2, 100, 40, 0.5, type, Form::kSparse, Epilogue::kNone, false}, {}, ++seed, 1e-6f);  // some denormal
  }
  CheckHalves({1100, 70, 40, 0.5, WeightType::kBf16, Form::kSparse, Epilogue::kNone, true}, {16, 24}, ++seed);
}

TEST(MatMul, EveryHalfIsConvertedAtEveryLevel) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (const Level* level : Levels()) {
    if (!MissingFeatures(level->features).empty()) continue;
    std::vector<float> floats(all.size() + 1, 7.0f);
    level->halves_to_floats(all.data(), all.size(), floats.data());
    std::vector<float> numbers;
    for (size_t i = 0; i < all.size(); ++i) {
      const float expected = FloatFromFp16(all[i]);
      ASSERT_EQ(BitsOf(floats[i]), BitsOf(expected)) << level->name << " " << i;
      // The half itself, what lies halfway to the next one, and its neighbours.
      for (const uint32_t offset : {0u, 0xfffu, 0x1000u, 0x1001u, 0x1fffu})
        numbers.push_back(FloatOf(BitsOf(expected) + offset));
    }
    EXPECT_EQ(floats.back(), 7.0f);
    for (const float number : {1e-45f, 1e-8f, 2.9e-8f, 2.98023224e-8f, 3e-8f, 65519.99f, 65520.0f, 3e38f, -1e-8f})
      numbers.push_back(number);
    // Rows of an odd length, so that the loops' ends are seen too.
    const size_t columns = 37, rows = numbers.size() / columns;
    std::vector<uint16_t> halves(rows * (columns + 2), 9);
    level->floats_to_halves(numbers.data(), columns, rows, columns, halves.data(), columns + 2);
    for (size_t i = 0; i < halves.size(); ++i) {
      const size_t column = i % (columns + 2);
      const uint16_t expected = column < columns ? Fp16FromFloat(numbers[i / (columns + 2) * columns + column]) : 9;
      ASSERT_EQ(halves[i], expected) << level->name << " " << i;
    }
  }
}

TEST(MatMul, SplitsThatDoNotFitAreRefused) {
  const Problem p = Make({1, 32, 50, 0.5, WeightType::kBf16, Form::kSparse, Epilogue::kNone, false}, 91);
  const auto complaint = [&](const std::vector<uint64_t>& splits, const std::vector<Epilogue>& epilogues) {
    MatMul matmul;
    MatMul::Options options;
    options.splits = splits;
    options.epilogues = epilogues;
    return matmul.Init(p.blob.data(), p.blob.size(), options).message;
  };
  EXPECT_EQ(complaint({16, 34}, {}), "");
  EXPECT_EQ(complaint({50}, {}), "");
  EXPECT_EQ(complaint({24, 26}, {}), "its split 24 is not a multiple of 16, as all but the last must be");
  EXPECT_EQ(complaint({16, 32}, {}), "its splits have fewer than N columns");
  EXPECT_EQ(complaint({16, 48}, {}), "its splits have more than N columns");
  EXPECT_EQ(complaint({16, ~uint64_t{15}}, {}), "its splits have more than N columns");
  EXPECT_EQ(complaint({16, 0, 34}, {}), "one of its splits has no columns");
  EXPECT_EQ(complaint({16, 34}, {Epilogue::kNone, Epilogue::kRelu, Epilogue::kRelu}),
            "it has 3 epilogues for 2 outputs");
}

TEST(MatMul, ManyRowsTakeSeveralPasses) {
  CheckEveryLevel({1100, 70, 40, 0.5, WeightType::kBf16, Form::kSparse, Epilogue::kNone, true}, 1);
  CheckEveryLevel({300, 4100, 24, 0.5, WeightType::kBf16, Form::kSparse, Epilogue::kSilu, true}, 2);
  CheckEveryLevel({1100, 70, 40, 0.5, WeightType::kInt8, Form::kSparse, Epilogue::kNone, true}, 11);
  CheckEveryLevel({1100, 70, 40, 0.5, WeightType::kInt4, Form::kSparse, Epilogue::kNone, true}, 12);
}

// Runs items one after the other, and takes what each writes to Y away again.
struct WatchedY {
  static constexpr float kUntouched = -12345;
  std::vector<float> y;
  std::vector<int> writers;  // of every number of Y, so far

  void Look() {
    for (size_t i = 0; i < y.size(); ++i) {
      writers[i] += y[i] != kUntouched;
      y[i] = kUntouched;
    }
  }
  static void Run(void* host, size_t count, void (*body)(void*, size_t), void* user) {
    for (size_t item = 0; item < count; ++item) {
      body(user, item);
      static_cast<WatchedY*>(host)->Look();
    }
  }
};

// Two items that computed the same strip would disturb each other's sums.
TEST(MatMul, EveryStripIsComputedByOneItem) {
  for (const WeightType type : {WeightType::kFp32, WeightType::kBf16, WeightType::kInt8, WeightType::kInt4}) {
    for (const uint64_t rows : {1, 40}) {
      // Nearly all values are in two strips, so that several items would begin there.
      const Case c = {rows, 512, 500, 0.5, type, Form::kSparse, Epilogue::kNone, false};
      Problem p = Make(c, 1);
      for (uint64_t i = 0; i < p.w.size(); ++i)
        if (i % c.n >= 32 && i % 97 != 0) p.w[i] = 0;
      Repack(c, &p);
      for (const Level* level : TestedLevels()) {
        SCOPED_TRACE(testing::Message() << c << " " << level->name);
        MatMul::Options options;
        options.isa = level->name;
        MatMul matmul;
        ASSERT_EQ(matmul.Init(p.blob.data(), p.blob.size(), options).message, "");
        std::vector<float> scratch(matmul.ScratchBytes(rows) / sizeof(float) + 32);
        void* aligned = scratch.data();
        size_t space = scratch.size() * sizeof(float);
        std::align(64, 0, aligned, space);
        WatchedY watched = {std::vector<float>(rows * c.n, WatchedY::kUntouched), std::vector<int>(rows * c.n)};
        void* y = watched.y.data();
        matmul.Run(p.x.data(), rows, nullptr, &y, aligned, {WatchedY::Run, &watched});
        watched.Look();  // a single item needs no parallel loop
        EXPECT_EQ(watched.writers, std::vector<int>(rows * c.n, 1));
      }
    }
  }
}

TEST(MatMul, FewColumnsAreSplitAlongK) {
  CheckEveryLevel({1, 40000, 8, 0.5, WeightType::kBf16, Form::kSparse, Epilogue::kGelu, true}, 3);
  CheckEveryLevel({3, 20000, 33, 0.5, WeightType::kFp32, Form::kSparse, Epilogue::kNone, false}, 4);
  CheckEveryLevel({2, 20000, 33, 0.0, WeightType::kBf16, Form::kDense, Epilogue::kNone, true}, 5);
  CheckEveryLevel({3, 20000, 33, 0.5, WeightType::kInt8, Form::kSparse, Epilogue::kNone, true}, 13);
  CheckEveryLevel({3, 20000, 33, 0.5, WeightType::kInt4, Form::kSparse, Epilogue::kNone, true}, 14);
  CheckEveryLevel({2, 20000, 33, 0.0, WeightType::kInt4, Form::kDense, Epilogue::kNone, true}, 15);
}

// The largest sums of int8 products that there can be: the parts along K must keep each of them inside an int32.
TEST(MatMul, LongIntegerSumsDoNotOverflow) {
  for (const WeightType type : {WeightType::kInt8, WeightType::kInt4}) {
    for (const Form form : {Form::kSparse, Form::kDense}) {
      const Case c = {1, 300000, 8, 0.0, type, form, Epilogue::kNone, false};
      Problem p = Make({1, 8, 8, 0.0, type, form, Epilogue::kNone, false}, 16);
      p.w.assign(c.k * c.n, 1.0f);
      p.x.assign(c.k, 1.0f);
      const SourceMatrix source = {p.w.data(), c.k, c.n, static_cast<int64_t>(c.n), 1, SourceType::kFp32};
      PackOptions options;
      options.type = type;
      options.form = form;
      uint64_t size = 0;
      ASSERT_TRUE(PackedSize(source, options, &size).ok());
      p.blob.assign(size, 0);
      ASSERT_TRUE(Pack(source, options, p.blob.data(), size).ok());
      for (const Level* level : TestedLevels()) {
        std::string path;
        for (const float y : Multiply(c, p, level->name, 2, &path)) EXPECT_NEAR(y, 300000.0f, 1.0f) << level->name;
      }
    }
  }
}

// Row counts that take every way through the kernels, and activations that are no numbers or very large.
std::vector<float> OddActivations(uint64_t rows, uint64_t k, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * k);
  for (float& v : x) v = normal(*random);
  for (const float odd : {std::nanf(""), INFINITY, 3e38f, 1e-40f})
    if ((*random)() % 4 == 0) x[(*random)() % x.size()] = odd;
  return x;
}

// The checker's promise: what it lets pass can be unpacked and multiplied without a byte read outside the blob; and
// what it refuses has a sentence.
TEST(MatMul, DamagedBlobsAreRefusedOrHarmless) {
  std::mt19937 random(17);
  std::vector<Problem> problems;
  std::vector<Case> cases;
  for (int t = 0; t < kWeightTypes; ++t)
    for (const Form form : {Form::kSparse, Form::kDense})
      for (const uint32_t group_size : {16u, 32u, 256u}) {
        const auto type = static_cast<WeightType>(t);
        if (type != WeightType::kInt4 && group_size != 16) continue;
        for (const auto& [k, n] : {std::pair<uint64_t, uint64_t>{300, 40}, {1100, 17}, {70, 100}}) {
          cases.push_back({1, k, n, 0.5, type, form, Epilogue::kNone, false});
          if (type == WeightType::kInt4) cases.back().group_size = group_size;
          problems.push_back(Make(cases.back(), 18));
        }
      }
  const auto levels = TestedLevels();
  constexpr Epilogue kEpilogues[] = {Epilogue::kNone, Epilogue::kGelu, Epilogue::kSilu};
  constexpr uint64_t kRows[] = {1, 1, 2, 5, 16, 40};
  const size_t count = TestCount(3000);
  size_t passed = 0;
  for (size_t i = 0; i < count; ++i) {
    SCOPED_TRACE(i);
    const size_t which = random() % problems.size();
    Problem p = {{}, {}, {}, problems[which].blob, 0};
    Damage(&p.blob, 320, &random);
    if (random() % 16 == 0) {
      p.blob.resize(random() % (p.blob.size() + 100));
      const uint64_t bytes = p.blob.size();
      if (random() % 2 == 0 && bytes >= sizeof(internal::Header))
        std::memcpy(p.blob.data() + offsetof(internal::Header, blob_bytes), &bytes, sizeof bytes);
    }
    p.blob.shrink_to_fit();
    PackedView view = {};
    const Status status = Parse(p.blob.data(), p.blob.size(), &view);
    if (!status.ok()) {
      EXPECT_NE(status.message, "");
      EXPECT_TRUE(status.code == StatusCode::kDamaged || status.code == StatusCode::kUnsupported);
      continue;
    }
    ++passed;
    if (view.k * view.n > 1u << 20 || view.k * view.n == 0) continue;
    p.w.resize(view.k * view.n);
    Unpack(view, p.w.data(), 1);
    Case c = cases[which];
    c.rows = kRows[random() % std::size(kRows)];
    c.k = view.k;
    c.n = view.n;
    p.x = OddActivations(c.rows, c.k, &random);
    MatMul::Options options;
    options.epilogues = {kEpilogues[random() % std::size(kEpilogues)]};
    options.isa = levels[random() % levels.size()]->name;
    if (c.n > 32 && random() % 2 == 0) options.splits = {16, c.n - 16};
    std::string path;
    MultiplyOutputs(c, p, options, 1 + random() % 2, &path);
  }
  EXPECT_GT(passed, count / 10);
  EXPECT_LT(passed, count * 9 / 10);
}

TEST(MatMul, EmptySizes) {
  for (int t = 0; t < kWeightTypes; ++t) {
    const auto type = static_cast<WeightType>(t);
    for (const Form form : {Form::kSparse, Form::kDense}) {
      CheckEveryLevel({3, 0, 20, 0.5, type, form, Epilogue::kNone, true}, 6);
      CheckEveryLevel({0, 20, 20, 0.5, type, form, Epilogue::kNone, true}, 7);
      CheckEveryLevel({3, 20, 0, 0.5, type, form, Epilogue::kNone, false}, 8);
    }
  }
}

// An infinite or undefined activation must reach every output of its row and none of another's.
TEST(MatMul, NonFiniteActivationsSpoilTheirRowOnly) {
  for (int t = 0; t < kWeightTypes; ++t) {
    const Case c = {5, 100, 40, 0.5, static_cast<WeightType>(t), Form::kSparse, Epilogue::kNone, false};
    for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      Problem p = Make(c, 9);
      p.x[2 * c.k + 37] = bad;
      for (const Level* level : TestedLevels()) {
        std::string path;
        const std::vector<float> y = Multiply(c, p, level->name, 2, &path);
        for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isfinite(y[i]), i / c.n != 2) << level->name << " " << i;
      }
    }
  }
}

TEST(MatMul, DenormalActivationsCountAsZeroInBf16) {
  const Case c = {2, 64, 16, 0.0, WeightType::kBf16, Form::kSparse, Epilogue::kNone, false};
  Problem p = Make(c, 10);
  std::fill(p.x.begin(), p.x.end(), 1e-39f);
  std::fill(p.w.begin(), p.w.end(), 1e30f);
  for (const Level* level : TestedLevels()) {
    std::string path;
    for (const float y : Multiply(c, p, level->name, 1, &path)) EXPECT_EQ(y, 0.0f) << level->name;
  }
}

TEST(MatMul, TheTableNamesALevelThatThisCpuRuns) {
  const Level* best = nullptr;
  ASSERT_TRUE(ChooseLevel("auto", &best).ok());
  for (int t = 0; t < kWeightTypes; ++t) {
    const auto type = static_cast<WeightType>(t);
    for (size_t rows = 1; rows < 600; ++rows) {
      const Kernel* kernel = ChooseKernel(*best, false, type, DefaultActivations(type), rows);
      ASSERT_NE(kernel, nullptr);
      const Level* level = nullptr;
      EXPECT_TRUE(ChooseLevel(kernel->path, &level).ok()) << kernel->path;
    }
  }
}

}  // namespace
}  // namespace sparamx
