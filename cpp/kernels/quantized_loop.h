// The loops around the integer micro-kernels (int8 and int4 weights, int8 activations), one text for every vector
// level. A kernel file supplies a struct Isa:
//
//   Vec, IntVec                16 float sums, 16 int32 sums
//   kDirectRows                largest M whose sums stay in registers over all of K
//   kInt8Strips                strips at once there with int8 weights, 1 or 2. (Of int4 weights one alone has three
//                              streams from memory, and six read 8 % slower, though they take fewer instructions.)
//   kBlockRows, kBlockStrips   register block for larger M
//   kTurns                     sums that take turns where there are one or two: products take longer than rows come
//   kStoredCodes               the panel holds codes as stored (CodeBias above their meaning, holes too), which
//                              corrections undo; otherwise it holds signed numbers
//   Expand<Int4, Sparse>(cursor, out)  expands one tile to 16 rows of 64 bytes and advances
//   Weights(tile, row)         a row of the panel
//   Stream<Int4, Sparse>       the rows of a strip, one after the other, for the direct way: BeginTile(), Row(row)
//   StartInt(v)                sums that begin at v
//   Dot(sum, w, x)             sum + the 4 products of each lane with the 4 codes at x
//   Settled(sum)               called after 8 rows or a segment: a level may add up in 16 bits first
//   AddInt, ZeroInt
//   LoadInts(p)                16 integers as stored
//   Scales(p, type, columns)   16 weight scales, of int8 times the 16 scales of columns
//   Flush(sum, ints, scales, x_scale)  sum + ints * scales * x_scale
//
// Products are summed as integers over a segment (a run of 512 for int8, a group for int4; both stay below 2^24, so the
// conversion to fp32 is exact), then scaled and added in fp32.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/quantized_rows.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

constexpr size_t kQuantizedTileBytes = kTileRows * kTileRowBytes;
constexpr size_t kScalesAhead = 1024;  // bytes that scales are asked for ahead: 32 tiles of groups of 32 and int8

// What a micro-kernel needs to know of segments and scales.
struct Segments {
  size_t tiles;       // of a segment, where it spans whole tiles
  size_t scale_step;  // scale groups per segment: 1 for int4, 0 for int8, whose one scale serves all
  ScaleType scale_type;
  size_t scale_bytes;  // of a strip and a segment
  QuantizedRowLayout layout;
};

SPARAMX_INLINE Segments SegmentsOf(const PackedView& w) {
  Segments s;
  s.layout = QuantizedLayout(w);
  s.tiles = s.layout.segment_k < 64 ? 1 : s.layout.segment_k / 64;
  s.scale_step = w.group_size == 0 ? 0 : 1;
  s.scale_type = w.scale_type;
  s.scale_bytes = s.scale_step * kStripColumns * ScaleBytes(w.scale_type);
  return s;
}

SPARAMX_INLINE const uint8_t* ScalesOf(const PackedView& w, size_t strip, size_t group) {
  return w.scales + (strip * w.groups + group) * kStripColumns * ScaleBytes(w.scale_type);
}

// Null unless scales are int8.
SPARAMX_INLINE const uint8_t* ColumnScalesOf(const PackedView& w, size_t strip) {
  return w.scale_type == ScaleType::kInt8 ? w.column_scales + strip * kStripColumns * sizeof(float) : nullptr;
}

