// AMX's tile registers: their configuration for a scope.
//
// GCC 12's tile intrinsics do not tell the compiler that they touch memory, hence the barriers.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "format/layout.h"
#include "kernels/lanes.h"

namespace sparamx {
namespace {

constexpr size_t kTileBytes = kTileRows * kTileRowBytes;

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

SPARAMX_INLINE void Barrier() {
  __asm__ volatile("" ::: "memory");
}

// Loads the configuration for a scope: ONNX Runtime's own kernels share the thread, so nothing may stay behind.
class TileScope {
 public:
  // Row tiles of X and of the sums have `first` and `second` rows; a tile of 0 rows is not configured. A step along K
  // is `x_bytes` of a row of X, a row of weights for every 4 of them.
  TileScope(size_t first, size_t second, size_t x_bytes = 64) {
    TileConfig config = {};
    config.palette = 1;
    const size_t rows[8] = {first, first, second, second, first, second, x_bytes / 4, x_bytes / 4};
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = static_cast<uint8_t>(rows[t]);
      const bool of_x = t == 4 || t == 5;
      config.column_bytes[t] = static_cast<uint16_t>(rows[t] == 0 ? 0 : of_x ? x_bytes : 64);
    }
    Barrier();
    _tile_loadconfig(&config);
    Barrier();
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace
}  // namespace sparamx
