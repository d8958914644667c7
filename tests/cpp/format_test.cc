// The packed format: what is packed comes back, and what is damaged is refused without a byte read outside the blob
// (the blobs lie in heap blocks of exactly their size, so that AddressSanitizer sees any such read).
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "format/for_each.h"
#include "format/number.h"
#include "format/packed_format.h"

namespace sparamx {
namespace {

using Blob = std::vector<uint8_t>;

struct Shape {
  uint64_t k, n;
};

constexpr Shape kShapes[] = {{0, 0},   {0, 5},   {5, 0},    {1, 1},    {1, 17},   {31, 16},
                             {32, 15}, {33, 16}, {513, 33}, {64, 128}, {1024, 7}, {100, 100}};
constexpr WeightType kTypes[] = {WeightType::kFp32, WeightType::kBf16, WeightType::kInt8, WeightType::kInt4};
constexpr Form kForms[] = {Form::kSparse, Form::kDense};
constexpr uint32_t kGroupSizes[] = {16, 32, 64, 128, 256};

// Every type, with every group size and scale type.
std::vector<PackOptions> AllOptions() {
  std::vector<PackOptions> all(3);
  all[0].type = WeightType::kFp32;
  all[1].type = WeightType::kBf16;
  all[2].type = WeightType::kInt8;
  for (const ScaleType scale_type : {ScaleType::kInt8, ScaleType::kFp16, ScaleType::kFp32}) {
    for (const uint32_t group_size : kGroupSizes) {
      PackOptions options;
      options.type = WeightType::kInt4;
      options.scale_type = scale_type;
      options.group_size = group_size;
      all.push_back(options);
    }
  }
  return all;
}

std::string Name(const PackOptions& options, Form form) {
  return "type " + std::to_string(static_cast<int>(options.type)) + " group size " +
         std::to_string(options.group_size) + " scale type " + std::to_string(static_cast<int>(options.scale_type)) +
         " form " + std::to_string(static_cast<int>(form));
}

// Weights that the type holds exactly, `sparsity` of them zero, with a zero row, a zero column and both zeros' signs.
// Of quantized types they are the codes themselves: the largest one stands in every group, so that scales are 1.
std::vector<float> RandomWeights(Shape shape, double sparsity, uint32_t seed, WeightType type = WeightType::kBf16) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> chance(0, 1);
  std::uniform_int_distribution<int> number(type == WeightType::kInt4 ? -8 : -127, type == WeightType::kInt4 ? 7 : 127);
  const bool quantized = type == WeightType::kInt8 || type == WeightType::kInt4;
  std::vector<float> w(shape.k * shape.n);
  for (uint64_t i = 0; i < w.size(); ++i) {
    const uint64_t k = i / shape.n, n = i % shape.n;
    const bool zero = chance(random) < sparsity || k == 3 || n == 5;
    w[i] = zero ? (i % 2 == 0 ? 0.0f : -0.0f) : static_cast<float>(number(random)) / (quantized ? 1.0f : 32.0f);
    if (quantized && k % 16 == 0 && n != 5 && sparsity < 1) w[i] = type == WeightType::kInt4 ? -8.0f : 127.0f;
  }
  return w;
}

SourceMatrix RowMajor(const std::vector<float>& w, Shape shape) {
  return {w.data(), shape.k, shape.n, static_cast<int64_t>(shape.n), 1, SourceType::kFp32};
}

Blob MustPack(const SourceMatrix& source, const PackOptions& options) {
  uint64_t size = 0;
  EXPECT_EQ(PackedSize(source, options, &size).message, "");
  Blob blob(size, 0xcc);
  EXPECT_EQ(Pack(source, options, blob.data(), size).message, "");
  return blob;
}

Blob MustPack(const std::vector<float>& w, Shape shape, WeightType type, Form form) {
  PackOptions options;
  options.type = type;
  options.form = form;
  options.threads = 2;
  return MustPack(RowMajor(w, shape), options);
}

std::vector<float> MustUnpack(const Blob& blob) {
  PackedView view = {};
  EXPECT_EQ(Parse(blob.data(), blob.size(), &view).message, "");
  std::vector<float> dense(view.k * view.n, -1.0f);
  Unpack(view, dense.data(), 2);
  return dense;
}

TEST(Format, PackedWeightsComeBack) {
  for (const Shape shape : kShapes) {
    for (const double sparsity : {0.0, 0.5, 0.95, 1.0}) {
      for (PackOptions options : AllOptions()) {
        const std::vector<float> w = RandomWeights(shape, sparsity, 1, options.type);
        for (const Form form : kForms) {
          SCOPED_TRACE(testing::Message()
                       << shape.k << " x " << shape.n << " " << Name(options, form) << " sparsity " << sparsity);
          options.form = form;
          options.threads = 2;
          const Blob blob = MustPack(RowMajor(w, shape), options);
          PackedView view = {};
          ASSERT_EQ(Parse(blob.data(), blob.size(), &view).message, "");
          EXPECT_EQ(view.k, shape.k);
          EXPECT_EQ(view.n, shape.n);
          EXPECT_EQ(view.type, options.type);
          EXPECT_EQ(view.form, form);
          EXPECT_EQ(view.group_size, options.group_size);
          if (options.type == WeightType::kInt4) {
            EXPECT_EQ(view.scale_type, options.scale_type);
          }
          EXPECT_EQ(view.nnz, w.size() - static_cast<uint64_t>(std::count(w.begin(), w.end(), 0.0f)));
          EXPECT_EQ(MustUnpack(blob), w);  // 0 == -0
        }
      }
    }
  }
}

TEST(Format, AutomaticFormIsTheSmaller) {
  const Shape shape = {640, 96};
  for (const WeightType type : kTypes) {
    for (const double sparsity : {0.0, 0.02, 0.04, 0.06, 0.08, 0.5}) {
      const std::vector<float> w = RandomWeights(shape, sparsity, 2, type);
      const size_t sparse = MustPack(w, shape, type, Form::kSparse).size();
      const size_t dense = MustPack(w, shape, type, Form::kDense).size();
      EXPECT_EQ(MustPack(w, shape, type, Form::kAuto).size(), std::min(sparse, dense));
    }
  }
}

// Every thread of the packer takes memory.
TEST(Format, WhatAThreadThrowsReachesTheCaller) {
  for (const unsigned threads : {1u, 4u}) {
    std::atomic<size_t> done{0};
    const auto body = [&](size_t i) {
      if (i >= 500) throw std::bad_alloc();
      ++done;
    };
    EXPECT_THROW(ForEach(1000, threads, body), std::bad_alloc);
    EXPECT_EQ(done, 500u);
  }
}

TEST(Format, StridesAndThreadsDoNotChangeTheBlob) {
  const Shape shape = {130, 77};
  for (const WeightType type : kTypes) {
    const std::vector<float> w = RandomWeights(shape, 0.5, 3, type);
    std::vector<float> transposed(w.size());
    for (uint64_t k = 0; k < shape.k; ++k)
      for (uint64_t n = 0; n < shape.n; ++n) transposed[n * shape.k + k] = w[k * shape.n + n];
    const SourceMatrix columns = {transposed.data(), shape.k, shape.n, 1, static_cast<int64_t>(shape.k),
                                  SourceType::kFp32};
    // The last row first: a negative stride.
    std::vector<float> upside_down;
    for (uint64_t k = shape.k; k-- > 0;)
      upside_down.insert(upside_down.end(), &w[k * shape.n], &w[k * shape.n] + shape.n);
    const SourceMatrix reversed = {&upside_down[(shape.k - 1) * shape.n], shape.k, shape.n,
                                   -static_cast<int64_t>(shape.n),        1,       SourceType::kFp32};

    for (const Form form : kForms) {
      PackOptions options;
      options.type = type;
      options.form = form;
      options.threads = 1;
      const Blob expected = MustPack(RowMajor(w, shape), options);
      for (const unsigned threads : {0u, 2u, 3u, 8u}) {
        options.threads = threads;
        EXPECT_EQ(MustPack(RowMajor(w, shape), options), expected) << threads << " threads";
      }
      EXPECT_EQ(MustPack(columns, options), expected);
      EXPECT_EQ(MustPack(reversed, options), expected);
    }
  }
}

TEST(Format, SixteenBitSources) {
  const Shape shape = {70, 40};
  for (const WeightType type : kTypes) {
    const std::vector<float> w = RandomWeights(shape, 0.5, 4, type);
    std::vector<uint16_t> bf16, fp16;
    for (const float f : w) {
      bf16.push_back(static_cast<uint16_t>(BitsOf(f) >> 16));
      // Multiples of 1/32 below 128 in magnitude: normal in fp16, or zero.
      const uint32_t bits = BitsOf(f);
      const uint32_t magnitude = bits & 0x7fffffffu;
      fp16.push_back(
          static_cast<uint16_t>((bits >> 16 & 0x8000u) | (magnitude ? (magnitude - (112u << 23)) >> 13 : 0)));
    }
    PackOptions options;
    options.type = type;
    const Blob expected = MustPack(RowMajor(w, shape), options);
    const auto stride = static_cast<int64_t>(shape.n);
    EXPECT_EQ(MustPack({bf16.data(), shape.k, shape.n, stride, 1, SourceType::kBf16}, options), expected);
    EXPECT_EQ(MustPack({fp16.data(), shape.k, shape.n, stride, 1, SourceType::kFp16}, options), expected);
  }
}

TEST(Format, Fp16NumbersAreTheStandardsOnes) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const uint32_t exponent = h >> 10 & 31, fraction = h & 1023;
    const float f = FloatFromFp16(static_cast<uint16_t>(h));
    EXPECT_EQ(std::signbit(f), (h & 0x8000) != 0);
    if (exponent == 31 && fraction != 0) {
      EXPECT_TRUE(std::isnan(f));
      continue;
    }
    const double expected = exponent == 31  ? std::numeric_limits<double>::infinity()
                            : exponent == 0 ? std::ldexp(fraction, -24)
                                            : std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25);
    EXPECT_EQ(std::fabs(f), expected) << h;
  }
}

