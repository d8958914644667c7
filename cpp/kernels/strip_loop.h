// The loops around the micro-kernels, one text for every vector level. A kernel file supplies a struct Isa:
//
//   Vec                         16 sums (one strip column each)
//   kPanelTileBytes             an expanded tile
//   kDirectRows                 largest M whose sums stay in registers over all of K
//   kRowsOfTwoStrips            largest M for which this holds for two strips at once; 0: for none
//   kBlockRows, kBlockStrips    register block for larger M
//   kSteps                      rows of an expanded tile; each multiplies one broadcast from x
//   kStepBytes                  bytes of x that one step broadcasts
//   Expand<Sparse>(cursor, out) expands one tile and advances; returns where it is (out, or the blob itself)
//   Zero, Add, Load, Store      of Vec; Load and Store take the count of columns that exist
//   Weights(tile, step)         one row of the panel
//   Multiply(sum, w, x)         sum + w * broadcast(*x)
//
// Two ways through a job:
//   direct   M <= kDirectRows: a tile is expanded into L1 and multiplied at once; the core overlaps both. Two strips
//            take turns where registers allow it: two streams read a quarter faster than one (fp32, M = 1).
//   panel    otherwise: a run of K of kBlockStrips strips is expanded, then used by every row of the job; meanwhile
//            what the next panel is expanded from comes into the L2.
// The order of summation depends on the shape only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/epilogue.h"
#include "kernels/kernel_table.h"