SPARAMX_INLINE float LoadFloat(const uint8_t* p) {
  float v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

SPARAMX_INLINE int32_t LoadInt(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// A Stream for levels that expand whole tiles at a time.
template <class Isa, bool Int4, bool Sparse>
struct TileStream {
  Cursor cursor;
  alignas(64) uint8_t tile[kQuantizedTileBytes];

  explicit TileStream(const Cursor& start) : cursor(start) {}
  SPARAMX_INLINE void BeginTile() { Isa::template Expand<Int4, Sparse>(&cursor, tile); }
  SPARAMX_INLINE typename Isa::Weight Row(int row) const { return Isa::Weights(tile, row); }
};

// Where the weights of some strips come from, one tile after the other: streams.
template <class Stream, int Strips>
struct StreamRows {
  Stream streams[Strips];
  SPARAMX_INLINE void BeginTile() {
    for (Stream& stream : streams) stream.BeginTile();
  }
  SPARAMX_INLINE auto Row(int row, int s) { return streams[s].Row(row); }
};

// Or a panel that is expanded already.
template <class Isa>
struct PanelRows {
  const uint8_t* tile;
  static constexpr size_t kStripBytes = TilesPerRun(WeightType::kInt8) * kQuantizedTileBytes;

  SPARAMX_INLINE void BeginTile() { tile += kQuantizedTileBytes; }
  SPARAMX_INLINE typename Isa::Weight Row(int row, int s) const { return Isa::Weights(tile + s * kStripBytes, row); }
};

// What the sums of a row begin with: what the row's offset adds to every output. Int4 rows have none, and of several
// parts along K the first adds it.
template <class Isa>
SPARAMX_INLINE typename Isa::Vec FirstSum(const MatMulJob& job, const Segments& segments, size_t strip, size_t m) {
  const PackedView& w = *job.weights;
  if (w.sums == nullptr || job.first_run != 0) return Isa::Zero();
  const float offset = LoadFloat(static_cast<const uint8_t*>(job.x) + m * job.x_row_bytes + segments.layout.offset_at);
  return Isa::Flush(Isa::Zero(), Isa::LoadInts(w.sums + strip * kStripColumns * 4),
                    Isa::Scales(ScalesOf(w, strip, 0), ScaleType::kFp32, nullptr), offset);
}

// Rows x Strips outputs over some tiles, which are whole segments or the last of K. SegmentRows: tile rows of a
// segment, 16 where it spans a tile or more.
template <class Isa, int SegmentRows, int Rows, int Strips, class Source>
SPARAMX_INLINE void MultiplyTiles(const MatMulJob& job, const Segments& segments, size_t strip, size_t first,
                                  size_t last, const uint8_t* x, typename Isa::Vec (&sums)[Rows][Strips],
                                  Source& source) {
  constexpr int kChains = Rows * Strips <= 2 ? Isa::kTurns : 1;
  const PackedView& w = *job.weights;
  const QuantizedRowLayout& layout = segments.layout;
  const size_t x_row_bytes = job.x_row_bytes, first_segment = first * (16 / SegmentRows) / segments.tiles;
  const uint8_t* codes = x + first * 64;
  const uint8_t* corrections = x + layout.corrections_at + first_segment * 4;
  const uint8_t* x_scales = x + layout.scales_at + first_segment * segments.scale_step * 4;
  const uint8_t* scales = ScalesOf(w, strip, first_segment * segments.scale_step);
  const uint8_t* column_scales[Strips];
  for (size_t s = 0; s < Strips; ++s) column_scales[s] = ColumnScalesOf(w, strip + s);
  const size_t strip_scale_bytes = w.groups * kStripColumns * ScaleBytes(segments.scale_type);
  size_t segments_left = layout.segments - first_segment, tiles_left = segments.tiles;
  typename Isa::IntVec ints[Rows][Strips][kChains];
  // Sums of a segment begin with its correction.
  const auto begin_segment = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
      const typename Isa::IntVec start = Isa::StartInt(Isa::kStoredCodes ? LoadInt(corrections + m * x_row_bytes) : 0);
#pragma GCC unroll 2
      for (int s = 0; s < Strips; ++s) {
        ints[m][s][0] = start;
        for (int c = 1; c < kChains; ++c) ints[m][s][c] = Isa::ZeroInt();
      }
    }
  };
  begin_segment();
  for (size_t tile = first; tile < last; ++tile) {
    source.BeginTile();
    for (int s = 0; s < Strips; ++s) __builtin_prefetch(scales + s * strip_scale_bytes + kScalesAhead);
#pragma GCC unroll 4
    for (int part = 0; part < 16 / SegmentRows; ++part) {
#pragma GCC unroll 16
      for (int r = 0; r < SegmentRows; ++r) {
        const int row = part * SegmentRows + r;
        typename Isa::Weight weights[Strips];
#pragma GCC unroll 2
        for (int s = 0; s < Strips; ++s) weights[s] = source.Row(row, s);
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m)
          for (int s = 0; s < Strips; ++s)
            ints[m][s][r % kChains] = Isa::Dot(ints[m][s][r % kChains], weights[s], codes + m * x_row_bytes + row * 4);
        if ((r + 1) % (SegmentRows < 8 ? SegmentRows : 8) != 0) continue;
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m)
          for (int s = 0; s < Strips; ++s)
            for (int c = 0; c < kChains; ++c) ints[m][s][c] = Isa::Settled(ints[m][s][c]);
      }
      if (SegmentRows == 16 && --tiles_left != 0 && tile + 1 < last) continue;
      typename Isa::Vec weight_scales[Strips];
      for (int s = 0; s < Strips; ++s)
        weight_scales[s] = Isa::Scales(scales + s * strip_scale_bytes, segments.scale_type, column_scales[s]);
#pragma GCC unroll 16
      for (int m = 0; m < Rows; ++m) {
        const float x_scale = LoadFloat(x_scales + m * x_row_bytes);
        for (int s = 0; s < Strips; ++s) {
          typename Isa::IntVec total = ints[m][s][0];
          for (int c = 1; c < kChains; ++c) total = Isa::AddInt(total, ints[m][s][c]);
          sums[m][s] = Isa::Flush(sums[m][s], total, weight_scales[s], x_scale);
        }
      }
      if (--segments_left == 0) return;  // what is left of the tile is padding
      tiles_left = segments.tiles;
      corrections += 4;
      x_scales += segments.scale_step * 4;
      scales += segments.scale_bytes;
      begin_segment();
    }
    codes += 64;
  }
}