TEST(Format, Bf16RoundsToNearestEvenAndDenormalsToZero) {
  std::mt19937 random(5);
  for (int i = 0; i < 200000; ++i) {
    const auto bits = static_cast<uint32_t>(random());
    const float f = FloatOf(bits);
    const float rounded = FloatFromBf16(Bf16FromFloat(f));
    if (std::isnan(f)) {
      EXPECT_TRUE(std::isnan(rounded));
    } else if (std::fabs(f) < std::numeric_limits<float>::min()) {
      EXPECT_EQ(rounded, 0.0f);
    } else {
      // The neighbours in bf16, and their distance, exactly.
      const double below = FloatOf(bits & 0xffff0000u);
      const uint32_t next = (bits & 0xffff0000u) + 0x10000u;
      const double step = FloatOf((bits & 0x7f800000u)) / 128.0;
      const double above = std::fabs(below) + step;
      const double position = (std::fabs(static_cast<double>(f)) - std::fabs(below)) / step;
      const bool up = position > 0.5 || (position == 0.5 && (next >> 16 & 1) == 0);
      const bool overflows = above > std::numeric_limits<float>::max();
      const double expected = !up ? std::fabs(below) : overflows ? std::numeric_limits<double>::infinity() : above;
      EXPECT_EQ(std::fabs(rounded), expected) << f;
      EXPECT_EQ(std::signbit(rounded), std::signbit(f));
    }
  }
}

