// AMX instruction by instruction. The same tests run on the hardware, where the CPU has AMX, and on the emulator, which
// is how that is held to the hardware: the digests of random products were taken from a Granite Rapids.
#include <gtest/gtest.h>

#include <csetjmp>
#include <csignal>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include <immintrin.h>

#include "kernels/kernel_table.h"
#include "runtime/cpu.h"

namespace sparamx {
namespace {

bool HasAmx() {
  return MissingFeatures(kAmxLevel.features).empty();
}

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tile t has rows[t] rows of column_bytes[t] bytes; the others are not configured.
Config Configured(std::initializer_list<std::pair<int, int>> tiles) {
  Config c;
  int t = 0;
  for (const auto& [rows, column_bytes] : tiles) {
    c.rows[t] = static_cast<uint8_t>(rows);
    c.column_bytes[t++] = static_cast<uint16_t>(column_bytes);
  }
  return c;
}

// The intrinsics do not tell the compiler that they touch memory.
void Barrier() {
  __asm__ volatile("" ::: "memory");
}

void LoadConfig(const Config& c) {
  Barrier();
  _tile_loadconfig(&c);
}

using Rows = std::vector<uint8_t>;  // 16 x 64 bytes

template <int Tile>
void Load(const Rows& from) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from.data()), "r"(int64_t{64}), "i"(Tile) : "memory");
}

template <int Tile>
void Store(Rows* to) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to->data()), "r"(int64_t{64}), "i"(Tile) : "memory");
}

template <int Tile>
Rows Stored() {
  Rows out(16 * 64, 0xaa);
  Store<Tile>(&out);
  return out;
}

// --- Products
// ----------------------------------------------------------------------------------------------------------

constexpr int kProducts = 5;

void Multiply(int product) {
  switch (product) {
    case 0:
      _tile_dpbf16ps(0, 1, 2);
      break;
    case 1:
      _tile_dpbssd(0, 1, 2);
      break;
    case 2:
      _tile_dpbsud(0, 1, 2);
      break;
    case 3:
      _tile_dpbusd(0, 1, 2);
      break;
    default:
      _tile_dpbuud(0, 1, 2);
      break;
  }
}

// A bf16 number of any kind: zeros, denormals, infinities, NaNs, very large and very small ones, and ordinary ones.
uint16_t AnyBf16(std::mt19937* random, bool finite) {
  const auto bits = static_cast<uint32_t>((*random)());
  const uint32_t kind = bits >> 16 & 15;
  const auto number = static_cast<uint16_t>(bits);
  const uint16_t sign = number & 0x8000, fraction = number & 0x7f;
  const auto with_exponent = [&](unsigned exponent) { return static_cast<uint16_t>(sign | exponent << 7 | fraction); };
  if (kind == 0) return sign;
  if (kind == 1) return with_exponent(0);
  if (kind == 2) return with_exponent(1 + (number >> 8) % 70);    // products underflow
  if (kind == 3) return with_exponent(180 + (number >> 8) % 75);  // products overflow
  if (kind == 4 && !finite) return (number & 0x4000) != 0 ? with_exponent(255) : static_cast<uint16_t>(sign | 0x7f80);
  if (kind == 5) return with_exponent(58 + (number >> 8) % 10);  // products near the smallest normal number
  return with_exponent(120 + (number >> 8) % 12);
}