namespace sparamx {
namespace {

// Bytes of X that stay in the L2 beside two panels.
constexpr size_t kXBytes = 1024 * 1024;

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

// Where the walk through a run ends.
SPARAMX_INLINE Cursor EndOf(const PackedView& w, size_t strip, size_t run) {
  if (run + 1 < w.runs) return StartOf(w, strip, run + 1);
  if (strip + 1 < w.strips) return StartOf(w, strip + 1, 0);
  return StartOf(w, strip, run);  // of the last one it is not known
}

SPARAMX_INLINE constexpr size_t Min(size_t a, size_t b) {
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

// Strips at once are as many streams from memory: while one waits at the end of a page, the other goes on.
template <class Isa, bool Sparse, int Rows, int Strips>
void DirectStrips(const MatMulJob& job, size_t strip) {
  // One row alone would wait for its own last sum at every step: it takes turns among several.
  constexpr int kChains = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  const PackedView& w = *job.weights;
  const size_t tiles_per_run = TilesPerRun(w.type);
  const size_t first = job.first_run * tiles_per_run, last = Min(job.last_run * tiles_per_run, w.tiles);
  alignas(64) uint8_t buffers[Strips][Isa::kPanelTileBytes];
  typename Isa::Vec sums[Strips][Rows][kChains];
  Cursor cursors[Strips];
  for (int s = 0; s < Strips; ++s) {
    cursors[s] = StartOf(w, strip + s, job.first_run);
    for (int m = 0; m < Rows; ++m)
      for (int c = 0; c < kChains; ++c) sums[s][m][c] = Isa::Zero();
  }
  const uint8_t* x = static_cast<const uint8_t*>(job.x) + first * Isa::kSteps * Isa::kStepBytes;
  for (size_t tile = first; tile < last; ++tile) {
#pragma GCC unroll 2
    for (int s = 0; s < Strips; ++s) {
      const uint8_t* panel = Isa::template Expand<Sparse>(&cursors[s], buffers[s]);
      // Left alone, GCC 12 keeps the expanded tile in registers instead of L1, and spills broadcasts that it shares
      // between the strips: on Zen 5 M = 3 to 8 then take 1.2 to 1.8 times as long.
      if constexpr (Rows >= 3) __asm__ volatile("" ::: "memory");
#pragma GCC unroll 32
      for (int step = 0; step < Isa::kSteps; ++step) {
        const typename Isa::Vec weights = Isa::Weights(panel, step);
#pragma GCC unroll 32
        for (int m = 0; m < Rows; ++m)
          sums[s][m][step % kChains] =
              Isa::Multiply(sums[s][m][step % kChains], weights, x + m * job.x_row_bytes + step * Isa::kStepBytes);
      }
    }
    x += Isa::kSteps * Isa::kStepBytes;
  }
  for (int s = 0; s < Strips; ++s) {
    for (int m = 0; m < Rows; ++m) {
      for (int c = 1; c < kChains; ++c) sums[s][m][0] = Isa::Add(sums[s][m][0], sums[s][m][c]);
      Isa::Store(job.y + m * job.y_stride + (strip + s) * kStripColumns, ColumnsOf(w, strip + s), sums[s][m][0]);
    }
  }
  FinishStrips(job, strip, Strips);
}

template <class Isa, bool Sparse, int Rows>
void DirectRows(const MatMulJob& job) {
  size_t strip = job.first_strip;
  if constexpr (Rows <= Isa::kRowsOfTwoStrips)
    for (; strip + 2 <= job.last_strip; strip += 2) DirectStrips<Isa, Sparse, Rows, 2>(job, strip);
  for (; strip < job.last_strip; ++strip) DirectStrips<Isa, Sparse, Rows, 1>(job, strip);
}

template <class Isa, bool Sparse, int Rows>
SPARAMX_INLINE void Direct(const MatMulJob& job) {
  if constexpr (Rows > 0) {
    if (job.rows == Rows) return DirectRows<Isa, Sparse, Rows>(job);
    return Direct<Isa, Sparse, Rows - 1>(job);
  }
}

// Of an expanded run, a row of 16 fp32 for every weight along K (rows of pairs take half).
constexpr size_t kPanelStripBytes = kRunK * 64;

// What the next panel will be expanded from, asked for while the present one is multiplied: expansion in one go would
// wait for memory, and the products would leave it idle.
class Ahead {
 public:
  // `calls` of Step will follow, together enough for all of it.
  Ahead(const PackedView& w, size_t strip, size_t strips, size_t run, size_t calls) {
    size_t lines = 0;
    for (size_t s = 0; s < strips; ++s) {
      const Cursor begin = StartOf(w, strip + s, run), end = EndOf(w, strip + s, run);
      if (begin.masks != nullptr) lines += Add(begin.masks, end.masks);
      lines += Add(begin.values, end.values);
    }
    per_call_ = CeilDiv(lines, calls);
    next_ = ranges_[0].begin;
  }
  Ahead() = default;  // nothing

  SPARAMX_INLINE void Step() {
    for (size_t i = 0; i < per_call_; ++i) {
      if (next_ >= ranges_[at_].end) {
        if (at_ + 1 >= count_) return;
        next_ = ranges_[++at_].begin;
      }
      __builtin_prefetch(next_, 0, 2);
      next_ += 64;
    }
  }

 private:
  struct Range {
    const uint8_t *begin, *end;
  };
  size_t Add(const uint8_t* begin, const uint8_t* end) {
    ranges_[count_++] = {begin, end};
    return CeilDiv(static_cast<size_t>(end - begin), 64);
  }

  Range ranges_[4] = {};  // masks and values of two strips
  size_t count_ = 0, at_ = 0, per_call_ = 0;
  const uint8_t* next_ = nullptr;
};

// What a panel is multiplied with, and where the sums go.
struct PanelJob {
  const uint8_t* panel;  // strip after strip
  size_t tiles;
  const uint8_t* x;
  size_t x_row_bytes;
  float* y;
  size_t y_stride, columns;
  bool first;  // y holds nothing yet
};

// Adds Rows x Strips sums over a panel to y. What y holds is asked for at the start and needed at the end: its rows,
// often a power of two apart, do not stay in the L2.
template <class Isa, int Rows, int Strips>
__attribute__((noinline)) void Block(const PanelJob& p, Ahead* ahead) {
  typename Isa::Vec sums[Rows][Strips];
#pragma GCC unroll 32
  for (int m = 0; m < Rows; ++m) {
    for (int s = 0; s < Strips; ++s) {
      sums[m][s] = Isa::Zero();
      __builtin_prefetch(p.y + m * p.y_stride + s * kStripColumns);
    }
  }
  const uint8_t* x = p.x;
  for (size_t tile = 0; tile < p.tiles; ++tile) {
    ahead->Step();
#pragma GCC unroll 2
    for (int step = 0; step < Isa::kSteps; ++step) {
      typename Isa::Vec weights[Strips];
      for (int s = 0; s < Strips; ++s)
        weights[s] = Isa::Weights(p.panel + s * kPanelStripBytes + tile * Isa::kPanelTileBytes, step);
#pragma GCC unroll 32
      for (int m = 0; m < Rows; ++m)
        for (int s = 0; s < Strips; ++s)
          sums[m][s] = Isa::Multiply(sums[m][s], weights[s], x + m * p.x_row_bytes + step * Isa::kStepBytes);
    }
    x += Isa::kSteps * Isa::kStepBytes;
  }
#pragma GCC unroll 32
  for (int m = 0; m < Rows; ++m) {
    for (int s = 0; s < Strips; ++s) {
      float* y = p.y + m * p.y_stride + s * kStripColumns;
      const size_t there = Min(p.columns - s * kStripColumns, kStripColumns);
      if (!p.first) sums[m][s] = Isa::Add(Isa::Load(y, there), sums[m][s]);
      Isa::Store(y, there, sums[m][s]);
    }
  }
}

// The block of `rows` rows, Least <= rows <= Rows.
template <class Isa, int Strips, int Least, int Rows = Isa::kBlockRows>
SPARAMX_INLINE void AnyBlock(size_t rows, const PanelJob& p, Ahead* ahead) {
  if constexpr (Rows > Least) {
    if (rows < Rows) return AnyBlock<Isa, Strips, Least, Rows - 1>(rows, p, ahead);
  }
  Block<Isa, Rows, Strips>(p, ahead);
}

// All rows in blocks as equal as can be: in a small block the multipliers would wait for its few sums. With more than
// kDirectRows rows none is smaller than half of kBlockRows.
template <class Isa, int Strips>
SPARAMX_INLINE void Blocks(size_t rows, PanelJob p, Ahead* ahead) {
  constexpr size_t kLeast = Min(Isa::kDirectRows + 1, (Isa::kBlockRows + 1) / 2);
  size_t blocks = CeilDiv(rows, Isa::kBlockRows);
  for (; blocks > 0; --blocks) {
    const size_t block_rows = CeilDiv(rows, blocks);
    AnyBlock<Isa, Strips, kLeast>(block_rows, p, ahead);
    p.x += block_rows * p.x_row_bytes;
    p.y += block_rows * p.y_stride;
    rows -= block_rows;
  }
}

// Panels in the order in which they are used: all strips of the job, a few at a time, over some runs of K whose part of
// X stays in the L2, then over the next ones.
class PanelWalk {
 public:
  PanelWalk(const MatMulJob& job, size_t block_strips, size_t x_run_bytes)
      : job_(job), block_strips_(block_strips), strip_(job.first_strip), run_(job.first_run), first_run_(run_) {
    runs_at_once_ = kXBytes / (job.rows * x_run_bytes);
    if (runs_at_once_ == 0) runs_at_once_ = 1;
  }

  bool done() const { return first_run_ == job_.last_run; }
  size_t strip() const { return strip_; }
  size_t run() const { return run_; }
  size_t strips() const { return job_.last_strip - strip_ < block_strips_ ? 1 : block_strips_; }

  void Advance() {
    if (++run_ < last_run()) return;
    const size_t end = run_;
    run_ = first_run_;
    strip_ += strips();
    if (strip_ < job_.last_strip) return;
    strip_ = job_.first_strip;
    run_ = first_run_ = end;
  }

 private:
  size_t last_run() const { return Min(first_run_ + runs_at_once_, job_.last_run); }

  const MatMulJob& job_;
  size_t block_strips_, runs_at_once_, strip_, run_, first_run_;
};

template <class Isa, bool Sparse>
void Panel(const MatMulJob& job) {
  const PackedView& w = *job.weights;
  const size_t tiles_per_run = TilesPerRun(w.type);
  alignas(64) uint8_t panel[Isa::kBlockStrips * kPanelStripBytes];
  for (PanelWalk walk(job, Isa::kBlockStrips, tiles_per_run * Isa::kSteps * Isa::kStepBytes); !walk.done();) {
    const PanelWalk now = walk;
    walk.Advance();
    const size_t first_tile = now.run() * tiles_per_run, tiles = Min(tiles_per_run, w.tiles - first_tile);
    for (size_t s = 0; s < now.strips(); ++s) {
      Cursor cursor = StartOf(w, now.strip() + s, now.run());
      uint8_t* out = panel + s * kPanelStripBytes;
      for (size_t t = 0; t < tiles; ++t) Isa::template Expand<Sparse>(&cursor, out + t * Isa::kPanelTileBytes);
    }
    Ahead ahead;
    if (!walk.done())
      ahead = Ahead(w, walk.strip(), walk.strips(), walk.run(), CeilDiv(job.rows, Isa::kBlockRows) * tiles);
    const size_t n0 = now.strip() * kStripColumns;
    const PanelJob part = {panel,
                           tiles,
                           static_cast<const uint8_t*>(job.x) + first_tile * Isa::kSteps * Isa::kStepBytes,
                           job.x_row_bytes,
                           job.y + n0,
                           job.y_stride,
                           Min(now.strips() * kStripColumns, w.n - n0),
                           now.run() == job.first_run};
    if (now.strips() == Isa::kBlockStrips)
      Blocks<Isa, Isa::kBlockStrips>(job.rows, part, &ahead);
    else
      Blocks<Isa, 1>(job.rows, part, &ahead);
    if (now.run() + 1 == job.last_run) FinishStrips(job, now.strip(), now.strips());
  }
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