template <class Isa, bool Int4, bool Sparse, int SegmentRows, int Rows, int Strips>
void DirectQuantizedStrips(const MatMulJob& job, const Segments& segments, size_t strip) {
  const PackedView& w = *job.weights;
  const size_t first = job.first_run * TilesPerRun(w.type), last = Min(job.last_run * TilesPerRun(w.type), w.tiles);
  using Stream = typename Isa::template Stream<Int4, Sparse>;
  typename Isa::Vec sums[Rows][Strips];
  for (int m = 0; m < Rows; ++m)
    for (int s = 0; s < Strips; ++s) sums[m][s] = FirstSum<Isa>(job, segments, strip + s, static_cast<size_t>(m));
  const auto* x = static_cast<const uint8_t*>(job.x);
  if constexpr (Strips == 2) {
    StreamRows<Stream, 2> source = {
        {Stream(StartOf(w, strip, job.first_run)), Stream(StartOf(w, strip + 1, job.first_run))}};
    MultiplyTiles<Isa, SegmentRows, Rows, 2>(job, segments, strip, first, last, x, sums, source);
  } else {
    StreamRows<Stream, 1> source = {{Stream(StartOf(w, strip, job.first_run))}};
    MultiplyTiles<Isa, SegmentRows, Rows, 1>(job, segments, strip, first, last, x, sums, source);
  }
  for (int m = 0; m < Rows; ++m)
    for (int s = 0; s < Strips; ++s)
      Isa::Store(job.y + m * job.y_stride + (strip + s) * kStripColumns, ColumnsOf(w, strip + s), sums[m][s]);
  FinishStrips(job, strip, Strips);
}

template <class Isa, bool Int4, bool Sparse, int SegmentRows, int Rows>
void DirectQuantizedRows(const MatMulJob& job) {
  const Segments segments = SegmentsOf(*job.weights);
  size_t strip = job.first_strip;
  if constexpr (!Int4 && Isa::kInt8Strips == 2)
    for (; strip + 2 <= job.last_strip; strip += 2)
      DirectQuantizedStrips<Isa, Int4, Sparse, SegmentRows, Rows, 2>(job, segments, strip);
  for (; strip < job.last_strip; ++strip)
    DirectQuantizedStrips<Isa, Int4, Sparse, SegmentRows, Rows, 1>(job, segments, strip);
}

template <class Isa, bool Int4, bool Sparse, int SegmentRows, int Rows>
SPARAMX_INLINE void DirectQuantized(const MatMulJob& job) {
  if constexpr (Rows > 0) {
    if (job.rows == Rows) return DirectQuantizedRows<Isa, Int4, Sparse, SegmentRows, Rows>(job);
    return DirectQuantized<Isa, Int4, Sparse, SegmentRows, Rows - 1>(job);
  }
}

template <class Isa, int SegmentRows, int Strips, int Rows>
void QuantizedBlock(const MatMulJob& job, const Segments& segments, size_t strip, size_t m0, size_t first, size_t last,
                    bool begin, const uint8_t* panel) {
  typename Isa::Vec sums[Rows][Strips];
  float* y = job.y + m0 * job.y_stride + strip * kStripColumns;
  for (int m = 0; m < Rows; ++m)
    for (int s = 0; s < Strips; ++s)
      sums[m][s] = begin ? FirstSum<Isa>(job, segments, strip + static_cast<size_t>(s), m0 + static_cast<size_t>(m))
                         : Isa::Load(y + m * job.y_stride + s * kStripColumns, ColumnsOf(*job.weights, strip + s));
  PanelRows<Isa> source = {panel - kQuantizedTileBytes};
  MultiplyTiles<Isa, SegmentRows, Rows, Strips>(
      job, segments, strip, first, last, static_cast<const uint8_t*>(job.x) + m0 * job.x_row_bytes, sums, source);
  for (int m = 0; m < Rows; ++m)
    for (int s = 0; s < Strips; ++s)
      Isa::Store(y + m * job.y_stride + s * kStripColumns, ColumnsOf(*job.weights, strip + s), sums[m][s]);
}