uint64_t DigestOfProducts(int product, int count, bool finite) {
  std::mt19937 random(static_cast<uint32_t>(product));
  uint64_t digest = 14695981039346656037u;
  for (int i = 0; i < count; ++i) {
    const int m = 1 + static_cast<int>(random() % 16), k = 1 + static_cast<int>(random() % 16),
              n = 1 + static_cast<int>(random() % 16);
    Rows a(1024), b(1024), sums(1024);
    for (Rows* rows : {&a, &b}) {
      for (size_t at = 0; at < 1024; at += 2) {
        const uint16_t value = product == 0 ? AnyBf16(&random, finite) : static_cast<uint16_t>(random());
        std::memcpy(rows->data() + at, &value, 2);
      }
    }
    for (size_t at = 0; at < 1024; at += 4) {
      auto value = static_cast<uint32_t>(random());
      if (product == 0) value = (value & 0xffff) | static_cast<uint32_t>(AnyBf16(&random, finite)) << 16;
      std::memcpy(sums.data() + at, &value, 4);
    }
    LoadConfig(Configured({{m, 4 * n}, {m, 4 * k}, {k, 4 * n}}));
    Load<0>(sums);
    Load<1>(a);
    Load<2>(b);
    Multiply(product);
    for (const uint8_t byte : Stored<0>()) digest = (digest ^ byte) * 1099511628211u;
    _tile_release();
  }
  return digest;
}

TEST(AmxInstructions, ProductsAreThoseOfTheHardware) {
  if (!HasAmx()) return;
  const uint64_t kExpected[kProducts] = {8119015642352637981u, 10315358701581600011u, 13877571064721912016u,
                                         7071537462040176941u, 12033242581020089019u};
  for (int product = 0; product < kProducts; ++product)
    EXPECT_EQ(DigestOfProducts(product, 2000, false), kExpected[product]) << product;
  EXPECT_EQ(DigestOfProducts(0, 2000, true), 9455951103899926046u);
}

// --- Loading and storing
// -----------------------------------------------------------------------------------------------

TEST(AmxInstructions, ALoadZeroesWhatItDoesNotFill) {
  if (!HasAmx()) return;
  const Rows ones(1024, 1);
  LoadConfig(Configured({{16, 64}}));
  EXPECT_EQ(Stored<0>(), Rows(1024, 0));
  Load<0>(ones);
  EXPECT_EQ(Stored<0>(), ones);
  LoadConfig(Configured({{5, 12}}));
  Load<0>(ones);
  const Rows stored = Stored<0>();
  for (size_t i = 0; i < 1024; ++i) EXPECT_EQ(stored[i], i / 64 < 5 && i % 64 < 12 ? 1 : 0xaa) << i;
  LoadConfig(Configured({{16, 64}}));  // and a new configuration zeroes all
  EXPECT_EQ(Stored<0>(), Rows(1024, 0));
  Load<0>(ones);
  _tile_zero(0);
  EXPECT_EQ(Stored<0>(), Rows(1024, 0));
  _tile_release();
}

TEST(AmxInstructions, EveryFormOfAnAddress) {
  if (!HasAmx()) return;
  std::vector<uint8_t> from(8192);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint8_t>(i * 7 + i / 256);
  const uint8_t* middle = from.data() + 4096;
  LoadConfig(Configured({{16, 64}, {3, 20}}));
  const auto expect_rows = [&](const uint8_t* base, int64_t stride) {
    const Rows stored = Stored<0>();
    for (int m = 0; m < 16; ++m) EXPECT_EQ(std::memcmp(&stored[m * 64], base + m * stride, 64), 0) << m;
  };
  for (const int64_t stride : {int64_t{0}, int64_t{3}, int64_t{-100}, int64_t{250}}) {
    Barrier();
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(middle), "r"(stride));
    expect_rows(middle, stride);
    __asm__ volatile("tileloadd -8(%0,%1,2), %%tmm0" ::"r"(middle), "r"(stride / 2));
    expect_rows(middle - 8, stride / 2 * 2);
    __asm__ volatile("tileloadd 1000(%0,%1,4), %%tmm0" ::"r"(middle - 1000), "r"(stride / 4));
    expect_rows(middle, stride / 4 * 4);
    register const uint8_t* base __asm__("r13") = middle;
    register int64_t index __asm__("r12") = stride / 8;
    __asm__ volatile("tileloaddt1 (%0,%1,8), %%tmm0" ::"r"(base), "r"(index));
    expect_rows(middle, stride / 8 * 8);
  }
  __asm__ volatile("tileloadd 16(%0), %%tmm0" ::"r"(middle));  // no index: one row, again and again
  expect_rows(middle + 16, 0);
  alignas(64) uint8_t on_stack[1024] = {1, 2, 3};
  Barrier();
  register const uint8_t* stack __asm__("r14") = on_stack;
  register int64_t stride __asm__("r9") = 64;
  __asm__ volatile("tileloadd (%0,%1), %%tmm0" ::"r"(stack), "r"(stride));
  expect_rows(on_stack, 64);
  Config read_back;
  _tile_storeconfig(&read_back);
  Barrier();
  EXPECT_EQ(read_back.palette, 1);
  EXPECT_EQ(read_back.rows[1], 3);
  EXPECT_EQ(read_back.column_bytes[1], 20);
  _tile_release();
  _tile_storeconfig(&read_back);
  Barrier();
  const Config nothing = [] {
    Config c;
    c.palette = 0;
    return c;
  }();
  EXPECT_EQ(std::memcmp(&read_back, &nothing, sizeof nothing), 0);
}

