// Attention over a packed cache: step after step against a plain recomputation from all tokens, and over damaged
// caches. Every buffer is a heap block of exactly its size, so that AddressSanitizer sees any access outside. What the
// options mean is tested from Python, against the NumPy reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "damage.h"
#include "format/number.h"
#include "format/packed_cache.h"
#include "runtime/attention.h"
#include "runtime/cpu.h"
#include "tested_levels.h"

namespace sparamx {
namespace {

struct Setting {
  size_t heads, kv_heads, key_size, value_size;
  CacheOptions cache;
};

void RunHere(void*, size_t count, void (*body)(void*, size_t), void* user) {
  for (size_t i = 0; i < count; ++i) body(user, i);
}

// One entry whose cache lives in one buffer.
struct Conversation {
  Setting s;
  CacheLayout layout;
  size_t row_blocks;
  std::vector<uint8_t> cache;
  size_t tokens = 0;
  Attention attention;
  std::mt19937 random;
  std::vector<float> keys, values;  // of all tokens, as given
  std::vector<float> query, output;

  Conversation(const Setting& setting, size_t capacity, const char* isa, unsigned seed)
      : s(setting),
        layout(setting.cache, setting.key_size, setting.value_size),
        row_blocks(layout.PackedBlocks(capacity)),
        cache(s.kv_heads * layout.RowBytes(row_blocks), 0xcd),
        random(seed) {
    Attention::Options options;
    options.heads = s.heads;
    options.kv_heads = s.kv_heads;
    options.packed = true;
    options.cache = s.cache;
    options.isa = isa;
    EXPECT_EQ(attention.Init(options).message, "");
  }

  std::vector<float> Normal(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> v(count);
    for (float& x : v) x = normal(random);
    return v;
  }