// The block of `rows` rows, Least <= rows <= Rows.
template <class Isa, int SegmentRows, int Strips, int Least, int Rows = Isa::kBlockRows>
SPARAMX_INLINE void AnyQuantizedBlock(size_t rows, const MatMulJob& job, const Segments& segments, size_t strip,
                                      size_t m, size_t first, size_t last, bool begin, const uint8_t* panel) {
  if constexpr (Rows > Least) {
    if (rows < Rows)
      return AnyQuantizedBlock<Isa, SegmentRows, Strips, Least, Rows - 1>(rows, job, segments, strip, m, first, last,
                                                                          begin, panel);
  }
  QuantizedBlock<Isa, SegmentRows, Strips, Rows>(job, segments, strip, m, first, last, begin, panel);
}

// All rows in blocks as equal as can be, as Blocks in strip_loop.h.
template <class Isa, int SegmentRows, int Strips>
SPARAMX_INLINE void QuantizedBlocks(const MatMulJob& job, const Segments& segments, size_t strip, size_t first,
                                    size_t last, bool begin, const uint8_t* panel) {
  constexpr size_t kLeast = Min(Isa::kDirectRows + 1, (Isa::kBlockRows + 1) / 2);
  size_t m = 0;
  for (size_t blocks = CeilDiv(job.rows, Isa::kBlockRows); blocks > 0; --blocks) {
    const size_t rows = CeilDiv(job.rows - m, blocks);
    AnyQuantizedBlock<Isa, SegmentRows, Strips, kLeast>(rows, job, segments, strip, m, first, last, begin, panel);
    m += rows;
  }
}

// One run of Strips strips at a time is expanded and used by every row.
template <class Isa, bool Int4, bool Sparse, int SegmentRows, int Strips>
void PanelQuantizedStrips(const MatMulJob& job, size_t strip, uint8_t* panel) {
  const PackedView& w = *job.weights;
  const Segments segments = SegmentsOf(w);
  constexpr size_t kTiles = TilesPerRun(WeightType::kInt8);
  Cursor cursors[Strips];
  for (size_t run = job.first_run; run < job.last_run; ++run) {
    const size_t first = run * kTiles, last = Min(first + kTiles, w.tiles);
    for (int s = 0; s < Strips; ++s) {
      cursors[s] = StartOf(w, strip + s, run);
      for (size_t t = 0; t < last - first; ++t)
        Isa::template Expand<Int4, Sparse>(&cursors[s], panel + (s * kTiles + t) * kQuantizedTileBytes);
    }
    QuantizedBlocks<Isa, SegmentRows, Strips>(job, segments, strip, first, last, run == job.first_run, panel);
  }
  FinishStrips(job, strip, Strips);
}

template <class Isa, bool Int4, bool Sparse, int SegmentRows>
void MultiplyQuantizedRows(const MatMulJob& job) {
  if (job.rows <= Isa::kDirectRows) return DirectQuantized<Isa, Int4, Sparse, SegmentRows, Isa::kDirectRows>(job);
  alignas(64) uint8_t panel[Isa::kBlockStrips * TilesPerRun(WeightType::kInt8) * kQuantizedTileBytes];
  size_t strip = job.first_strip;
  for (; strip + Isa::kBlockStrips <= job.last_strip; strip += Isa::kBlockStrips)
    PanelQuantizedStrips<Isa, Int4, Sparse, SegmentRows, Isa::kBlockStrips>(job, strip, panel);
  for (; strip < job.last_strip; ++strip) PanelQuantizedStrips<Isa, Int4, Sparse, SegmentRows, 1>(job, strip, panel);
}

template <class Isa, bool Int4, bool Sparse>
void MultiplyQuantizedForm(const MatMulJob& job) {
  if constexpr (Int4) {
    if (job.weights->group_size == 16) return MultiplyQuantizedRows<Isa, Int4, Sparse, 4>(job);
    if (job.weights->group_size == 32) return MultiplyQuantizedRows<Isa, Int4, Sparse, 8>(job);
  }
  MultiplyQuantizedRows<Isa, Int4, Sparse, 16>(job);
}

// Kernel::multiply of a level.
template <class Isa, bool Int4>
void MultiplyQuantized(const MatMulJob& job) {
  if (job.weights->form == Form::kSparse) return MultiplyQuantizedForm<Isa, Int4, true>(job);
  MultiplyQuantizedForm<Isa, Int4, false>(job);
}

}  // namespace
}  // namespace sparamx
