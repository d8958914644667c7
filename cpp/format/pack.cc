// The packer. Two passes over the source: the first counts the values of every run, from which the offsets and the size
// follow; the second writes masks and values, every run on its own, so that threads need no order.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "format/for_each.h"
#include "format/number.h"
#include "format/packed_format.h"

namespace sparamx {
namespace {

using internal::Header;
using internal::Section;
using internal::SectionSizes;

// Strips staged together: 256 bytes of a row-major fp32 row at a time, so that a wide matrix is not read in single
// lines, each on a page of its own.
constexpr size_t kStagedStrips = 4;
constexpr size_t kStagedColumns = kStagedStrips * kStripColumns;

// One run of several strips as fp32, [k][column], zero beyond the matrix.
struct Stage {
  float w[kRunK][kStagedColumns];
};

template <typename Load>
void StageElements(const SourceMatrix& m, size_t k0, size_t n0, const Load& load, Stage* stage) {
  const size_t rows = std::min<size_t>(kRunK, m.k - k0);
  const size_t columns = std::min<size_t>(kStagedColumns, m.n - n0);
  if (rows < kRunK || columns < kStagedColumns) std::memset(stage, 0, sizeof *stage);
  const int64_t origin = static_cast<int64_t>(k0) * m.stride_k + static_cast<int64_t>(n0) * m.stride_n;
  if (m.stride_n == 1) {
    for (size_t k = 0; k < rows; ++k) {
      const int64_t row = origin + static_cast<int64_t>(k) * m.stride_k;
      for (size_t n = 0; n < columns; ++n) stage->w[k][n] = load(row + static_cast<int64_t>(n));
    }
    return;
  }
  constexpr size_t kBlock = 16;  // along K, so that a transposed source is read a cache line at a time
  for (size_t k = 0; k < rows; k += kBlock) {
    const size_t end = std::min(rows, k + kBlock);
    for (size_t n = 0; n < columns; ++n) {
      const int64_t column = origin + static_cast<int64_t>(n) * m.stride_n;
      for (size_t i = k; i < end; ++i) stage->w[i][n] = load(column + static_cast<int64_t>(i) * m.stride_k);
    }
  }
}

void LoadStage(const SourceMatrix& m, size_t run, size_t strip, Stage* stage) {
  const size_t k0 = run * kRunK, n0 = strip * kStripColumns;
  switch (m.type) {
    case SourceType::kFp32: {
      const auto* p = static_cast<const float*>(m.data);
      return StageElements(
          m, k0, n0, [p](int64_t i) { return p[i]; }, stage);
    }
    case SourceType::kFp16: {
      const auto* p = static_cast<const uint16_t*>(m.data);
      return StageElements(
          m, k0, n0, [p](int64_t i) { return FloatFromFp16(p[i]); }, stage);
    }
    case SourceType::kBf16: {
      const auto* p = static_cast<const uint16_t*>(m.data);
      return StageElements(
          m, k0, n0, [p](int64_t i) { return FloatFromBf16(p[i]); }, stage);
    }
  }
}

// How a weight type codes an fp32 weight, in terms that a compiler turns into vector code. A code of 0 is never stored
// in the sparse form.
struct Fp32Coder {
  using Code = uint32_t;
  static constexpr WeightType kType = WeightType::kFp32;
  static Code Encode(float w) {
    const uint32_t b = BitsOf(w);
    return (b & 0x7fffffffu) == 0 ? 0 : b;  // -0 is a zero
  }
};
struct Bf16Coder {
  using Code = uint16_t;
  static constexpr WeightType kType = WeightType::kBf16;
  static Code Encode(float w) { return Bf16FromFloat(w); }
};

// One run of one strip in codes, [k][column].
template <typename Coder>
struct Codes {
  typename Coder::Code code[kRunK][kStripColumns];

