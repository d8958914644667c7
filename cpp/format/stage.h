// Reading of a source matrix, run by run, as fp32.
#pragma once

#include <cstddef>
#include <memory>

#include "format/for_each.h"
#include "format/packed_format.h"

namespace sparamx {
namespace internal {

// Strips staged together: 256 bytes of a row-major fp32 row at a time, so that a wide matrix is not read in single
// lines, each on a page of its own.
constexpr size_t kStagedStrips = 4;
constexpr size_t kStagedColumns = kStagedStrips * kStripColumns;

// One run of several strips as fp32, [k][column], zero beyond the matrix.
struct Stage {
  float w[kRunK][kStagedColumns];
};

void LoadStage(const SourceMatrix& source, size_t run, size_t first_strip, Stage* stage);

// Calls body(strip, run, stage, first column in the stage) for every run, with threads. The runs of one strip come in
// order and from one thread.
template <typename Body>
void ForEachRun(const SourceMatrix& source, const PackedView& geometry, unsigned threads, const Body& body) {
  ForEach(CeilDiv(geometry.strips, kStagedStrips), threads, [&](size_t group) {
    const std::unique_ptr<Stage> stage(new Stage);
    const size_t first = group * kStagedStrips;
    const size_t last = first + kStagedStrips < geometry.strips ? first + kStagedStrips : geometry.strips;
    for (size_t run = 0; run < geometry.runs; ++run) {
      LoadStage(source, run, first, stage.get());
      for (size_t strip = first; strip < last; ++strip) body(strip, run, *stage, (strip - first) * kStripColumns);
    }
  });
}

}  // namespace internal
}  // namespace sparamx