TEST(Format, AWeightThatUnderflowsInBf16IsNotStored) {
  const float denormal = 1e-39f;
  const std::vector<float> w = {1.0f, denormal, -denormal, 0.0f};
  PackedView view = {};
  const Blob blob = MustPack(w, {2, 2}, WeightType::kBf16, Form::kSparse);
  ASSERT_EQ(Parse(blob.data(), blob.size(), &view).message, "");
  EXPECT_EQ(view.nnz, 1u);
  const Blob exact = MustPack(w, {2, 2}, WeightType::kFp32, Form::kSparse);
  ASSERT_EQ(Parse(exact.data(), exact.size(), &view).message, "");
  EXPECT_EQ(view.nnz, 3u);
}

TEST(Format, AFourByteAlignedOrUnalignedBlobIsAsGood) {
  const Shape shape = {65, 33};
  for (const WeightType type : kTypes) {
    const std::vector<float> w = RandomWeights(shape, 0.5, 6, type);
    const Blob blob = MustPack(w, shape, type, Form::kSparse);
    for (const size_t shift : {1u, 4u, 63u}) {
      Blob moved(blob.size() + shift);
      std::memcpy(moved.data() + shift, blob.data(), blob.size());
      PackedView view = {};
      ASSERT_EQ(Parse(moved.data() + shift, blob.size(), &view).message, "");
      std::vector<float> dense(w.size());
      Unpack(view, dense.data(), 1);
      EXPECT_EQ(dense, w);
    }
  }
}