TEST(AmxInstructions, AnInterruptedLoadIsResumed) {
  if (!HasAmx()) return;
  Config c = Configured({{16, 64}});
  c.start_row = 14;
  LoadConfig(c);
  Load<0>(Rows(1024, 1));
  const Rows stored = Stored<0>();
  for (size_t i = 0; i < 1024; ++i) EXPECT_EQ(stored[i], i / 64 < 14 ? 0 : 1) << i;
  _tile_release();
}

// --- Faults
// ------------------------------------------------------------------------------------------------------------

sigjmp_buf after_fault;

void OnFault(int signal, siginfo_t*, void*) {
  siglongjmp(after_fault, signal);
}

// The signal that `action` ends in, 0: none.
int SignalOf(const std::function<void()>& action) {
  struct sigaction catcher = {}, old[2];
  catcher.sa_sigaction = OnFault;
  catcher.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &catcher, &old[0]);
  sigaction(SIGSEGV, &catcher, &old[1]);
  const int signal = sigsetjmp(after_fault, 1);
  if (signal == 0) action();
  sigaction(SIGILL, &old[0], nullptr);
  sigaction(SIGSEGV, &old[1], nullptr);
  return signal;
}

TEST(AmxInstructions, ImpossibleConfigurationsFault) {
  if (!HasAmx()) return;
  const auto signal_of = [](const std::function<void(Config*)>& change) {
    Config c = Configured({{16, 64}, {16, 64}, {16, 64}});
    change(&c);
    const int signal = SignalOf([&] { LoadConfig(c); });
    _tile_release();
    return signal;
  };
  EXPECT_EQ(signal_of([](Config*) {}), 0);
  EXPECT_EQ(signal_of([](Config* c) { c->palette = 2; }), SIGSEGV);
  EXPECT_EQ(signal_of([](Config* c) { c->reserved[13] = 1; }), SIGSEGV);
  EXPECT_EQ(signal_of([](Config* c) { c->rows[0] = 17; }), SIGSEGV);
  EXPECT_EQ(signal_of([](Config* c) { c->column_bytes[1] = 65; }), SIGSEGV);
  EXPECT_EQ(signal_of([](Config* c) { c->rows[2] = 0; }), SIGSEGV);
  EXPECT_EQ(signal_of([](Config* c) { c->column_bytes[2] = 0; }), SIGSEGV);
  EXPECT_EQ(signal_of([](Config* c) { c->rows[8] = 1; }), SIGSEGV);
  EXPECT_EQ(signal_of([](Config* c) { c->column_bytes[15] = 4; }), SIGSEGV);
  EXPECT_EQ(signal_of([](Config* c) { c->column_bytes[0] = 3; }), 0);
  EXPECT_EQ(signal_of([](Config* c) { *c = Config(), c->palette = 0, c->rows[0] = 99; }), 0);
}

