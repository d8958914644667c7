// The checker: after Parse succeeds, no kernel can read outside the blob. It reads the header, the section table, the
// offsets and the bitmaps, never the values.
#include <cstdio>
#include <cstring>

#include "format/packed_format.h"

namespace sparamx {
namespace internal {

bool IsGroupSize(uint32_t size) {
  return size == 16 || size == 32 || size == 64 || size == 128 || size == 256;
}

void SetGeometry(PackedView* view) {
  view->strips = CeilDiv(view->n, kStripColumns);
  view->tiles = CeilDiv(view->k, TileK(view->type));
  view->runs = CeilDiv(view->tiles, TilesPerRun(view->type));
  view->groups = view->scale_type == ScaleType::kNone ? 0
                 : view->group_size == 0              ? 1
                                                      : CeilDiv(view->k, view->group_size);
}

SectionSizes SizesOf(WeightType type, Form form, ScaleType scale_type, uint32_t group_size, uint64_t k, uint64_t n,
                     uint64_t values) {
  PackedView v = {};
  v.type = type;
  v.scale_type = scale_type;
  v.group_size = group_size;
  v.k = k;
  v.n = n;
  SetGeometry(&v);
  SectionSizes sizes;
  if (form == Form::kSparse) {
    sizes.bytes[kOffsets] = 8 * (static_cast<uint64_t>(v.strips) * v.runs + 1);
    sizes.bytes[kBitmap] = static_cast<uint64_t>(v.strips) * v.tiles * MaskBytesPerTile(type);
    sizes.bytes[kValues] = ValueBytes(type, values);
  } else {
    sizes.bytes[kValues] = ValueBytes(type, static_cast<uint64_t>(v.strips) * v.tiles * TileWeights(type));
  }
  sizes.bytes[kScales] = static_cast<uint64_t>(v.strips) * v.groups * kStripColumns * ScaleBytes(scale_type);
  if (scale_type == ScaleType::kInt8)
    sizes.bytes[kColumnScales] = static_cast<uint64_t>(v.strips) * kStripColumns * sizeof(float);
  if (type == WeightType::kInt8) sizes.bytes[kSums] = static_cast<uint64_t>(v.strips) * kStripColumns * 4;
  return sizes;
}

namespace {

std::string Hex(uint64_t v) {
  char buffer[24];
  std::snprintf(buffer, sizeof buffer, "0x%llx", static_cast<unsigned long long>(v));
  return buffer;
}

bool ScalesFit(WeightType type, uint8_t scale_type, uint32_t group_size) {
  const bool fp16 = scale_type == static_cast<uint8_t>(ScaleType::kFp16);
  const bool fp32 = scale_type == static_cast<uint8_t>(ScaleType::kFp32);
  const bool int8 = scale_type == static_cast<uint8_t>(ScaleType::kInt8);
  switch (type) {
    case WeightType::kInt8:
      return fp32 && group_size == 0;
    case WeightType::kInt4:
      return (fp16 || fp32 || int8) && IsGroupSize(group_size);
    default:
      return scale_type == 0 && group_size == 0;
  }
}

Status CheckHeader(const Header& h, uint64_t blob_size) {
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) return Status::Damaged("it does not begin with SPARAMXW");
  if (h.version == 0) return Status::Damaged("its format version is 0");
  if (h.version > kFormatVersion)
    return Status::Unsupported("its format version " + std::to_string(h.version) +
                               " is newer than the newest that this library reads (" + std::to_string(kFormatVersion) +
                               "): update sparamx-onnx");
  if (h.flags != 0)
    return Status::Unsupported("it sets flags that this library does not know (" + Hex(h.flags) +
                               "): update sparamx-onnx");
  if (h.header_bytes != sizeof(Header)) return Status::Damaged("its header size is not 128");
  if (h.blob_bytes != blob_size)
    return Status::Damaged("it says it has " + std::to_string(h.blob_bytes) + " bytes, but there are " +
                           std::to_string(blob_size));
  if (h.k > kMaxDimension || h.n > kMaxDimension) return Status::Damaged("its K or N is larger than 2^31 - 1");
  if (h.weight_type >= kWeightTypes)
    return Status::Unsupported("its weight type " + std::to_string(h.weight_type) + " is unknown to this library");
  const auto type = static_cast<WeightType>(h.weight_type);
  if (h.code_bits != CodeBits(type)) return Status::Damaged("its code bits do not fit its weight type");
  if (!ScalesFit(type, h.scale_type, h.group_size))
    return Status::Damaged("its scale type or group size does not fit its weight type");
  if (h.form != static_cast<uint8_t>(Form::kSparse) && h.form != static_cast<uint8_t>(Form::kDense))
    return Status::Damaged("its form is neither sparse nor dense");
  if (h.order != 0) return Status::Unsupported("its order of weights is unknown to this library");
  if (h.run_k != kRunK) return Status::Unsupported("its run length is unknown to this library");
  if (h.matrix_count != 1) return Status::Unsupported("it holds several matrices, which this library cannot read");
  uint8_t reserved = 0;
  for (const uint8_t b : h.reserved0) reserved |= b;
  for (const uint8_t b : h.reserved1) reserved |= b;
  return reserved == 0 ? Status() : Status::Damaged("its reserved bytes are not 0");
}

// Demands exactly the sections that the header implies, in order, inside the blob, and returns where they are. How many
// values a sparse blob stores is the last entry of its offsets.
Status ReadSections(const uint8_t* blob, uint64_t blob_size, const Header& h, SectionSizes expected,
                    uint64_t (&offset)[kSectionKinds + 1]) {
  uint64_t end = sizeof(Header) + static_cast<uint64_t>(h.section_count) * sizeof(Section);
  if (h.section_count > kSectionKinds || end > blob_size) return Status::Damaged("its section table does not fit");
  uint32_t entry = 0;
  for (uint32_t id = 1; id <= kSectionKinds; ++id) {
    if (expected.bytes[id] == 0 && id != kValues) continue;
    const std::string name = "section " + std::to_string(id);
    if (entry == h.section_count) return Status::Damaged(name + " is missing");
    Section s;
    std::memcpy(&s, blob + sizeof(Header) + entry++ * sizeof s, sizeof s);
    if (s.id != id || s.reserved != 0) return Status::Damaged("its section table has no proper entry for " + name);
    if (s.offset % kSectionAlignment != 0 || s.offset < end || s.offset > blob_size || s.size > blob_size - s.offset)
      return Status::Damaged(name + " lies outside the blob or over another section");
    if (s.size != expected.bytes[id])
      return Status::Damaged(name + " has " + std::to_string(s.size) + " bytes where K, N and the values need " +
                             std::to_string(expected.bytes[id]));
    offset[id] = s.offset;
    if (id == kOffsets) {
      const uint64_t values = LoadU64(blob + s.offset + s.size - 8);
      if (values > 2 * blob_size) return Status::Damaged("its offsets count more values than it can hold");
      expected.bytes[kValues] = ValueBytes(static_cast<WeightType>(h.weight_type), values);
    }
    end = s.offset + s.size;
    if (id == kValues) end += kOverread;
  }
  if (entry != h.section_count) return Status::Damaged("it has sections that its form does not use");
  if (end > blob_size) return Status::Damaged("it ends less than 64 bytes after its values");
  return {};
}

struct MaskCount {
  uint64_t bits = 0, stored = 0;  // stored: with what fills up the emptier half of an int4 tile
};

MaskCount CountMasks(WeightType type, const uint8_t* masks, size_t tiles) {
  const size_t half_bytes = MaskBytesPerTile(type) / 2;
  MaskCount count;
  for (size_t tile = 0; tile < tiles; ++tile) {
    uint64_t halves[2] = {0, 0};
    for (uint64_t& half : halves)
      for (const uint8_t* end = masks + half_bytes; masks != end; masks += 8)
        half += static_cast<uint64_t>(__builtin_popcountll(LoadU64(masks)));
    count.bits += halves[0] + halves[1];
    count.stored += StoredInTile(type, halves[0], halves[1]);
  }
  return count;
}

// Every run must hold as many values as its masks have bits: then values stay inside their section.
Status CheckRuns(const PackedView& w) {
  const size_t tile_bytes = MaskBytesPerTile(w.type);
  uint64_t before = 0, nnz = 0;
  for (size_t strip = 0; strip < w.strips; ++strip) {
    for (size_t run = 0; run < w.runs; ++run) {
      if (ValuesBefore(w, strip, run) != before)
        return Status::Damaged("the offset of run " + std::to_string(run) + " of strip " + std::to_string(strip) +
                               " does not fit its bitmap");
      const uint8_t* masks = w.bitmap + (strip * w.tiles + run * TilesPerRun(w.type)) * tile_bytes;
      const MaskCount count = CountMasks(w.type, masks, TilesInRun(w, run));
      before += count.stored;
      nnz += count.bits;
    }
  }
  if (ValuesBefore(w, w.strips, 0) != before || nnz != w.nnz)
    return Status::Damaged("its bitmap and its count of values disagree");
  return {};
}

}  // namespace
}  // namespace internal

