// Packing, checking and unpacking of weight blobs (docs/format.md). No instruction-set code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "format/layout.h"

namespace sparamx {

enum class StatusCode { kOk = 0, kInvalidArgument = 1, kDamaged = 2, kUnsupported = 3, kOutOfMemory = 4 };

struct Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  bool ok() const { return code == StatusCode::kOk; }
  static Status Invalid(std::string m) { return {StatusCode::kInvalidArgument, std::move(m)}; }
  static Status Damaged(std::string m) { return {StatusCode::kDamaged, std::move(m)}; }
  static Status Unsupported(std::string m) { return {StatusCode::kUnsupported, std::move(m)}; }
};

constexpr uint32_t kFormatVersion = 1;
constexpr uint64_t kMaxDimension = 0x7fffffff;

enum class SourceType : uint8_t { kFp32 = 0, kFp16 = 1, kBf16 = 2 };

// Element (k, n) stands at data[k * stride_k + n * stride_n]; strides count elements.
struct SourceMatrix {
  const void* data;
  uint64_t k, n;
  int64_t stride_k, stride_n;
  SourceType type;
};

// scale_type kNone takes the type's default (int8: fp32; int4: int8, or fp16 for given scales), group_size 0 as well
// (int4: 32). Without `scales` the packer chooses them; with them, weights that are whole multiples of theirs keep
// these multiples as codes.
struct PackOptions {
  WeightType type = WeightType::kBf16;
  Form form = Form::kAuto;
  ScaleType scale_type = ScaleType::kNone;
  uint32_t group_size = 0;
  unsigned threads = 0;           // 0: one per core
  const float* scales = nullptr;  // row-major [groups][N]: int8 one group, int4 ceil(K / group_size)
};

// The exact size of the blob that Pack writes for the same arguments.
Status PackedSize(const SourceMatrix& source, const PackOptions& options, uint64_t* size);
Status Pack(const SourceMatrix& source, const PackOptions& options, uint8_t* blob, uint64_t blob_size);

// Checks the whole blob (header, section table, offsets against bitmaps) and fills the view that points into it.
Status Parse(const uint8_t* blob, uint64_t blob_size, PackedView* view);

// Row-major [K, N].
void Unpack(const PackedView& view, float* dense, unsigned threads);

namespace internal {

struct Header {
  char magic[8];
  uint32_t version, header_bytes;
  uint64_t flags, k, n, blob_bytes, nnz;
  uint8_t weight_type, code_bits, scale_type, form, order, reserved0[3];
  uint32_t group_size, run_k, matrix_count, section_count;
  uint8_t reserved1[48];
};
static_assert(sizeof(Header) == 128, "docs/format.md promises 128 bytes");

struct Section {
  uint32_t id, reserved;
  uint64_t offset, size;
};
static_assert(sizeof(Section) == 24, "docs/format.md promises 24 bytes");

enum SectionId : uint32_t { kOffsets = 1, kBitmap, kValues, kScales, kDirectory, kSums, kColumnScales };
constexpr size_t kSectionKinds = 7;

constexpr char kMagic[8] = {'S', 'P', 'A', 'R', 'A', 'M', 'X', 'W'};

// The sizes of all sections of a matrix, which the packer writes and the checker demands. 0: the section is absent.
struct SectionSizes {
  uint64_t bytes[kSectionKinds + 1] = {};
};
// `values` counts stored values, in the sparse form.
SectionSizes SizesOf(WeightType type, Form form, ScaleType scale_type, uint32_t group_size, uint64_t k, uint64_t n,
                     uint64_t values);

// Weights along K that may share an int4 scale: a run holds a whole number of groups.
bool IsGroupSize(uint32_t size);

// Fills strips, tiles, runs and groups from type, scale type, group size, k and n.
void SetGeometry(PackedView* view);

}  // namespace internal
}  // namespace sparamx
