// The state of AMX and what its instructions do to it: Intel SDM volume 2, chapter 3.2 ("Intel AMX instruction
// reference"), palette 1. Where an instruction has a reason to fault, nothing is changed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace amx_emulator {

constexpr int kTiles = 8, kMaxRows = 16, kRowBytes = 64;

enum class Fault { kNone, kInvalidOpcode, kGeneralProtection };

// As LDTILECFG reads it and STTILECFG writes it.
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

enum class Product { kBf16, kSignedSigned, kSignedUnsigned, kUnsignedSigned, kUnsignedUnsigned };

struct State {
  Config config;
  alignas(64) uint8_t data[kTiles][kMaxRows][kRowBytes];

  Fault LoadConfig(const Config& from);
  void Release();
  Fault Zero(int tile);
  Fault Load(int tile, const uint8_t* base, int64_t stride);
  Fault Store(int tile, uint8_t* base, int64_t stride);
  Fault Multiply(Product product, int sum, int a, int b);

 private:
  bool IsUsable(int tile) const { return config.palette == 1 && tile < kTiles && config.rows[tile] != 0; }
};

}  // namespace amx_emulator
