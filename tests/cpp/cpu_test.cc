// Detection of the CPU and the choice of an instruction-set level, compared with what the operating system says.
#include "runtime/cpu.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <set>
#include <sstream>
#include <string>

#include "runtime/choice.h"

namespace sparamx {
namespace {

class Cpu : public testing::Test {
 protected:
  void SetUp() override { unsetenv("SPARAMX_ISA"); }
  void TearDown() override { unsetenv("SPARAMX_ISA"); }
};

// The flags that Linux lists. It leaves out those whose registers it does not save.
std::set<std::string> LinuxFlags() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    return flags;
  }
  return {};
}

TEST_F(Cpu, FeaturesAgreeWithLinux) {
  const std::set<std::string> flags = LinuxFlags();
  ASSERT_FALSE(flags.empty());
  const auto has = [&](std::initializer_list<const char*> names) {
    for (const char* name : names)
      if (flags.count(name) == 0) return false;
    return true;
  };
  uint64_t expected = 0;
  if (has({"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt"})) expected |= kAvx2;
  if (has({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) expected |= kAvx512;
  if (has({"avx512vbmi", "avx512_vbmi2"})) expected |= kAvx512Vbmi2;
  if (has({"avx512f", "gfni"})) expected |= kGfni;
  if (has({"avx512_vnni"})) expected |= kAvx512Vnni;
  if (has({"avx512_bf16"})) expected |= kAvx512Bf16;
  if (has({"amx_tile"})) expected |= kAmxTile;
  if (has({"amx_bf16"})) expected |= kAmxBf16;
  if (has({"amx_int8"})) expected |= kAmxInt8;
  EXPECT_EQ(CpuFeatures(), expected);
}

TEST_F(Cpu, LevelsBuildOnEachOther) {
  ASSERT_FALSE(Levels().empty());
  EXPECT_STREQ(Levels().front()->name, "scalar");
  EXPECT_EQ(Levels().front()->features, 0u);
  std::set<std::string> names;
  uint64_t lower = 0;
  for (const Level* level : Levels()) {
    EXPECT_TRUE(names.insert(level->name).second) << level->name;
    EXPECT_EQ(level->features & lower, lower) << level->name;
    lower = level->features;
  }
}

TEST_F(Cpu, TheHighestSupportedLevelIsChosen) {
  const Level* best = nullptr;
  for (const Level* level : Levels())
    if ((level->features & ~CpuFeatures()) == 0) best = level;
  const Level* chosen = nullptr;
  ASSERT_TRUE(ChooseLevel(nullptr, &chosen).ok());
  EXPECT_EQ(chosen, best);
  ASSERT_TRUE(ChooseLevel("auto", &chosen).ok());
  EXPECT_EQ(chosen, best);
}

// Somebody who knows the CPU, or has taken features from an emulated one, says which level must be the best.
TEST_F(Cpu, TheBestLevelIsTheExpectedOne) {
  const Level* chosen = nullptr;
  ASSERT_TRUE(ChooseLevel(nullptr, &chosen).ok());
  std::string supported;
  for (const Level* level : Levels())
    if (MissingFeatures(level->features).empty()) supported += std::string(" ") + level->name;
  std::cout << "levels that run here:" << supported << "\n";
  const char* expected = std::getenv("SPARAMX_TEST_BEST_LEVEL");
  EXPECT_STREQ(chosen->name, expected == nullptr ? supported.substr(supported.rfind(' ') + 1).c_str() : expected);
}

TEST_F(Cpu, ALevelCanBeForcedOrIsRefusedByName) {
  for (const Level* level : Levels()) {
    const bool supported = MissingFeatures(level->features).empty();
    for (const bool by_environment : {false, true}) {
      if (by_environment) setenv("SPARAMX_ISA", level->name, 1);
      const Level* chosen = nullptr;
      const Status status = ChooseLevel(by_environment ? nullptr : level->name, &chosen);
      EXPECT_EQ(status.ok(), supported) << level->name;
      if (supported) {
        EXPECT_EQ(chosen, level);
      } else {
        EXPECT_EQ(status.code, StatusCode::kUnsupported);
        EXPECT_NE(status.message.find(level->name), std::string::npos) << status.message;
        EXPECT_NE(status.message.find(MissingFeatures(level->features)), std::string::npos) << status.message;
      }
    }
    unsetenv("SPARAMX_ISA");
  }
}

TEST_F(Cpu, AnUnknownLevelIsAnErrorThatNamesIt) {
  setenv("SPARAMX_ISA", "sse9", 1);
  const Level* chosen = nullptr;
  const Status status = ChooseLevel(nullptr, &chosen);
  EXPECT_EQ(status.code, StatusCode::kUnsupported);
  EXPECT_NE(status.message.find("SPARAMX_ISA=sse9"), std::string::npos) << status.message;
  EXPECT_EQ(chosen, nullptr);
  EXPECT_NE(CpuInfoJson().find("SPARAMX_ISA=sse9"), std::string::npos);
}

TEST_F(Cpu, AVariableThatIsNoTextLeavesTheDocumentOne) {
  setenv("SPARAMX_ISA",
         "\xff\x80\x01\x7f"
         "a\"b",
         1);
  const std::string json = CpuInfoJson();
  EXPECT_NE(json.find("\"forced\": \"a\\\"b\""), std::string::npos) << json;
  for (const char c : json) ASSERT_TRUE(c >= 0x20 && c < 0x7f) << json;
}

TEST_F(Cpu, AnArgumentBeatsTheEnvironment) {
  setenv("SPARAMX_ISA", "sse9", 1);
  const Level* chosen = nullptr;
  ASSERT_TRUE(ChooseLevel("scalar", &chosen).ok());
  EXPECT_STREQ(chosen->name, "scalar");
}

TEST_F(Cpu, AnEmptyVariableIsAsGoodAsNone) {
  setenv("SPARAMX_ISA", "", 1);
  const Level* chosen = nullptr;
  ASSERT_TRUE(ChooseLevel(nullptr, &chosen).ok());
  EXPECT_NE(chosen, nullptr);
}

TEST_F(Cpu, EveryLevelHasAKernelOfItsOwnOrOfALowerOne) {
  for (const Level* level : Levels()) {
    for (const WeightType type : {WeightType::kFp32, WeightType::kBf16}) {
      const Activations activations = type == WeightType::kFp32 ? Activations::kFp32 : Activations::kBf16;
      const Kernel* kernel = FindKernel(*level, type, activations);
      ASSERT_NE(kernel, nullptr) << level->name;
      const Kernel& own = level->kernels[static_cast<int>(type)][static_cast<int>(activations)];
      if (own.path != nullptr) {
        EXPECT_EQ(kernel, &own);
      }
    }
  }
}

}  // namespace
}  // namespace sparamx
