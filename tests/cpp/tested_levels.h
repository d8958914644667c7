// The levels that a test goes through.
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#include "runtime/choice.h"
#include "runtime/cpu.h"

namespace sparamx {

// The levels of this CPU, or the one that SPARAMX_TEST_LEVEL names, if the CPU has it.
inline std::vector<const Level*> TestedLevels() {
  const char* only = std::getenv("SPARAMX_TEST_LEVEL");
  std::vector<const Level*> levels;
  for (const Level* level : Levels())
    if (MissingFeatures(level->features).empty() && (only == nullptr || std::strcmp(only, level->name) == 0))
      levels.push_back(level);
  return levels;
}

}  // namespace sparamx