TEST(AmxInstructions, ImpossibleInstructionsFault) {
  if (!HasAmx()) return;
  const Config square = Configured({{16, 64}, {16, 64}, {16, 64}});
  Rows rows(1024);  // made here: a fault jumps over destructors
  const auto signal_of = [](const Config& c, const std::function<void()>& action) {
    LoadConfig(c);
    const int signal = SignalOf(action);
    _tile_release();
    return signal;
  };
  const auto product = [] { _tile_dpbf16ps(0, 1, 2); };
  EXPECT_EQ(signal_of(square, product), 0);
  EXPECT_EQ(SignalOf(product), SIGILL);  // nothing is configured
  EXPECT_EQ(SignalOf([] { _tile_zero(0); }), SIGILL);
  EXPECT_EQ(SignalOf([&] { Load<0>(rows); }), SIGILL);
  EXPECT_EQ(signal_of(square, [&] { Load<3>(rows); }), SIGILL);
  EXPECT_EQ(signal_of(square, [] { _tile_zero(3); }), SIGILL);
  EXPECT_EQ(signal_of(square, [] { _tile_dpbssd(0, 1, 3); }), SIGILL);
  EXPECT_EQ(signal_of(square, [] { _tile_dpbssd(3, 1, 2); }), SIGILL);
  // The same tile twice, which the assembler refuses to write: tdpbssd 0, 1, 1, tdpbf16ps 0, 0, 1, tdpbuud 0, 1, 0.
  EXPECT_EQ(signal_of(square, [] { __asm__ volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1"); }), SIGILL);
  EXPECT_EQ(signal_of(square, [] { __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc0"); }), SIGILL);
  EXPECT_EQ(signal_of(square, [] { __asm__ volatile(".byte 0xc4, 0xe2, 0x78, 0x5e, 0xc1"); }), SIGILL);
  EXPECT_EQ(signal_of(Configured({{16, 64}, {15, 64}, {16, 64}}), product), SIGILL);
  EXPECT_EQ(signal_of(Configured({{16, 64}, {16, 60}, {16, 64}}), product), SIGILL);
  EXPECT_EQ(signal_of(Configured({{16, 64}, {16, 60}, {15, 64}}), product), 0);
  EXPECT_EQ(signal_of(Configured({{16, 64}, {16, 64}, {16, 60}}), product), SIGILL);
  EXPECT_EQ(signal_of(Configured({{16, 63}, {16, 64}, {16, 63}}), product), SIGILL);
  Config started = square;
  started.start_row = 1;
  EXPECT_EQ(signal_of(started, product), 0);
  EXPECT_EQ(signal_of(started, [] { _tile_zero(0); }), 0);
  started.start_row = 16;
  EXPECT_EQ(signal_of(started, [&] { Load<0>(rows); }), SIGILL);
  EXPECT_EQ(signal_of(started, [&] { Store<0>(&rows); }), SIGILL);
  EXPECT_EQ(signal_of(Configured({{16, 63}}), [&] { Load<0>(rows); }), SIGILL);
  EXPECT_EQ(signal_of(Configured({{16, 63}}), [&] { Store<0>(&rows); }), SIGILL);
  EXPECT_EQ(signal_of(Configured({{16, 63}}), [] { _tile_zero(0); }), 0);
}

// Linux ends a process by SIGILL whose tile instructions come without its permission. Asking for it again in the child
// is out of the question: the child must not have looked at the CPU.
TEST(AmxInstructionsDeathTest, WithoutPermissionTheyEndTheProcess) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        const Config c = Configured({{16, 64}});
        signal(SIGILL, SIG_DFL);
        LoadConfig(c);
        _tile_zero(0);
      },
      testing::KilledBySignal(SIGILL), "");
}

}  // namespace
}  // namespace sparamx