// What a damaged blob may do: be refused with a sentence, or be taken for another matrix that can be read in bounds.
void ExpectHarmless(const Blob& blob) {
  PackedView view = {};
  const Status status = Parse(blob.data(), blob.size(), &view);
  if (!status.ok()) {
    EXPECT_NE(status.message, "");
    EXPECT_TRUE(status.code == StatusCode::kDamaged || status.code == StatusCode::kUnsupported);
  } else if (view.k * view.n < 1u << 22) {
    std::vector<float> dense(view.k * view.n);
    Unpack(view, dense.data(), 1);
  }
}

TEST(Format, EveryHeaderAndTableByteIsCheckedOrHarmless) {
  const Shape shape = {70, 40};
  for (const WeightType type : kTypes) {
    const std::vector<float> w = RandomWeights(shape, 0.5, 7, type);
    for (const Form form : kForms) {
      const Blob blob = MustPack(w, shape, type, form);
      internal::Header header;
      std::memcpy(&header, blob.data(), sizeof header);
      const size_t table_end = sizeof header + header.section_count * sizeof(internal::Section);
      for (size_t i = 0; i < table_end; ++i) {
        for (const int value : {0x00, 0x01, 0x7f, 0x80, 0xff, blob[i] ^ 1, blob[i] ^ 0x10, blob[i] + 1}) {
          Blob damaged = blob;
          damaged[i] = static_cast<uint8_t>(value);
          ExpectHarmless(damaged);
        }
      }
    }
  }
}

TEST(Format, FieldsThatNoReaderMayIgnore) {
  const Blob blob = MustPack(RandomWeights({70, 40}, 0.5, 8), {70, 40}, WeightType::kBf16, Form::kSparse);
  const auto code_with = [&](size_t offset, uint8_t value) {
    Blob changed = blob;
    changed[offset] = value;
    PackedView view = {};
    return Parse(changed.data(), changed.size(), &view).code;
  };
  EXPECT_EQ(code_with(0, 'X'), StatusCode::kDamaged);     // magic
  EXPECT_EQ(code_with(8, 2), StatusCode::kUnsupported);   // a newer version
  EXPECT_EQ(code_with(8, 0), StatusCode::kDamaged);       // no version
  EXPECT_EQ(code_with(16, 1), StatusCode::kUnsupported);  // a must-understand flag
  EXPECT_EQ(code_with(23, 0x80), StatusCode::kUnsupported);
  EXPECT_EQ(code_with(24, 97), StatusCode::kDamaged);     // K: one more tile than the sections hold
  EXPECT_EQ(code_with(56, 9), StatusCode::kUnsupported);  // weight type
  EXPECT_EQ(code_with(57, 32), StatusCode::kDamaged);     // code bits
  EXPECT_EQ(code_with(60, 1), StatusCode::kUnsupported);  // order
  EXPECT_EQ(code_with(61, 1), StatusCode::kDamaged);      // reserved
  EXPECT_EQ(code_with(72, 2), StatusCode::kUnsupported);  // matrix count
  EXPECT_EQ(code_with(127, 1), StatusCode::kDamaged);     // reserved
}