Status Parse(const uint8_t* blob, uint64_t blob_size, PackedView* view) {
  using namespace internal;
  Header h;
  if (blob_size < sizeof h) return Status::Damaged("it is shorter than a header");
  std::memcpy(&h, blob, sizeof h);
  Status status = CheckHeader(h, blob_size);
  if (!status.ok()) return status;

  PackedView v = {};
  v.type = static_cast<WeightType>(h.weight_type);
  v.form = static_cast<Form>(h.form);
  v.scale_type = static_cast<ScaleType>(h.scale_type);
  v.group_size = h.group_size;
  v.k = h.k;
  v.n = h.n;
  v.nnz = h.nnz;
  SetGeometry(&v);
  // Every padded weight costs at least a bit, so larger sizes cannot be in this blob; past here no product overflows.
  if (v.strips != 0 && v.tiles > blob_size / v.strips)
    return Status::Damaged("its K and N need more bytes than it has");
  if (h.nnz > h.k * h.n) return Status::Damaged("it counts more non-zeros than weights");

  uint64_t offset[kSectionKinds + 1] = {};
  status =
      ReadSections(blob, blob_size, h, SizesOf(v.type, v.form, v.scale_type, v.group_size, v.k, v.n, h.nnz), offset);
  if (!status.ok()) return status;
  v.offsets = blob + offset[kOffsets];
  v.bitmap = blob + offset[kBitmap];
  v.values = blob + offset[kValues];
  v.scales = blob + offset[kScales];
  v.column_scales = v.scale_type == ScaleType::kInt8 ? blob + offset[kColumnScales] : nullptr;
  v.sums = v.type == WeightType::kInt8 ? blob + offset[kSums] : nullptr;
  if (v.form == Form::kSparse) {
    status = CheckRuns(v);
    if (!status.ok()) return status;
  }
  *view = v;
  return {};
}

}  // namespace sparamx
