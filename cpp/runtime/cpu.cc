#include "runtime/cpu.h"

#include <cpuid.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

// Defined by the AMX emulator of the tests (tests/amx_emulator) where that is loaded into the process, by nothing else:
// changes what XGETBV and CPUID said of AMX.
extern "C" __attribute__((weak, visibility("default"))) void sparamx_amx_emulator_pretend(uint64_t* xcr0,
                                                                                          uint32_t* leaf7_edx);

namespace sparamx {
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers Cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
  return r;
}

bool Bit(unsigned word, int bit) {
  return (word >> bit & 1u) != 0;
}

// The register states that the operating system saves. XGETBV exists only where OSXSAVE is set.
uint64_t SavedStates() {
  if (!Bit(Cpuid(1, 0).c, 27)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Intel SDM volume 2A, CPUID; the bits of XCR0 are in volume 1, chapter 13.
uint64_t Detect() {
  uint64_t xcr0 = SavedStates();
  Registers l7 = Cpuid(7, 0);
  if (sparamx_amx_emulator_pretend != nullptr) sparamx_amx_emulator_pretend(&xcr0, &l7.d);
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6, tiles = (xcr0 & 0x60000) == 0x60000;
  const Registers l1 = Cpuid(1, 0), l71 = Cpuid(7, 1), e1 = Cpuid(0x80000001, 0);
  uint64_t features = 0;
  const bool fma = Bit(l1.c, 12), f16c = Bit(l1.c, 29), popcnt = Bit(l1.c, 23), avx = Bit(l1.c, 28);
  const bool bmi1 = Bit(l7.b, 3), avx2 = Bit(l7.b, 5), bmi2 = Bit(l7.b, 8), lzcnt = Bit(e1.c, 5);
  if (ymm && avx && avx2 && fma && f16c && popcnt && bmi1 && bmi2 && lzcnt) features |= kAvx2;
  if (zmm && Bit(l7.b, 16) && Bit(l7.b, 17) && Bit(l7.b, 30) && Bit(l7.b, 31)) features |= kAvx512;
  if (zmm && Bit(l7.c, 1) && Bit(l7.c, 6)) features |= kAvx512Vbmi2;
  if (zmm && Bit(l7.c, 8)) features |= kGfni;
  if (zmm && Bit(l7.c, 11)) features |= kAvx512Vnni;
  if (zmm && Bit(l71.a, 5)) features |= kAvx512Bf16;
  if (tiles && Bit(l7.d, 24)) features |= kAmxTile;
  if (tiles && Bit(l7.d, 22)) features |= kAmxBf16;
  if (tiles && Bit(l7.d, 25)) features |= kAmxInt8;
  return features;
}

// Linux saves tile registers only for processes that asked (arch_prctl(2), ARCH_REQ_XCOMP_PERM with
// XFEATURE_XTILEDATA).
bool PermitAmx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Detected {
  uint64_t features = 0;
  std::string amx_refusal;
};

const Detected& DetectOnce() {
  static const Detected detected = [] {
    Detected d;
    d.features = Detect();
    constexpr uint64_t kAmx = kAmxTile | kAmxBf16 | kAmxInt8;
    if ((d.features & kAmx) == kAmx && !PermitAmx()) {
      d.features &= ~kAmx;
      d.amx_refusal =
          std::string("the operating system refused AMX to this process (arch_prctl: ") + std::strerror(errno) + ")";
      std::fprintf(stderr, "sparamx-onnx: %s; using AVX-512 instead\n", d.amx_refusal.c_str());
    }
    return d;
  }();
  return detected;
}

struct FeatureName {
  uint64_t bit;
  const char* name;
};
constexpr FeatureName kFeatureNames[] = {
    {kAvx2, "avx2"},        {kAvx512, "avx512"},          {kAvx512Vbmi2, "avx512_vbmi2"},
    {kGfni, "gfni"},        {kAvx512Vnni, "avx512_vnni"}, {kAvx512Bf16, "avx512_bf16"},
    {kAmxTile, "amx_tile"}, {kAmxBf16, "amx_bf16"},       {kAmxInt8, "amx_int8"},
};

std::string LevelNames() {
  std::string names;
  for (const Level* level : Levels()) names += (names.empty() ? "" : ", ") + std::string(level->name);
  return names;
}

}  // namespace

uint64_t CpuFeatures() {
  return DetectOnce().features;
}

const std::string& AmxRefusal() {
  return DetectOnce().amx_refusal;
}

size_t CpuCount() {
  static const size_t count = [] {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return static_cast<size_t>(CPU_COUNT(&set));
    return static_cast<size_t>(std::thread::hardware_concurrency());
  }();
  return count == 0 ? 1 : count;
}

Vendor CpuVendor() {
  const Registers r = Cpuid(0, 0);
  const unsigned words[3] = {r.b, r.d, r.c};
  char name[sizeof words];
  std::memcpy(name, words, sizeof words);
  if (std::memcmp(name, "GenuineIntel", sizeof name) == 0) return Vendor::kIntel;
  return std::memcmp(name, "AuthenticAMD", sizeof name) == 0 ? Vendor::kAmd : Vendor::kOther;
}

std::string CpuName() {
  char name[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Registers r = Cpuid(0x80000002 + i, 0);
    const unsigned words[4] = {r.a, r.b, r.c, r.d};
    std::memcpy(name + 16 * i, words, sizeof words);
  }
  const std::string text = name;
  const size_t first = text.find_first_not_of(' ');
  return first == std::string::npos ? "unknown" : text.substr(first, text.find_last_not_of(' ') - first + 1);
}

const char* ForcedLevel() {
  const char* name = std::getenv("SPARAMX_ISA");
  return name == nullptr || *name == '\0' ? nullptr : name;
}

std::vector<std::string> FeatureNames() {
  std::vector<std::string> names;
  for (const FeatureName& f : kFeatureNames)
    if ((CpuFeatures() & f.bit) != 0) names.emplace_back(f.name);
  return names;
}

const std::vector<const Level*>& Levels() {
  static const std::vector<const Level*> levels = {
      &kScalarLevel, &kAvx2Level, &kAvx512Level, &kAvx512VnniLevel, &kAvx512Vbmi2Level, &kAvx512Bf16Level, &kAmxLevel};
  return levels;
}

std::string MissingFeatures(uint64_t needed) {
  const uint64_t missing = needed & ~CpuFeatures();
  std::string names;
  for (const FeatureName& f : kFeatureNames)
    if ((missing & f.bit) != 0) names += (names.empty() ? "" : ", ") + std::string(f.name);
  return names;
}

Status ChooseLevel(const char* name, const Level** level, bool* forced) {
  const bool from_environment = name == nullptr || std::strcmp(name, "auto") == 0;
  if (from_environment) name = ForcedLevel();
  const bool by_cpu = name == nullptr || std::strcmp(name, "auto") == 0;
  if (forced != nullptr) *forced = !by_cpu;
  if (by_cpu) {
    for (const Level* candidate : Levels())
      if (MissingFeatures(candidate->features).empty()) *level = candidate;
    return {};
  }
  const std::string quoted = (from_environment ? "SPARAMX_ISA=" : "instruction-set level ") + std::string(name);
  for (const Level* candidate : Levels()) {
    if (std::strcmp(candidate->name, name) != 0) continue;
    const std::string missing = MissingFeatures(candidate->features);
    if (!missing.empty())
      return Status::Unsupported(
          quoted + " cannot run here: " + (AmxRefusal().empty() ? "this CPU lacks " + missing : AmxRefusal()));
    *level = candidate;
    return {};
  }
  return Status::Unsupported(quoted + " is not a level of this library (" + LevelNames() + ")");
}

}  // namespace sparamx