  Codes(const Stage& stage, size_t column, size_t rows) {
    for (size_t k = 0; k < rows; ++k)
      for (size_t n = 0; n < kStripColumns; ++n) code[k][n] = Coder::Encode(stage.w[k][column + n]);
  }
};

struct Job {
  const SourceMatrix& source;
  PackedView geometry;
  unsigned threads;
};

// Calls body(strip, run, stage, first column in the stage) for every run, with threads.
template <typename Body>
void ForEachRun(const Job& job, const Body& body) {
  const size_t groups = CeilDiv(job.geometry.strips, kStagedStrips);
  ForEach(groups, job.threads, [&](size_t group) {
    const std::unique_ptr<Stage> stage(new Stage);
    const size_t first = group * kStagedStrips;
    const size_t last = std::min(job.geometry.strips, first + kStagedStrips);
    for (size_t run = 0; run < job.geometry.runs; ++run) {
      LoadStage(job.source, run, first, stage.get());
      for (size_t strip = first; strip < last; ++strip) body(strip, run, *stage, (strip - first) * kStripColumns);
    }
  });
}

size_t TilesInRun(const PackedView& g, size_t run) {
  return std::min(TilesPerRun(g.type), g.tiles - run * TilesPerRun(g.type));
}

template <typename Coder>
uint64_t CountRun(const Stage& stage, size_t column, size_t tiles) {
  const size_t rows = tiles * TileK(Coder::kType);
  const Codes<Coder> codes(stage, column, rows);
  uint32_t count = 0;
  for (size_t k = 0; k < rows; ++k) {
    uint32_t row = 0;
    for (size_t n = 0; n < kStripColumns; ++n) row += codes.code[k][n] != 0;
    count += row;
  }
  return count;
}

template <typename Coder>
void WriteSparseRun(const Stage& stage, size_t column, size_t tiles, uint8_t* masks, uint8_t* values, uint64_t room) {
  using Code = typename Coder::Code;
  constexpr size_t kGroup = TileGroup(Coder::kType);
  constexpr size_t kRowWeights = kStripColumns * kGroup;
  const Codes<Coder> codes(stage, column, tiles * TileK(Coder::kType));
  // A row is compressed into this buffer without branches, writing one past the end: the blob itself has no room for
  // that.
  Code row_values[kRowWeights + 1];
  uint64_t written = 0;
  for (size_t row = 0; row < tiles * kTileRows; ++row) {
    uint64_t mask = 0;
    size_t count = 0;
    for (size_t c = 0; c < kStripColumns; ++c) {
      for (size_t p = 0; p < kGroup; ++p) {
        const Code code = codes.code[row * kGroup + p][c];
        const bool kept = code != 0;
        row_values[count] = code;
        count += kept;
        mask |= static_cast<uint64_t>(kept) << (c * kGroup + p);
      }
    }
    if (written + count > room)
      return;  // the source changed between the passes: stay inside this run's place, the checker will see it
    std::memcpy(values + written * sizeof(Code), row_values, count * sizeof(Code));
    written += count;
    std::memcpy(masks + row * kRowWeights / 8, &mask, kRowWeights / 8);
  }
}

template <typename Coder>
void WriteDenseRun(const Stage& stage, size_t column, size_t tiles, uint8_t* values) {
  using Code = typename Coder::Code;
  constexpr size_t kGroup = TileGroup(Coder::kType);
  Code row_values[kStripColumns * kGroup];
  for (size_t row = 0; row < tiles * kTileRows; ++row) {
    for (size_t c = 0; c < kStripColumns; ++c)
      for (size_t p = 0; p < kGroup; ++p)
        row_values[c * kGroup + p] = Coder::Encode(stage.w[row * kGroup + p][column + c]);
    std::memcpy(values + row * kTileRowBytes, row_values, sizeof row_values);
  }
}

// What pass one learns: the number of values before each run, and the form that follows.
struct Census {
  PackedView geometry;
  std::vector<uint64_t> offsets;  // strips * runs + 1
  Form form;
  SectionSizes sizes;
};

Status CheckArguments(const SourceMatrix& m, const PackOptions& o) {
  if (m.k > kMaxDimension || m.n > kMaxDimension) return Status::Invalid("K and N must be below 2^31");
  if (m.data == nullptr && m.k * m.n != 0) return Status::Invalid("the matrix has no data");
  if (o.type != WeightType::kFp32 && o.type != WeightType::kBf16)
    return Status::Invalid("the weight type must be fp32 or bf16");
  if (o.form > Form::kDense) return Status::Invalid("the form must be auto, sparse or dense");
  if (o.scale_type != ScaleType::kNone || o.group_size != 0)
    return Status::Invalid("fp32 and bf16 weights take neither scales nor groups");
  if (m.type > SourceType::kBf16) return Status::Invalid("the source must be fp32, fp16 or bf16");
  return {};
}

uint64_t Place(const SectionSizes& sizes, uint32_t* count, Section (&sections)[internal::kSectionKinds]) {
  *count = 0;
  for (uint32_t id = 1; id <= internal::kSectionKinds; ++id)
    if (sizes.bytes[id] != 0 || id == internal::kValues) ++*count;
  uint64_t end = sizeof(Header) + *count * sizeof(Section);
  uint32_t entry = 0;
  for (uint32_t id = 1; id <= internal::kSectionKinds; ++id) {
    if (sizes.bytes[id] == 0 && id != internal::kValues) continue;
    const uint64_t offset = RoundUp(end, kSectionAlignment);
    sections[entry++] = {id, 0, offset, sizes.bytes[id]};
    end = offset + sizes.bytes[id] + (id == internal::kValues ? kOverread : 0);
  }
  return RoundUp(end, kSectionAlignment);
}

uint64_t BlobBytes(const SectionSizes& sizes) {
  uint32_t count;
  Section sections[internal::kSectionKinds];
  return Place(sizes, &count, sections);
}

template <typename Coder>
Census Count(const SourceMatrix& m, const PackOptions& o) {
  Census census;
  census.geometry = {};
  census.geometry.type = o.type;
  census.geometry.k = m.k;
  census.geometry.n = m.n;
  internal::SetGeometry(&census.geometry);
  const size_t runs = census.geometry.runs;
  census.offsets.assign(census.geometry.strips * runs + 1, 0);
  ForEachRun({m, census.geometry, o.threads}, [&](size_t strip, size_t run, const Stage& stage, size_t column) {
    census.offsets[strip * runs + run + 1] = CountRun<Coder>(stage, column, TilesInRun(census.geometry, run));
  });
  for (size_t i = 1; i < census.offsets.size(); ++i) census.offsets[i] += census.offsets[i - 1];
  const SectionSizes sparse =
      internal::SizesOf(o.type, Form::kSparse, o.scale_type, o.group_size, m.k, m.n, census.offsets.back());
  const SectionSizes dense = internal::SizesOf(o.type, Form::kDense, o.scale_type, o.group_size, m.k, m.n, 0);
  census.form = o.form;
  if (o.form == Form::kAuto) census.form = BlobBytes(sparse) < BlobBytes(dense) ? Form::kSparse : Form::kDense;
  census.sizes = census.form == Form::kSparse ? sparse : dense;
  return census;
}

template <typename Coder>
Status Write(const SourceMatrix& m, const PackOptions& o, const Census& census, uint8_t* blob, uint64_t blob_size) {
  Header header = {};
  Section sections[internal::kSectionKinds];
  std::memcpy(header.magic, internal::kMagic, sizeof header.magic);
  header.version = kFormatVersion;
  header.header_bytes = sizeof header;
  header.k = m.k;
  header.n = m.n;
  header.nnz = census.offsets.back();
  header.weight_type = static_cast<uint8_t>(o.type);
  header.code_bits = static_cast<uint8_t>(CodeBits(o.type));
  header.form = static_cast<uint8_t>(census.form);
  header.run_k = kRunK;
  header.matrix_count = 1;
  header.blob_bytes = Place(census.sizes, &header.section_count, sections);
  if (header.blob_bytes != blob_size)
    return Status::Invalid("the blob needs " + std::to_string(header.blob_bytes) + " bytes, not " +
                           std::to_string(blob_size));

  uint8_t* at[internal::kSectionKinds + 1] = {};
  uint64_t end = sizeof header + header.section_count * sizeof(Section);
  std::memcpy(blob, &header, sizeof header);
  std::memcpy(blob + sizeof header, sections, header.section_count * sizeof(Section));
  for (uint32_t i = 0; i < header.section_count; ++i) {  // the gaps between sections
    std::memset(blob + end, 0, sections[i].offset - end);
    at[sections[i].id] = blob + sections[i].offset;
    end = sections[i].offset + sections[i].size;
  }
  std::memset(blob + end, 0, blob_size - end);

  const PackedView& g = census.geometry;
  if (census.form == Form::kSparse)
    std::memcpy(at[internal::kOffsets], census.offsets.data(), census.offsets.size() * 8);
  ForEachRun({m, g, o.threads}, [&](size_t strip, size_t run, const Stage& stage, size_t column) {
    const size_t tile = strip * g.tiles + run * TilesPerRun(g.type);
    if (census.form == Form::kDense) {
      WriteDenseRun<Coder>(stage, column, TilesInRun(g, run), at[internal::kValues] + tile * kTileRows * kTileRowBytes);
      return;
    }
    const uint64_t* offset = &census.offsets[strip * g.runs + run];
    WriteSparseRun<Coder>(stage, column, TilesInRun(g, run), at[internal::kBitmap] + tile * MaskBytesPerTile(g.type),
                          at[internal::kValues] + offset[0] * sizeof(typename Coder::Code), offset[1] - offset[0]);
  });
  return {};
}

template <typename Coder>
Status PackAs(const SourceMatrix& m, const PackOptions& o, uint8_t* blob, uint64_t blob_size) {
  return Write<Coder>(m, o, Count<Coder>(m, o), blob, blob_size);
}

}  // namespace

Status PackedSize(const SourceMatrix& source, const PackOptions& options, uint64_t* size) {
  const Status status = CheckArguments(source, options);
  if (!status.ok()) return status;
  const Census census =
      options.type == WeightType::kFp32 ? Count<Fp32Coder>(source, options) : Count<Bf16Coder>(source, options);
  *size = BlobBytes(census.sizes);
  return {};
}

Status Pack(const SourceMatrix& source, const PackOptions& options, uint8_t* blob, uint64_t blob_size) {
  const Status status = CheckArguments(source, options);
  if (!status.ok()) return status;
  return options.type == WeightType::kFp32 ? PackAs<Fp32Coder>(source, options, blob, blob_size)
                                           : PackAs<Bf16Coder>(source, options, blob, blob_size);
}

}  // namespace sparamx
