#include "runtime/choice.h"

#include <vector>

#include "runtime/cpu.h"

namespace sparamx {
namespace {

// On CPUs of `vendor` whose highest level is `best`, the kernel of `level` for `kernel_activations` is faster where M
// lies in [first_rows, last_rows]. Without a rule the level's own kernel runs. Where somebody forced the level, only
// rules that stay on it apply.
struct Rule {
  const Level* best;
  Vendor vendor;
  WeightType type;
  Activations activations;
  size_t first_rows, last_rows;
  const Level* level;
  Activations kernel_activations;
};

constexpr size_t kAnyRows = ~static_cast<size_t>(0);

// One file per vendor, each written by benchmarks/tune.py on a CPU of that vendor. Why rules are what they are on
// Intel:
//  - vdpbf16ps does one product of 512 bits in 2.1 cycles, fp32 FMA two a cycle: FMA is faster at every M, although
//    bf16 weights must be widened.
//  - With AMX even one row of bf16 or int8 runs faster through the tiles, which leave the vector ports to the
//  expansion.
//    int4 needs its sums scaled group by group, outside the tiles: few rows are faster without them, and many are
//    cheaper where the codes become bf16 weights once.
// Others (AVX2, where one level has all kernels, and vendors that are not listed) need no rules: there is nothing else
// that could be faster.
const Rule kRules[] = {
#include "runtime/choice_amd.inc"
#include "runtime/choice_intel.inc"
};

// ASCII alone: JSON is UTF-8, which the environment need not be.
std::string Quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (c >= 0x20 && c < 0x7f) out += c;
  }
  return out + "\"";
}

std::string LevelsJson() {
  std::string levels;
  for (const Level* level : Levels()) {
    const std::string missing = MissingFeatures(level->features);
    const std::string reason = missing.empty() ? "the CPU has all it needs"
                               : level == &kAmxLevel && !AmxRefusal().empty()
                                   ? AmxRefusal()
                                   : "the CPU or the operating system lacks " + missing;
    levels += std::string(levels.empty() ? "" : ", ") + "{\"name\": " + Quoted(level->name) +
              ", \"supported\": " + (missing.empty() ? "true" : "false") + ", \"reason\": " + Quoted(reason) + "}";
  }
  return "[" + levels + "]";
}

// Kernel by M, with runs of equal choices shortened to where they begin: {"1": "avx512_bf16", "2": "amx"}.
std::string KernelsJson(const Level& level, bool forced, WeightType type, Activations activations) {
  std::string json;
  const char* last = nullptr;
  for (size_t rows = 1; rows <= 512; ++rows) {
    const char* path = ChooseKernel(level, forced, type, activations, rows)->path;
    if (last != nullptr && std::string(last) == path) continue;
    json += (json.empty() ? "" : ", ") + Quoted(std::to_string(rows)) + ": " + Quoted(path);
    last = path;
  }
  return "{" + json + "}";
}

}  // namespace

Activations DefaultActivations(WeightType type) {
  if (type == WeightType::kFp32) return Activations::kFp32;
  return type == WeightType::kBf16 ? Activations::kBf16 : Activations::kInt8;
}

bool GoesWith(WeightType type, Activations activations) {
  return activations == DefaultActivations(type) || (type == WeightType::kBf16 && activations == Activations::kFp32);
}

const Kernel* FindKernel(const Level& level, WeightType type, Activations activations) {
  const auto& levels = Levels();
  size_t i = levels.size();
  while (i > 0 && levels[i - 1] != &level) --i;
  for (; i > 0; --i) {
    const Kernel& kernel = levels[i - 1]->kernels[static_cast<int>(type)][static_cast<int>(activations)];
    if (kernel.path != nullptr) return &kernel;
  }
  return nullptr;
}

const Kernel* ChooseKernel(const Level& level, bool forced, WeightType type, Activations activations, size_t rows) {
  static const Vendor vendor = CpuVendor();
  for (const Rule& r : kRules) {
    if (r.best != &level || r.type != type || r.activations != activations) continue;
    if (forced && r.level != &level) continue;
    // Only Intel's CPUs have AMX; where tests emulate it on another's, they shall see what runs on those.
    if (r.vendor != (r.best == &kAmxLevel ? Vendor::kIntel : vendor)) continue;
    if (rows >= r.first_rows && rows <= r.last_rows) return FindKernel(*r.level, type, r.kernel_activations);
  }
  return FindKernel(level, type, activations);
}

const AttentionKernel& ChooseAttention(const Level& level) {
  const AttentionKernel* kernel = nullptr;
  for (const Level* candidate : Levels()) {
    if (candidate->attention != nullptr) kernel = candidate->attention;
    if (candidate == &level) break;
  }
  return *kernel;  // the lowest level has one
}

const PackedAttentionKernel& ChoosePackedAttention(const Level& level) {
  const PackedAttentionKernel* kernel = nullptr;
  for (const Level* candidate : Levels()) {
    if (candidate->packed_attention != nullptr) kernel = candidate->packed_attention;
    if (candidate == &level) break;
  }
  return *kernel;  // the lowest level has one
}

std::string CpuInfoJson() {
  std::string features;
  for (const std::string& name : FeatureNames()) features += (features.empty() ? "" : ", ") + Quoted(name);
  const Level* level = nullptr;
  bool forced = false;
  const Status status = ChooseLevel(nullptr, &level, &forced);
  std::string json =
      "{\"cpu\": " + Quoted(CpuName()) + ", \"features\": [" + features + "], \"levels\": " + LevelsJson();
  const char* name = ForcedLevel();
  json += ", \"forced\": " + (name ? Quoted(name) : "null") +
          ", \"level\": " + (status.ok() ? Quoted(level->name) : "null");
  json += ", \"reason\": " + Quoted(!status.ok() ? status.message
                                    : forced     ? "SPARAMX_ISA asks for it"
                                                 : "the highest level that this CPU runs");
  json += ", \"kernels\": {";
  constexpr const char* kTypeNames[kWeightTypes] = {"fp32", "bf16", "int8", "int4"};
  for (int t = 0; status.ok() && t < kWeightTypes; ++t) {
    const auto type = static_cast<WeightType>(t);
    json +=
        (t ? ", " : "") + Quoted(kTypeNames[t]) + ": " + KernelsJson(*level, forced, type, DefaultActivations(type));
  }
  json += "}, \"attention\": " + (status.ok() ? Quoted(ChooseAttention(*level).path) : "null");
  json += ", \"packed_attention\": " + (status.ok() ? Quoted(ChoosePackedAttention(*level).path) : "null");
  return json + "}";
}

}  // namespace sparamx
