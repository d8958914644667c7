// The packer. Passes over the source: what int8 scales are multiples of, scales (int8, int4), then the count of values
// of every run, from which the offsets and the size follow, then masks and values, every run on its own, so that
// threads need no order.
#include <algorithm>
#include <cstring>
#include <vector>

#include "format/number.h"
#include "format/packed_format.h"
#include "format/quantize.h"
#include "format/stage.h"

namespace sparamx {
namespace {

using internal::ForEachRun;
using internal::Header;
using internal::Section;
using internal::SectionSizes;
using internal::Stage;

// How a weight type codes an fp32 weight, in terms that a compiler turns into vector code. kZero is the code of 0,
// which the sparse form never stores.
struct Fp32Coder {
  using Code = uint32_t;
  static constexpr WeightType kType = WeightType::kFp32;
  static constexpr Code kZero = 0;
  static Code Encode(float w, float) {
    const uint32_t b = BitsOf(w);
    return (b & 0x7fffffffu) == 0 ? 0 : b;  // -0 is a zero
  }
};
struct Bf16Coder {
  using Code = uint16_t;
  static constexpr WeightType kType = WeightType::kBf16;
  static constexpr Code kZero = 0;
  static Code Encode(float w, float) { return Bf16FromFloat(w); }
};
template <WeightType type>
struct QuantizedCoder {
  using Code = uint8_t;  // of 4 bits, too, until it is written
  static constexpr WeightType kType = type;
  static constexpr Code kZero = CodeBias(kType);
  static Code Encode(float w, float scale) {
    return static_cast<Code>(static_cast<int>(internal::Quantize<type>(w, scale)) + CodeBias(kType));
  }
};

// What the passes before the writing learn.
struct Census {
  PackedView geometry;
  internal::Scales scales;
  std::vector<uint64_t> offsets;  // strips * runs + 1
  std::vector<int32_t> sums;      // int8: [strips][16]
  uint64_t nnz = 0;
  Form form;
  SectionSizes sizes;
};

// One run of one strip in codes, [k][column].
template <typename Coder>
struct Codes {
  typename Coder::Code code[kRunK][kStripColumns];

