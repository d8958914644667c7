// The loops around the micro-kernels, one text for every vector level. A kernel file supplies a struct Isa:
//
//   Vec                         16 sums (one strip column each)
//   kPanelTileBytes             an expanded tile
//   kPanelTiles                 tiles of one strip that are expanded together for larger M (the panel stays in L1)
//   kDirectRows                 largest M whose sums stay in registers over all of K
//   kBlockRows, kBlockStrips    register block for larger M
//   kSteps                      rows of an expanded tile; each multiplies one broadcast from x
//   kStepBytes                  bytes of x that one step broadcasts
//   Expand<Sparse>(cursor, out) expands one tile and advances; returns where it is (out, or the blob itself)
//   Zero, Add, Load, Store      of Vec; Load and Store take the count of columns that exist
//   Weights(tile, step)         one row of the panel
//   Multiply(sum, w, x)         sum + w * broadcast(*x)
//
// Two ways through a job:
//   direct   M <= kDirectRows: a tile is expanded into L1 and multiplied at once; the core overlaps both.
//   panel    otherwise: kPanelTiles tiles of kBlockStrips strips are expanded, then used by every row of the job.
// The order of summation depends on the shape only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/epilogue.h"
#include "kernels/kernel_table.h"

namespace sparamx {
namespace {

// Where a walk through one strip stands.
struct Cursor {
  const uint8_t* masks;
  const uint8_t* values;
};

SPARAMX_INLINE Cursor StartOf(const PackedView& w, size_t strip, size_t run) {
  const size_t tile = strip * w.tiles + run * TilesPerRun(w.type);
  if (w.form == Form::kDense) return {nullptr, w.values + ValueBytes(w.type, tile * TileWeights(w.type))};
  return {w.bitmap + tile * MaskBytesPerTile(w.type), w.values + ValueBytes(w.type, ValuesBefore(w, strip, run))};
}

SPARAMX_INLINE size_t Min(size_t a, size_t b) {
  return a < b ? a : b;
}

// Columns of a strip that exist.
SPARAMX_INLINE size_t ColumnsOf(const PackedView& w, size_t strip) {
  return Min(kStripColumns, w.n - strip * kStripColumns);
}

SPARAMX_INLINE void FinishStrips(const MatMulJob& job, size_t strip, size_t strips) {
  if (!job.finish) return;
  const size_t n0 = strip * kStripColumns;
  const size_t columns = Min(strips * kStripColumns, job.weights->n - n0);
  FinishRows(job.y + n0, job.y_stride, job.rows, columns, job.bias ? job.bias + n0 : nullptr, job.epilogue);
}

template <class Isa, bool Sparse, int Rows>
void DirectRows(const MatMulJob& job) {
  // One row alone would wait for its own last sum at every step: it takes turns among several.
  constexpr int kChains = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  const PackedView& w = *job.weights;
  const size_t tiles_per_run = TilesPerRun(w.type);
  const size_t first = job.first_run * tiles_per_run, last = Min(job.last_run * tiles_per_run, w.tiles);
  alignas(64) uint8_t buffer[Isa::kPanelTileBytes];
  for (size_t strip = job.first_strip; strip < job.last_strip; ++strip) {
    typename Isa::Vec sums[Rows][kChains];
    for (int m = 0; m < Rows; ++m)
      for (int c = 0; c < kChains; ++c) sums[m][c] = Isa::Zero();
    Cursor cursor = StartOf(w, strip, job.first_run);
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + first * Isa::kSteps * Isa::kStepBytes;
    for (size_t tile = first; tile < last; ++tile) {
      const uint8_t* panel = Isa::template Expand<Sparse>(&cursor, buffer);
#pragma GCC unroll 32
      for (int step = 0; step < Isa::kSteps; ++step) {
        const typename Isa::Vec weights = Isa::Weights(panel, step);
#pragma GCC unroll 32
        for (int m = 0; m < Rows; ++m)
          sums[m][step % kChains] =
              Isa::Multiply(sums[m][step % kChains], weights, x + m * job.x_row_bytes + step * Isa::kStepBytes);
      }
      x += Isa::kSteps * Isa::kStepBytes;
    }
    for (int m = 0; m < Rows; ++m) {
      for (int c = 1; c < kChains; ++c) sums[m][0] = Isa::Add(sums[m][0], sums[m][c]);
      Isa::Store(job.y + m * job.y_stride + strip * kStripColumns, ColumnsOf(w, strip), sums[m][0]);
    }
    FinishStrips(job, strip, 1);
  }
}

template <class Isa, bool Sparse, int Rows>
SPARAMX_INLINE void Direct(const MatMulJob& job) {
  if constexpr (Rows > 0) {
    if (job.rows == Rows) return DirectRows<Isa, Sparse, Rows>(job);
    return Direct<Isa, Sparse, Rows - 1>(job);
  }
}

// Rows x Strips outputs, their sums carried in y from one panel to the next.
template <class Isa, int Rows, int Strips>
void Block(const uint8_t* const (&panels)[Isa::kBlockStrips], size_t tiles, const uint8_t* x, size_t x_row_bytes,
           float* y, size_t y_stride, size_t columns, bool first) {
  typename Isa::Vec sums[Rows][Strips];
  for (int m = 0; m < Rows; ++m)
    for (int s = 0; s < Strips; ++s) {
      const size_t there = Min(columns - s * kStripColumns, kStripColumns);
      sums[m][s] = first ? Isa::Zero() : Isa::Load(y + m * y_stride + s * kStripColumns, there);
    }
  for (size_t tile = 0; tile < tiles; ++tile) {
#pragma GCC unroll 2
    for (int step = 0; step < Isa::kSteps; ++step) {
      typename Isa::Vec weights[Strips];
      for (int s = 0; s < Strips; ++s) weights[s] = Isa::Weights(panels[s] + tile * Isa::kPanelTileBytes, step);
#pragma GCC unroll 32
      for (int m = 0; m < Rows; ++m)
        for (int s = 0; s < Strips; ++s)
          sums[m][s] = Isa::Multiply(sums[m][s], weights[s], x + m * x_row_bytes + step * Isa::kStepBytes);
    }
    x += Isa::kSteps * Isa::kStepBytes;
  }
  for (int m = 0; m < Rows; ++m)
    for (int s = 0; s < Strips; ++s)
      Isa::Store(y + m * y_stride + s * kStripColumns, Min(columns - s * kStripColumns, kStripColumns), sums[m][s]);
}

// Rows that remain after whole blocks go in blocks of half, a quarter, ... of the rows: few enough to compile, and a
// remainder is rarely more than three blocks.
template <class Isa, int Strips, int Rows = Isa::kBlockRows>
SPARAMX_INLINE void Blocks(size_t rows, const uint8_t* const (&panels)[Isa::kBlockStrips], size_t tiles,
                           const uint8_t* x, size_t x_row_bytes, float* y, size_t y_stride, size_t columns,
                           bool first) {
  if constexpr (Rows > 0) {
    for (; rows >= Rows; rows -= Rows) {
      Block<Isa, Rows, Strips>(panels, tiles, x, x_row_bytes, y, y_stride, columns, first);
      x += Rows * x_row_bytes;
      y += Rows * y_stride;
    }
    Blocks<Isa, Strips, Rows / 2>(rows, panels, tiles, x, x_row_bytes, y, y_stride, columns, first);
  }
}

template <class Isa, bool Sparse, int Strips>
void PanelStrips(const MatMulJob& job, size_t strip, uint8_t* buffer) {
  const PackedView& w = *job.weights;
  const size_t tiles_per_run = TilesPerRun(w.type);
  const size_t first = job.first_run * tiles_per_run, last = Min(job.last_run * tiles_per_run, w.tiles);
  const size_t n0 = strip * kStripColumns;
  const size_t columns = Min(Strips * kStripColumns, w.n - n0);
  Cursor cursors[Strips];
  for (int s = 0; s < Strips; ++s) cursors[s] = StartOf(w, strip + s, job.first_run);
  for (size_t tile = first; tile < last; tile += Isa::kPanelTiles) {
    const size_t tiles = Min(Isa::kPanelTiles, last - tile);
    const uint8_t* panels[Isa::kBlockStrips] = {};
    for (int s = 0; s < Strips; ++s) {
      uint8_t* out = buffer + s * Isa::kPanelTiles * Isa::kPanelTileBytes;
      panels[s] = Isa::template Expand<Sparse>(&cursors[s], out);
      for (size_t t = 1; t < tiles; ++t) Isa::template Expand<Sparse>(&cursors[s], out + t * Isa::kPanelTileBytes);
    }
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + tile * Isa::kSteps * Isa::kStepBytes;
    Blocks<Isa, Strips>(job.rows, panels, tiles, x, job.x_row_bytes, job.y + n0, job.y_stride, columns, tile == first);
  }
  FinishStrips(job, strip, Strips);
}

template <class Isa, bool Sparse>
void Panel(const MatMulJob& job) {
  alignas(64) uint8_t buffer[Isa::kBlockStrips * Isa::kPanelTiles * Isa::kPanelTileBytes];
  size_t strip = job.first_strip;
  for (; strip + Isa::kBlockStrips <= job.last_strip; strip += Isa::kBlockStrips)
    PanelStrips<Isa, Sparse, Isa::kBlockStrips>(job, strip, buffer);
  for (; strip < job.last_strip; ++strip) PanelStrips<Isa, Sparse, 1>(job, strip, buffer);
}

template <class Isa, bool Sparse>
void MultiplyForm(const MatMulJob& job) {
  if (job.rows <= Isa::kDirectRows) return Direct<Isa, Sparse, Isa::kDirectRows>(job);
  Panel<Isa, Sparse>(job);
}

// Kernel::multiply of a level.
template <class Isa>
void MultiplyStrips(const MatMulJob& job) {
  if (job.weights->form == Form::kSparse) return MultiplyForm<Isa, true>(job);
  MultiplyForm<Isa, false>(job);
}

}  // namespace
}  // namespace sparamx
