// Every attention kernel against a plain double-precision one, over odd shapes and ways to run in parallel. Every
// buffer is a heap block of exactly its size, so that AddressSanitizer sees any access outside. What the options mean
// is tested from Python, against the NumPy reference.
#include "runtime/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "runtime/cpu.h"

namespace sparamx {
namespace {

struct Case {
  size_t batch, heads, kv_heads, queries, past, key_size, value_size;
  bool causal, present, shared;
  int64_t window;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "batch " << c.batch << " heads " << c.heads << "/" << c.kv_heads << " queries " << c.queries << " past "
             << c.past << " sizes " << c.key_size << ", " << c.value_size << " causal " << c.causal << " present "
             << c.present << " shared " << c.shared << " window " << c.window;
}

std::vector<float> Normal(std::mt19937* random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> v(count);
  for (float& x : v) x = normal(*random);
  return v;
}

struct Problem {
  Case c;
  std::vector<float> query, key, value, past_key, past_value;
  size_t total() const { return c.past + c.queries; }
};

Problem MakeProblem(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  const size_t tokens = c.batch * c.queries, cached = c.batch * c.kv_heads * (c.shared ? c.past + c.queries : c.past);
  return {c,
          Normal(&random, tokens * c.heads * c.key_size),
          Normal(&random, tokens * c.kv_heads * c.key_size),
          Normal(&random, tokens * c.kv_heads * c.value_size),
          Normal(&random, cached * c.key_size),
          Normal(&random, cached * c.value_size)};
}

// The number i of key (or value) t of a head, wherever it comes from.
double At(const Problem& p, const std::vector<float>& past, const std::vector<float>& fresh, size_t size, size_t entry,
          size_t head, size_t t, size_t i) {
  const size_t capacity = p.c.shared ? p.total() : p.c.past;
  if (t < p.c.past) return past[((entry * p.c.kv_heads + head) * capacity + t) * size + i];
  return fresh[((entry * p.c.queries + t - p.c.past) * p.c.kv_heads + head) * size + i];
}

std::vector<double> Expected(const Problem& p) {
  const Case& c = p.c;
  std::vector<double> out(c.batch * c.queries * c.heads * c.value_size);
  for (size_t b = 0; b < c.batch; ++b)
    for (size_t s = 0; s < c.queries; ++s)
      for (size_t h = 0; h < c.heads; ++h) {
        const size_t kv = h / (c.heads / c.kv_heads), last = c.causal ? c.past + s + 1 : p.total();
        const size_t first = c.window < 0 ? 0 : last - std::min(last, static_cast<size_t>(c.window));
        std::vector<double> weights;
        for (size_t t = first; t < last; ++t) {
          double score = 0;
          for (size_t i = 0; i < c.key_size; ++i)
            score += p.query[((b * c.queries + s) * c.heads + h) * c.key_size + i] *
                     At(p, p.past_key, p.key, c.key_size, b, kv, t, i);
          weights.push_back(score / std::sqrt(static_cast<double>(c.key_size)));
        }
        const double top = *std::max_element(weights.begin(), weights.end());
        double sum = 0;
        for (double& w : weights) sum += w = std::exp(w - top);
        for (size_t t = first; t < last; ++t)
          for (size_t i = 0; i < c.value_size; ++i)
            out[((b * c.queries + s) * c.heads + h) * c.value_size + i] +=
                weights[t - first] / sum * At(p, p.past_value, p.value, c.value_size, b, kv, t, i);
      }
  return out;
}

struct Threads {
  size_t count;
  static void Run(void* host, size_t items, void (*body)(void*, size_t), void* user) {
    std::vector<std::thread> threads;
    const size_t count = static_cast<Threads*>(host)->count;
    for (size_t first = 0; first < count; ++first)
      threads.emplace_back([=] {
        for (size_t i = first; i < items; i += count) body(user, i);
      });
    for (std::thread& t : threads) t.join();
  }
};

struct Result {
  std::vector<float> output, present_key, present_value;
};

Result RunAttention(Problem p, const char* isa, size_t threads) {
  const Case& c = p.c;
  Attention::Options options;
  options.heads = c.heads;
  options.kv_heads = c.kv_heads;
  options.window = c.window;
  options.causal = c.causal;
  options.isa = isa;
  Attention attention;
  EXPECT_TRUE(attention.Init(options).ok());
  Result r;
  r.output.resize(c.batch * c.queries * c.heads * c.value_size);
  AttentionCall call;
  call.batch = c.batch;
  call.queries = call.new_keys = c.queries;
  call.key_size = c.key_size;
  call.value_size = c.value_size;
  call.query = p.query.data();
  call.key = p.key.data();
  call.value = p.value.data();
  const auto strides = [&](size_t heads, size_t size) {
    return TokenStrides{c.queries * heads * size, heads * size, size};
  };
  call.query_strides = strides(c.heads, c.key_size);
  call.key_strides = strides(c.kv_heads, c.key_size);
  call.value_strides = strides(c.kv_heads, c.value_size);
  call.output_strides = strides(c.heads, c.value_size);
  const std::vector<int32_t> last_keys(c.batch, static_cast<int32_t>(p.total() - 1));
  call.total = call.capacity = p.total();
  if (c.past > 0) {
    call.past_key = p.past_key.data();
    call.past_value = p.past_value.data();
    call.past_capacity = c.shared ? p.total() : c.past;
    call.last_keys = last_keys.data();
  }
  if (c.shared) {
    call.present_key = p.past_key.data();
    call.present_value = p.past_value.data();
  } else if (c.present) {
    r.present_key.resize(c.batch * c.kv_heads * p.total() * c.key_size);
    r.present_value.resize(c.batch * c.kv_heads * p.total() * c.value_size);
    call.present_key = r.present_key.data();
    call.present_value = r.present_value.data();
  }
  call.output = r.output.data();
  EXPECT_TRUE(attention.Check(call).ok());
  const std::unique_ptr<uint8_t[]> scratch(new uint8_t[attention.ScratchBytes(call) + 64]);
  void* aligned = reinterpret_cast<void*>(RoundUp(reinterpret_cast<uintptr_t>(scratch.get()), 64));
  Threads pool = {threads};
  attention.Run(call, aligned, {Threads::Run, &pool});
  if (c.shared) {
    r.present_key = p.past_key;
    r.present_value = p.past_value;
  }
  return r;
}

std::vector<Case> Cases() {
  return {
      {1, 4, 1, 1, 700, 128, 128, true, true, true, -1},
      {2, 6, 2, 1, 130, 40, 24, true, true, false, -1},
      {1, 1, 1, 1, 0, 8, 8, true, true, false, -1},
      {1, 3, 3, 5, 64, 17, 33, true, false, false, -1},
      {2, 8, 2, 50, 70, 16, 16, true, true, true, 9},
      {1, 7, 1, 40, 0, 72, 80, true, true, false, -1},
      {1, 9, 1, 1, 1100, 24, 24, true, true, false, 65},
      {2, 2, 2, 97, 0, 20, 20, false, false, false, -1},
      {1, 12, 1, 1, 63, 1, 1, true, true, true, -1},
      {1, 2, 1, 100, 31, 130, 15, false, true, false, -1},
      // Around the lengths from which on keys are cut into parts.
      {1, 4, 2, 1, 510, 16, 16, true, true, true, -1},
      {2, 2, 1, 1, 511, 16, 32, true, false, false, -1},
      {1, 4, 2, 1, 512, 32, 16, true, true, true, -1},
      {1, 2, 2, 1, 1022, 16, 16, true, true, true, 600},
      {1, 2, 2, 2, 1022, 16, 16, true, true, true, -1},
      {2, 4, 2, 1, 1024, 16, 16, true, true, false, -1},
      {1, 2, 2, 1, 1535, 16, 16, true, true, true, 700},
      // And into longer ones.
      {1, 32, 32, 1, 2046, 8, 8, true, true, true, -1},
      {1, 32, 32, 1, 2047, 8, 8, true, true, true, -1},
      {1, 44, 44, 1, 1600, 8, 8, true, true, true, 900},
  };
}

std::vector<const Level*> SupportedLevels() {
  std::vector<const Level*> supported;
  for (const Level* level : Levels())
    if (MissingFeatures(level->features).empty()) supported.push_back(level);
  return supported;
}

void CheckAgainstDoublePrecision(const Level& level) {
  unsigned seed = 0;
  for (const Case& c : Cases()) {
    const Problem problem = MakeProblem(c, ++seed);
    const std::vector<double> expected = Expected(problem);
    const Result result = RunAttention(problem, level.name, 1 + seed % 3);
    double largest = 0, difference = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      largest = std::max(largest, std::abs(expected[i]));
      difference = std::max(difference, std::abs(expected[i] - result.output[i]));
    }
    EXPECT_LE(difference, 1e-5 * largest) << c;
    for (size_t i = 0; i < result.present_key.size(); ++i) {
      const size_t row = i / c.key_size, t = row % problem.total(), head = row / problem.total();
      ASSERT_EQ(result.present_key[i], At(problem, problem.past_key, problem.key, c.key_size, head / c.kv_heads,
                                          head % c.kv_heads, t, i % c.key_size))
          << c;
    }
    for (size_t i = 0; i < result.present_value.size(); ++i) {
      const size_t row = i / c.value_size, t = row % problem.total(), head = row / problem.total();
      ASSERT_EQ(result.present_value[i], At(problem, problem.past_value, problem.value, c.value_size, head / c.kv_heads,
                                            head % c.kv_heads, t, i % c.value_size))
          << c;
    }
  }
}

TEST(Attention, AgreesWithDoublePrecision) {
  for (const Level* level : SupportedLevels()) {
    SCOPED_TRACE(level->name);
    CheckAgainstDoublePrecision(*level);
  }
}

TEST(Attention, ThreadsDoNotChangeABit) {
  for (const Level* level : SupportedLevels())
    for (const Case& c : Cases()) {
      const Problem problem = MakeProblem(c, 77);
      const Result one = RunAttention(problem, level->name, 1);
      for (const size_t threads : {2, 7})
        EXPECT_EQ(RunAttention(problem, level->name, threads).output, one.output) << level->name << " " << c;
    }
}

}  // namespace
}  // namespace sparamx
