// Random damage to bytes that a reader must not trust, and how much of it a test does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace sparamx {

// SPARAMX_TEST_COUNT where it is set, for tests that are worth repeating; otherwise few where instructions are
// emulated.
inline size_t TestCount(size_t usual) {
  const char* count = std::getenv("SPARAMX_TEST_COUNT");
  if (count != nullptr) return std::strtoull(count, nullptr, 10);
  return std::getenv("SPARAMX_TEST_LEVEL") == nullptr ? usual : usual / 20;
}

// One to four changes, half of them in the first `structure` bytes: bits, bytes, numbers of 4 and 8 bytes that become
// others nearby or at an edge of their type, and ranges that are copied from elsewhere, zeroed or filled.
inline void Damage(std::vector<uint8_t>* bytes, size_t structure, std::mt19937* random) {
  const auto below = [&](size_t limit) { return static_cast<size_t>((*random)()) % std::max<size_t>(limit, 1); };
  for (size_t i = 0, changes = 1 + below(4); i < changes; ++i) {
    const size_t size = bytes->size();
    if (size < 16) return;
    const size_t range = below(2) == 0 ? std::min(size, structure) : size;
    const size_t at = below(range);
    const size_t width = below(2) == 0 ? 8 : 4;
    const size_t aligned = std::min(at, size - width) / width * width;
    const size_t length = std::min(size - at, 1 + below(below(4) == 0 ? 4096 : 64));
    uint64_t number = 0;
    std::memcpy(&number, bytes->data() + aligned, width);
    switch (below(8)) {
      case 0:
      case 1:
        (*bytes)[at] ^= static_cast<uint8_t>(1u << below(8));
        continue;
      case 2:
        (*bytes)[at] = static_cast<uint8_t>((*random)());
        continue;
      case 3:
        std::memmove(bytes->data() + at, bytes->data() + below(size - length), length);
        continue;
      case 4:
        std::memset(bytes->data() + at, below(2) == 0 ? 0 : 0xff, length);
        continue;
      case 5:
        number += below(2) == 0 ? 1 + below(64) : -1 - below(64);
        break;
      case 6:
        number = number << below(3) ^ uint64_t { 1 } << below(64);
        break;
      default:
        number = (below(2) == 0 ? uint64_t{1} << below(64) : 0) - below(3);
    }
    std::memcpy(bytes->data() + aligned, &number, width);
  }
}

}  // namespace sparamx
