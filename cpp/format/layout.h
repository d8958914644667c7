// The packed format's constants and the view that kernels work on. Plain data only: kernel files, each compiled for its
// own instruction set, include this header, so its functions are static: the linker must never share a copy between
// those files. The format itself is described in docs/format.md.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sparamx {

enum class WeightType : uint8_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };
enum class ScaleType : uint8_t { kNone = 0, kFp16 = 1, kFp32 = 2, kInt8 = 3 };
enum class Form : uint8_t { kAuto = 0, kSparse = 1, kDense = 2 };
constexpr int kWeightTypes = 4;

constexpr size_t kTileRows = 16;      // rows of a tile: AMX's limit
constexpr size_t kTileRowBytes = 64;  // one row is one 512-bit register
constexpr size_t kStripColumns = 16;  // outputs per strip: 64 bytes of 32-bit sums
constexpr size_t kRunK = 512;         // weights along K that share one entry of the offsets section
constexpr size_t kOverread = 64;      // bytes after the last value that a kernel may load
constexpr size_t kSectionAlignment = 64;

static constexpr size_t CeilDiv(size_t a, size_t b) {
  return (a + b - 1) / b;
}
static constexpr size_t RoundUp(size_t a, size_t b) {
  return CeilDiv(a, b) * b;
}

static constexpr size_t CodeBits(WeightType type) {
  return type == WeightType::kFp32 ? 32 : type == WeightType::kBf16 ? 16 : type == WeightType::kInt8 ? 8 : 4;
}
// Weights of one output that lie side by side in a tile row.
static constexpr size_t TileGroup(WeightType type) {
  return type == WeightType::kFp32 ? 1 : type == WeightType::kBf16 ? 2 : 4;
}
static constexpr size_t TileK(WeightType type) {
  return kTileRows * TileGroup(type);
}
static constexpr size_t TileWeights(WeightType type) {
  return TileK(type) * kStripColumns;
}
static constexpr size_t MaskBytesPerTile(WeightType type) {
  return TileWeights(type) / 8;
}
static constexpr size_t TilesPerRun(WeightType type) {
  return kRunK / TileK(type);
}
static constexpr size_t ScaleBytes(ScaleType type) {
  return type == ScaleType::kInt8 ? 1 : type == ScaleType::kFp16 ? 2 : 4;
}
// What a stored code is above the number that it means: 8-bit and 4-bit codes are stored unsigned.
static constexpr int CodeBias(WeightType type) {
  return type == WeightType::kInt8 ? 128 : type == WeightType::kInt4 ? 8 : 0;
}
// Codes that a sparse tile takes up whose upper and lower eight rows hold these many values. Two 4-bit codes share a
// byte: one of the upper rows (low nibble) and one of the lower rows (high nibble), so the fuller half counts twice.
static constexpr uint64_t StoredInTile(WeightType type, uint64_t upper, uint64_t lower) {
  return type == WeightType::kInt4 ? 2 * (upper > lower ? upper : lower) : upper + lower;
}
// Bytes of `count` packed values.
static constexpr uint64_t ValueBytes(WeightType type, uint64_t count) {
  return (count * CodeBits(type) + 7) / 8;
}

// A checked blob, ready for the kernels: every pointer stays inside it for every run. Pointers may be unaligned.
struct PackedView {
  WeightType type;
  Form form;
  ScaleType scale_type;
  uint32_t group_size;
  uint64_t k, n, nnz;
  size_t strips;           // along N
  size_t tiles;            // along K, per strip
  size_t runs;             // along K, per strip
  size_t groups;           // of scales along K: 1 for int8, 0 without scales
  const uint8_t* offsets;  // sparse: uint64 per run
  const uint8_t* bitmap;   // sparse
  const uint8_t* values;
  const uint8_t* scales;         // [strips][groups][16]
  const uint8_t* column_scales;  // int8 scales: float [strips][16], what they are multiples of; else null
  const uint8_t* sums;           // int8: int32 [strips][16], the sum of what the codes of an output mean; else null
};

// Tiles of one strip in run `run`: the last one may have fewer.
static inline size_t TilesInRun(const PackedView& w, size_t run) {
  const size_t most = TilesPerRun(w.type), left = w.tiles - run * most;
  return left < most ? left : most;
}

static inline uint64_t LoadU64(const uint8_t* p) {
  uint64_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Values stored before run `run` of strip `strip` (runs may equal the strip's count: the next strip's start).
static inline uint64_t ValuesBefore(const PackedView& w, size_t strip, size_t run) {
  return LoadU64(w.offsets + 8 * (strip * w.runs + run));
}

}  // namespace sparamx