  Status Call(size_t fresh, const std::vector<float>* bias = nullptr) {
    query = Normal(fresh * s.heads * s.key_size);
    const std::vector<float> key = Normal(fresh * s.kv_heads * s.key_size);
    const std::vector<float> value = Normal(fresh * s.kv_heads * s.value_size);
    output.assign(fresh * s.heads * s.value_size, 0.0f);
    const auto last = static_cast<int32_t>(tokens + fresh - 1);
    AttentionCall call;
    call.batch = 1;
    call.queries = call.new_keys = fresh;
    call.key_size = s.key_size;
    call.value_size = s.value_size;
    call.query = query.data();
    call.key = key.data();
    call.value = value.data();
    call.query_strides = {0, s.heads * s.key_size, s.key_size};
    call.key_strides = {0, s.kv_heads * s.key_size, s.key_size};
    call.value_strides = {0, s.kv_heads * s.value_size, s.value_size};
    call.output_strides = {0, s.heads * s.value_size, s.value_size};
    call.layout = layout;
    call.past_cache = call.present_cache = cache.data();
    call.past_blocks = call.present_blocks = row_blocks;
    call.past_capacity = layout.Capacity(row_blocks);
    call.last_keys = &last;
    call.total = call.capacity = tokens + fresh;
    call.output = output.data();
    if (bias != nullptr) call.bias = {bias->data(), {}, bias->size()};
    const Status checked = attention.Check(call);
    if (!checked.ok()) return checked;
    const std::unique_ptr<uint8_t[]> scratch(new uint8_t[attention.ScratchBytes(call) + 64]);
    void* aligned = reinterpret_cast<void*>(RoundUp(reinterpret_cast<uintptr_t>(scratch.get()), 64));
    const Status status = attention.Run(call, aligned, {RunHere, nullptr});
    if (!status.ok()) return status;
    keys.insert(keys.end(), key.begin(), key.end());
    values.insert(values.end(), value.begin(), value.end());
    tokens += fresh;
    return {};
  }
};

// All tokens of a head as a call after `before` of them sees them: rounded, and old blocks pruned. Tiles are visited in
// the order that docs/attention.md gives.
std::vector<double> Seen(const std::vector<float>& given, size_t heads, size_t head, size_t size, size_t tokens,
                         const CacheLayout& layout, size_t before, size_t kept, bool is_key) {
  std::vector<double> seen(tokens * size);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t i = 0; i < size; ++i)
      seen[t * size + i] = FloatFromBf16(Bf16FromFloat(given[(t * heads + head) * size + i]));
  for (size_t b = layout.sink_blocks; b < layout.ClosedBlocks(before); ++b) {
    std::vector<size_t> order(kCacheBlock * size);  // token * size + i
    std::iota(order.begin(), order.end(), 0);
    const auto place = [&](size_t n) {
      const size_t t = n / size, i = n % size;
      return is_key ? layout.KeyWord(t, i) : layout.ValueWord(t, i);
    };
    double* const block = seen.data() + b * kCacheBlock * size;
    std::sort(order.begin(), order.end(), [&](size_t x, size_t y) {
      const double a = std::abs(block[x]), c = std::abs(block[y]);
      return a != c ? a > c : place(x) < place(y);
    });
    for (size_t n = kept; n < order.size(); ++n) block[order[n]] = 0;
  }
  return seen;
}

// The largest difference of a call's output, relative to the largest output.
double Error(const Conversation& c, size_t fresh) {
  const Setting& s = c.s;
  const size_t before = c.tokens - fresh;
  double largest = 0, difference = 0;
  for (size_t kv = 0; kv < s.kv_heads; ++kv) {
    const auto keys = Seen(c.keys, s.kv_heads, kv, s.key_size, c.tokens, c.layout, before, c.layout.key_kept, true);
    const auto values =
        Seen(c.values, s.kv_heads, kv, s.value_size, c.tokens, c.layout, before, c.layout.value_kept, false);
    const size_t group = s.heads / s.kv_heads;
    for (size_t q = 0; q < fresh * group; ++q) {
      const size_t token = q / group, row = token * s.heads + kv * group + q % group;
      std::vector<double> weights(before + token + 1);
      for (size_t t = 0; t < weights.size(); ++t) {
        for (size_t i = 0; i < s.key_size; ++i) weights[t] += c.query[row * s.key_size + i] * keys[t * s.key_size + i];
        weights[t] /= std::sqrt(static_cast<double>(s.key_size));
      }
      const double top = *std::max_element(weights.begin(), weights.end());
      double sum = 0;
      for (double& w : weights) sum += w = std::exp(w - top);
      for (size_t i = 0; i < s.value_size; ++i) {
        double expected = 0;
        for (size_t t = 0; t < weights.size(); ++t) expected += weights[t] / sum * values[t * s.value_size + i];
        largest = std::max(largest, std::abs(expected));
        difference = std::max(difference, std::abs(expected - c.output[row * s.value_size + i]));
      }
    }
  }
  return difference / largest;
}

TEST(PackedAttention, EachOf600StepsIsAFullRecomputation) {
  const Setting setting = {4, 2, 24, 20, {0.3f, 0.5f, 70, 40}};
  for (const Level* level : TestedLevels()) {
    Conversation c(setting, 600, level->name, 1);
    for (size_t step = 0; step < 600; ++step) {
      ASSERT_EQ(c.Call(1).message, "") << level->name << " step " << step;
      ASSERT_LE(Error(c, 1), 2e-5) << level->name << " step " << step;
    }
  }
}

TEST(PackedAttention, PromptsInChunks) {
  const std::vector<Setting> settings = {{3, 3, 40, 40, {0.5f, 0.0f, 0, 0}},
                                         {7, 1, 128, 128, {0.9f, 0.3f, 0, 64}},
                                         {9, 1, 16, 33, {0.0f, 0.0f, 1, 1}},
                                         {20, 1, 32, 16, {0.0f, 0.7f, 0, 0}}};
  for (const Level* level : TestedLevels())
    for (const Setting& setting : settings) {
      Conversation c(setting, 700, level->name, 2);
      for (const size_t fresh : {100, 1, 63, 64, 2, 1, 130, 1}) {
        ASSERT_EQ(c.Call(fresh).message, "") << level->name;
        ASSERT_LE(Error(c, fresh), 2e-5) << level->name << " key size " << setting.key_size << " after " << c.tokens;
      }
    }
}

// Keys that a bias has no numbers for are hidden, and memory behind it is not read: the block is of exactly its size.
TEST(PackedAttention, ABiasMayHaveFewerKeysThanThereAre) {
  const Setting setting = {4, 2, 24, 20, {0.3f, 0.5f, 0, 0}};
  for (const Level* level : TestedLevels())
    for (const size_t keys : {1, 70, 128, 150}) {
      Conversation c(setting, 300, level->name, 6);
      ASSERT_EQ(c.Call(200).message, "");
      Conversation other = c;
      std::vector<float> bias = c.Normal(keys);
      other.random = c.random;
      ASSERT_EQ(c.Call(1, &bias).message, "");
      bias.resize(201, -std::numeric_limits<float>::infinity());
      ASSERT_EQ(other.Call(1, &bias).message, "");
      EXPECT_EQ(c.output, other.output) << level->name << " " << keys;
    }
}

// Either it runs, or it says what is wrong and leaves the cache alone.
TEST(PackedAttention, DamagedCachesAreReadWithinTheirRows) {
  const std::vector<Setting> settings = {{5, 1, 16, 24, {0.95f, 0.9f, 0, 0}},  {5, 1, 40, 24, {0.95f, 0.9f, 0, 0}},
                                         {4, 2, 64, 64, {0.3f, 0.5f, 64, 64}}, {3, 3, 40, 40, {0.5f, 0.0f, 0, 0}},
                                         {9, 1, 16, 33, {0.0f, 0.0f, 1, 1}},   {6, 2, 80, 20, {0.0f, 0.7f, 0, 30}}};
  std::mt19937 random(3);
  std::vector<Conversation> conversations;
  for (const Level* level : TestedLevels())
    for (const Setting& setting : settings) {
      conversations.emplace_back(setting, 300, level->name, 4);
      ASSERT_EQ(conversations.back().Call(193).message, "");
    }
  const size_t count = TestCount(1500);
  size_t refused = 0;
  for (size_t i = 0; i < count; ++i) {
    Conversation c = conversations[random() % conversations.size()];
    const size_t row = c.layout.RowBytes(c.row_blocks);
    const size_t head = random() % c.s.kv_heads;
    std::vector<uint8_t> damaged(c.cache.begin() + static_cast<ptrdiff_t>(head * row),
                                 c.cache.begin() + static_cast<ptrdiff_t>((head + 1) * row));
    if (random() % 8 == 0) {  // whole bitmaps, or whole rows behind the header
      std::memset(damaged.data() + 64, 0xff, random() % (row - 64));
    } else {
      Damage(&damaged, random() % 8 == 0 ? 64 : row, &random);
    }
    std::copy(damaged.begin(), damaged.end(), c.cache.begin() + static_cast<ptrdiff_t>(head * row));
    const std::vector<uint8_t> before = c.cache;
    const Status status = c.Call(1 + random() % 3);
    if (!status.ok()) {
      ++refused;
      EXPECT_EQ(status.message.find("past_cache of entry 0, head "), 0u) << status.message;
      EXPECT_EQ(c.cache, before) << i;
    }
  }
  EXPECT_GT(refused, count / 10);
  EXPECT_LT(refused, count * 9 / 10);
}

}  // namespace
}  // namespace sparamx