TEST(Format, ScalesAndGroupsMustFitTheWeightType) {
  const auto code_with = [](WeightType type, uint8_t scale_type, uint32_t group_size,
                            ScaleType packed = ScaleType::kNone) {
    const std::vector<float> w = RandomWeights({70, 40}, 0.5, 8);
    PackOptions options;
    options.type = type;
    options.form = Form::kSparse;
    options.scale_type = packed;
    Blob changed = MustPack(RowMajor(w, {70, 40}), options);
    changed[offsetof(internal::Header, scale_type)] = scale_type;
    std::memcpy(changed.data() + offsetof(internal::Header, group_size), &group_size, sizeof group_size);
    PackedView view = {};
    return Parse(changed.data(), changed.size(), &view).code;
  };
  EXPECT_EQ(code_with(WeightType::kInt8, 2, 0), StatusCode::kOk);
  EXPECT_EQ(code_with(WeightType::kInt4, 3, 32), StatusCode::kOk);
  EXPECT_EQ(code_with(WeightType::kInt4, 1, 32, ScaleType::kFp16), StatusCode::kOk);
  EXPECT_EQ(code_with(WeightType::kBf16, 2, 0), StatusCode::kDamaged);
  EXPECT_EQ(code_with(WeightType::kFp32, 0, 32), StatusCode::kDamaged);
  EXPECT_EQ(code_with(WeightType::kInt8, 1, 0), StatusCode::kDamaged);
  EXPECT_EQ(code_with(WeightType::kInt8, 2, 32), StatusCode::kDamaged);
  EXPECT_EQ(code_with(WeightType::kInt4, 0, 32), StatusCode::kDamaged);
  EXPECT_EQ(code_with(WeightType::kInt4, 4, 32), StatusCode::kDamaged);
  EXPECT_EQ(code_with(WeightType::kInt8, 3, 0), StatusCode::kDamaged);
  EXPECT_EQ(code_with(WeightType::kInt4, 2, 32, ScaleType::kFp16), StatusCode::kDamaged);  // the section is too small
  EXPECT_EQ(code_with(WeightType::kInt4, 3, 32, ScaleType::kFp16), StatusCode::kDamaged);  // no scales of columns
  EXPECT_EQ(code_with(WeightType::kInt4, 1, 32), StatusCode::kDamaged);
  for (const uint32_t group_size : {0u, 1u, 8u, 16u, 48u, 64u, 512u, 0x80000020u})
    EXPECT_EQ(code_with(WeightType::kInt4, 3, group_size), StatusCode::kDamaged) << group_size;
}

TEST(Format, WeightsThatCannotBeQuantizedAreRefused) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const WeightType type : {WeightType::kInt8, WeightType::kInt4}) {
      std::vector<float> w(600 * 20, 1.0f);
      w[555 * 20 + 3] = bad;
      PackOptions options;
      options.type = type;
      uint64_t size = 0;
      EXPECT_EQ(PackedSize(RowMajor(w, {600, 20}), options, &size).code, StatusCode::kInvalidArgument);
    }
  }
  const std::vector<float> large(64 * 3, 1e6f);
  PackOptions options;
  options.type = WeightType::kInt4;
  options.scale_type = ScaleType::kFp16;
  uint64_t size = 0;
  EXPECT_EQ(PackedSize(RowMajor(large, {64, 3}), options, &size).code, StatusCode::kInvalidArgument);
  options.scale_type = ScaleType::kFp32;
  EXPECT_EQ(MustUnpack(MustPack(RowMajor(large, {64, 3}), options)), large);
}

