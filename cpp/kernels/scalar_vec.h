// The vector of the scalar level: 16 numbers.
#pragma once

#include <stddef.h>

namespace sparamx {
namespace {

struct ScalarLanes {
  struct Vec {
    float v[16];
  };

  static Vec Zero() { return {}; }
  static Vec Load(const float* p, size_t columns) {
    Vec out = {};
    for (size_t i = 0; i < columns; ++i) out.v[i] = p[i];
    return out;
  }
  static void Store(float* p, size_t columns, const Vec& v) {
    for (size_t i = 0; i < columns; ++i) p[i] = v.v[i];
  }
};

}  // namespace
}  // namespace sparamx