  Codes(const Census& census, size_t strip, size_t run, const Stage& stage, size_t column, size_t rows) {
    const PackedView& g = census.geometry;
    const float* scales = g.groups == 0 ? nullptr : &census.scales.of_groups[strip * g.groups * kStripColumns];
    static constexpr float kNone[kStripColumns] = {};
    for (size_t k = 0; k < rows; ++k) {
      // Padded rows lie beyond the last group: they are zeros in any.
      const size_t group = g.group_size == 0 ? 0 : std::min(g.groups - 1, (run * kRunK + k) / g.group_size);
      const float* scale = scales == nullptr ? kNone : scales + group * kStripColumns;
      for (size_t n = 0; n < kStripColumns; ++n) code[k][n] = Coder::Encode(stage.w[k][column + n], scale[n]);
    }
  }
};

struct RunCount {
  uint64_t nnz = 0, stored = 0;
};

template <typename Coder>
RunCount CountRun(const Codes<Coder>& codes, size_t tiles) {
  constexpr size_t kHalf = TileK(Coder::kType) / 2;
  RunCount count;
  for (size_t tile = 0; tile < tiles; ++tile) {
    uint32_t halves[2] = {0, 0};
    for (size_t half = 0; half < 2; ++half)
      for (size_t k = 0; k < kHalf; ++k)
        for (size_t n = 0; n < kStripColumns; ++n)
          halves[half] += codes.code[(2 * tile + half) * kHalf + k][n] != Coder::kZero;
    count.nnz += halves[0] + halves[1];
    count.stored += StoredInTile(Coder::kType, halves[0], halves[1]);
  }
  return count;
}

// Adds what the codes of every column mean to sums[16].
template <typename Coder>
void AddColumns(const Codes<Coder>& codes, size_t rows, int32_t* sums) {
  for (size_t k = 0; k < rows; ++k)
    for (size_t n = 0; n < kStripColumns; ++n)
      sums[n] += static_cast<int32_t>(codes.code[k][n]) - CodeBias(Coder::kType);
}

// Half of a tile in the order in which codes are stored. Compressing writes a code past the kept ones.
template <typename Coder>
struct HalfTile {
  typename Coder::Code code[TileWeights(Coder::kType) / 2 + 1];
  size_t count = 0;
};

// Keeps the codes of half a tile, whose first weight along K is `k`; with `masks`, only those that are not zero.
template <typename Coder>
void Gather(const Codes<Coder>& codes, size_t k, uint8_t* masks, HalfTile<Coder>* half) {
  constexpr size_t kGroup = TileGroup(Coder::kType);
  constexpr size_t kRowMaskBytes = kStripColumns * kGroup / 8;
  half->count = 0;
  for (size_t row = 0; row < kTileRows / 2; ++row) {
    uint64_t mask = 0;
    for (size_t c = 0; c < kStripColumns; ++c) {
      for (size_t p = 0; p < kGroup; ++p) {
        const typename Coder::Code code = codes.code[k + row * kGroup + p][c];
        const bool kept = masks == nullptr || code != Coder::kZero;
        half->code[half->count] = code;
        half->count += kept;
        mask |= static_cast<uint64_t>(kept) << (c * kGroup + p);
      }
    }
    if (masks != nullptr) std::memcpy(masks + row * kRowMaskBytes, &mask, kRowMaskBytes);
  }
}

// Writes a tile's codes, at most `room` of them, and returns how many it takes up.
template <typename Coder>
uint64_t StoreTile(const HalfTile<Coder>& upper, const HalfTile<Coder>& lower, uint64_t room, uint8_t* out) {
  const uint64_t stored = std::min(room, StoredInTile(Coder::kType, upper.count, lower.count));
  if constexpr (Coder::kType == WeightType::kInt4) {
    for (size_t i = 0; i < stored / 2; ++i)
      out[i] = static_cast<uint8_t>((i < upper.count ? upper.code[i] : 0) | (i < lower.count ? lower.code[i] : 0) << 4);
  } else {
    const auto first = static_cast<size_t>(std::min<uint64_t>(stored, upper.count));
    std::memcpy(out, upper.code, first * sizeof upper.code[0]);
    std::memcpy(out + first * sizeof upper.code[0], lower.code,
                (static_cast<size_t>(stored) - first) * sizeof upper.code[0]);
  }
  return stored;
}

// `masks` is null for the dense form. If the source changed since it was counted, the values stay inside their `room`:
// the checker will see it.
template <typename Coder>
void WriteRun(const Codes<Coder>& codes, size_t tiles, uint8_t* masks, uint8_t* values, uint64_t room) {
  constexpr size_t kHalfMaskBytes = MaskBytesPerTile(Coder::kType) / 2;
  HalfTile<Coder> halves[2];
  uint64_t stored = 0;
  for (size_t tile = 0; tile < tiles; ++tile) {
    for (size_t half = 0; half < 2; ++half) {
      const size_t index = 2 * tile + half;
      Gather(codes, index * TileK(Coder::kType) / 2, masks == nullptr ? nullptr : masks + index * kHalfMaskBytes,
             &halves[half]);
    }
    stored += StoreTile(halves[0], halves[1], room - stored, values + ValueBytes(Coder::kType, stored));
  }
}

Status CheckArguments(const SourceMatrix& m, PackOptions* o) {
  if (m.k > kMaxDimension || m.n > kMaxDimension) return Status::Invalid("K and N must be below 2^31");
  if (m.data == nullptr && m.k * m.n != 0) return Status::Invalid("the matrix has no data");
  if (m.type > SourceType::kBf16) return Status::Invalid("the source must be fp32, fp16 or bf16");
  if (o->form > Form::kDense) return Status::Invalid("the form must be auto, sparse or dense");
  if (o->type == WeightType::kInt8) {
    if (o->scale_type == ScaleType::kNone) o->scale_type = ScaleType::kFp32;
    if (o->scale_type != ScaleType::kFp32) return Status::Invalid("int8 weights take fp32 scales");
    if (o->group_size != 0) return Status::Invalid("int8 weights take no groups");
  } else if (o->type == WeightType::kInt4) {
    if (o->scale_type == ScaleType::kNone) o->scale_type = o->scales == nullptr ? ScaleType::kInt8 : ScaleType::kFp16;
    if (o->scale_type == ScaleType::kInt8 && o->scales != nullptr)
      return Status::Invalid("given scales are stored as fp16 or fp32, not as int8");
    if (o->group_size == 0) o->group_size = 32;
    if (!internal::IsGroupSize(o->group_size)) return Status::Invalid("the group size must be 16, 32, 64, 128 or 256");
  } else if (o->scale_type != ScaleType::kNone || o->group_size != 0 || o->scales != nullptr) {
    return Status::Invalid("fp32 and bf16 weights take neither scales nor groups");
  }
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
Status Count(const SourceMatrix& m, const PackOptions& o, Census* census) {
  PackedView& g = census->geometry;
  g = {};
  g.type = o.type;
  g.scale_type = o.scale_type;
  g.group_size = o.group_size;
  g.k = m.k;
  g.n = m.n;
  internal::SetGeometry(&g);
  const Status status = internal::ComputeScales(m, g, o.scales, o.threads, &census->scales);
  if (!status.ok()) return status;
  std::vector<uint64_t> nnz(g.strips * g.runs);
  std::vector<int32_t> sums(Coder::kType == WeightType::kInt8 ? nnz.size() * kStripColumns : 0);
  census->offsets.assign(nnz.size() + 1, 0);
  ForEachRun(m, g, o.threads, [&](size_t strip, size_t run, const Stage& stage, size_t column) {
    const size_t tiles = TilesInRun(g, run);
    const Codes<Coder> codes(*census, strip, run, stage, column, tiles * TileK(g.type));
    const RunCount count = CountRun<Coder>(codes, tiles);
    if (!sums.empty()) AddColumns(codes, tiles * TileK(g.type), &sums[(strip * g.runs + run) * kStripColumns]);
    nnz[strip * g.runs + run] = count.nnz;
    census->offsets[strip * g.runs + run + 1] = count.stored;
  });
  census->nnz = 0;
  for (size_t i = 0; i < nnz.size(); ++i) {
    census->nnz += nnz[i];
    census->offsets[i + 1] += census->offsets[i];
  }
  census->sums.assign(Coder::kType == WeightType::kInt8 ? g.strips * kStripColumns : 0, 0);
  for (size_t i = 0; i < sums.size(); ++i)
    census->sums[i / (g.runs * kStripColumns) * kStripColumns + i % kStripColumns] += sums[i];
  const SectionSizes sparse =
      internal::SizesOf(o.type, Form::kSparse, o.scale_type, o.group_size, m.k, m.n, census->offsets.back());
  const SectionSizes dense = internal::SizesOf(o.type, Form::kDense, o.scale_type, o.group_size, m.k, m.n, 0);
  census->form = o.form;
  if (o.form == Form::kAuto) census->form = BlobBytes(sparse) < BlobBytes(dense) ? Form::kSparse : Form::kDense;
  census->sizes = census->form == Form::kSparse ? sparse : dense;
  return {};
}

void WriteScales(const Census& census, uint8_t* out) {
  const std::vector<float>& scales = census.scales.of_groups;
  switch (census.geometry.scale_type) {
    case ScaleType::kInt8:
      for (size_t i = 0; i < scales.size(); ++i) {
        const size_t strip = i / (census.geometry.groups * kStripColumns);
        const float column = census.scales.of_columns[strip * kStripColumns + i % kStripColumns];
        out[i] = static_cast<uint8_t>(static_cast<int>(internal::ScaleNumber(scales[i], column)));
      }
      return;
    case ScaleType::kFp16:
      for (size_t i = 0; i < scales.size(); ++i) {
        const uint16_t half = Fp16FromFloat(scales[i]);
        std::memcpy(out + 2 * i, &half, sizeof half);
      }
      return;
    default:
      std::memcpy(out, scales.data(), scales.size() * sizeof(float));
  }
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
  header.nnz = census.nnz;
  header.weight_type = static_cast<uint8_t>(o.type);
  header.code_bits = static_cast<uint8_t>(CodeBits(o.type));
  header.scale_type = static_cast<uint8_t>(o.scale_type);
  header.group_size = o.group_size;
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
  if (!census.scales.of_groups.empty()) WriteScales(census, at[internal::kScales]);
  if (!census.scales.of_columns.empty())
    std::memcpy(at[internal::kColumnScales], census.scales.of_columns.data(),
                census.scales.of_columns.size() * sizeof(float));
  if (!census.sums.empty()) std::memcpy(at[internal::kSums], census.sums.data(), census.sums.size() * sizeof(int32_t));
  ForEachRun(m, g, o.threads, [&](size_t strip, size_t run, const Stage& stage, size_t column) {
    const size_t tile = strip * g.tiles + run * TilesPerRun(g.type), tiles = TilesInRun(g, run);
    const Codes<Coder> codes(census, strip, run, stage, column, tiles * TileK(g.type));
    if (census.form == Form::kDense)
      return WriteRun<Coder>(codes, tiles, nullptr,
                             at[internal::kValues] + ValueBytes(g.type, tile * TileWeights(g.type)),
                             tiles * TileWeights(g.type));
    const uint64_t* offset = &census.offsets[strip * g.runs + run];
    WriteRun<Coder>(codes, tiles, at[internal::kBitmap] + tile * MaskBytesPerTile(g.type),
                    at[internal::kValues] + ValueBytes(g.type, offset[0]), offset[1] - offset[0]);
  });
  return {};
}

// Calls body with the coder of a weight type.
template <typename Body>
Status WithCoder(WeightType type, const Body& body) {
  switch (type) {
    case WeightType::kFp32:
      return body(Fp32Coder());
    case WeightType::kBf16:
      return body(Bf16Coder());
    case WeightType::kInt8:
      return body(QuantizedCoder<WeightType::kInt8>());
    case WeightType::kInt4:
      return body(QuantizedCoder<WeightType::kInt4>());
  }
  return Status::Invalid("unknown weight type");
}

}  // namespace

Status PackedSize(const SourceMatrix& source, const PackOptions& options, uint64_t* size) {
  PackOptions o = options;
  const Status status = CheckArguments(source, &o);
  if (!status.ok()) return status;
  return WithCoder(o.type, [&](auto coder) {
    Census census;
    const Status counted = Count<decltype(coder)>(source, o, &census);
    if (counted.ok()) *size = BlobBytes(census.sizes);
    return counted;
  });
}

Status Pack(const SourceMatrix& source, const PackOptions& options, uint8_t* blob, uint64_t blob_size) {
  PackOptions o = options;
  const Status status = CheckArguments(source, &o);
  if (!status.ok()) return status;
  return WithCoder(o.type, [&](auto coder) {
    Census census;
    const Status counted = Count<decltype(coder)>(source, o, &census);
    return counted.ok() ? Write<decltype(coder)>(source, o, census, blob, blob_size) : counted;
  });
}

}  // namespace sparamx