TEST(Format, Int8ScalesAreMultiplesOfTheirColumns) {
  // Groups of 16 whose weights shrink along K: by halves down to 2^-9 of the column's largest, and denormal ones.
  const Shape shape = {160, 3};
  std::vector<float> w(shape.k * shape.n);
  for (uint64_t k = 0; k < shape.k; ++k) {
    const auto code = static_cast<float>(static_cast<int>(k % 16) - 8);
    w[k * shape.n] = std::ldexp(code, -static_cast<int>(k / 16));
    w[k * shape.n + 1] = std::ldexp(code, -148);
    w[k * shape.n + 2] = code * 1e37f;
  }
  PackOptions options;
  options.type = WeightType::kInt4;
  options.group_size = 16;
  const Blob blob = MustPack(RowMajor(w, shape), options);
  PackedView view = {};
  ASSERT_TRUE(Parse(blob.data(), blob.size(), &view).ok());
  EXPECT_EQ(view.scale_type, ScaleType::kInt8);
  const std::vector<float> stored = MustUnpack(blob);
  for (uint64_t k = 0; k < shape.k; ++k) {
    // Of 105 steps that the largest group's scale has, half a one may be missing, for codes of up to 8; never all.
    const float group = std::ldexp(1.0f, -static_cast<int>(k / 16));
    EXPECT_NEAR(stored[k * 3], w[k * 3], std::max(8 * 0.5f / 105, group * 0.5f)) << k;
    EXPECT_TRUE(k % 16 != 0 || stored[k * 3] < 0.0f) << k;
    EXPECT_EQ(stored[k * 3 + 1], 0.0f);  // too small for a normal scale
    EXPECT_NEAR(stored[k * 3 + 2], w[k * 3 + 2], 1e31f);
  }
  for (uint64_t k = 0; k < 16; ++k) EXPECT_EQ(stored[k * 3], w[k * 3]);  // the largest group's scale is exact
}

TEST(Format, GivenScalesAreNeverInt8) {
  const std::vector<float> w(64 * 3, 1.0f), scales(2 * 3, 0.5f);
  PackOptions options;
  options.type = WeightType::kInt4;
  options.scales = scales.data();
  uint64_t size = 0;
  EXPECT_TRUE(PackedSize(RowMajor(w, {64, 3}), options, &size).ok());
  options.scale_type = ScaleType::kInt8;
  EXPECT_EQ(PackedSize(RowMajor(w, {64, 3}), options, &size).code, StatusCode::kInvalidArgument);
}

TEST(Format, EveryTruncationIsRefused) {
  for (const WeightType type : kTypes) {
    for (const Form form : kForms) {
      SCOPED_TRACE(testing::Message() << "type " << static_cast<int>(type) << " form " << static_cast<int>(form));
      const Blob blob = MustPack(RandomWeights({70, 40}, 0.5, 9), {70, 40}, type, form);
      internal::Header header;
      std::memcpy(&header, blob.data(), sizeof header);
      uint64_t needed = 0;
      for (uint32_t i = 0; i < header.section_count; ++i) {
        internal::Section section;
        std::memcpy(&section, blob.data() + sizeof header + i * sizeof section, sizeof section);
        needed = section.offset + section.size + (section.id == internal::kValues ? kOverread : 0);
      }
      for (size_t size = 0; size < blob.size(); ++size) {
        const Blob cut(blob.begin(), blob.begin() + static_cast<ptrdiff_t>(size));
        PackedView view = {};
        EXPECT_EQ(Parse(cut.data(), cut.size(), &view).code, StatusCode::kDamaged) << size;
        // The same with a header that knows of the cut, so that the checks behind the size are reached.
        if (size >= sizeof header && size < needed) {
          Blob consistent = cut;
          const uint64_t bytes = size;  // of the type that the header has
          std::memcpy(consistent.data() + offsetof(internal::Header, blob_bytes), &bytes, sizeof bytes);
          EXPECT_EQ(Parse(consistent.data(), consistent.size(), &view).code, StatusCode::kDamaged) << size;
        }
      }
    }
  }
}

TEST(Format, HugeSizesAreRefusedNotMultiplied) {
  const Blob blob = MustPack(RandomWeights({70, 40}, 0.5, 12), {70, 40}, WeightType::kBf16, Form::kSparse);
  for (const uint64_t k : {0x7fffffffull, 0x80000000ull, 0x100000000ull, 0xffffffffffffffffull}) {
    for (const uint64_t n : {40ull, 0x7fffffffull, 0xffffffffffffffffull}) {
      Blob damaged = blob;
      std::memcpy(damaged.data() + offsetof(internal::Header, k), &k, sizeof k);
      std::memcpy(damaged.data() + offsetof(internal::Header, n), &n, sizeof n);
      PackedView view = {};
      EXPECT_EQ(Parse(damaged.data(), damaged.size(), &view).code, StatusCode::kDamaged) << k << " " << n;
    }
  }
}

}  // namespace
}  // namespace sparamx
