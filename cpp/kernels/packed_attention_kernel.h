// What an instruction-set level offers to attention over a packed cache (docs/attention.md). The rules of
// kernel_table.h hold: plain data, no templates of the standard library.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels/attention_kernel.h"

namespace sparamx {

// A matrix of bf16 tiles, strip after strip: keys as [numbers][tokens], values as [tokens][numbers]. With `masks` only
// the numbers whose bit is set stand in `values`, and there should be `kept` of them. A damaged bitmap may have more:
// 64 bytes after as many as the whole matrix has must be readable.
struct CacheTiles {
  const uint8_t* masks;  // null: dense
  const uint8_t* values;
  size_t kept;
  size_t strips, tiles;  // 16 columns, and 32 rows, each
};

// Blocks that a kernel takes at a time.
constexpr size_t kPackedBlocks = 8;

struct PackedBlock {
  CacheTiles keys, values;
  uint32_t first_key;
  uint32_t count;  // keys, 1 to kKeyBlock; beyond them the block holds zeros
};

struct PackedAttentionJob {
  AttentionJob rows;  // without keys and values
  const PackedBlock* blocks;
  size_t count;          // 1 to kPackedBlocks
  const uint8_t* ahead;  // what is read after this job, and may be asked for ahead of time; may be no bytes
  size_t ahead_bytes;
  uint8_t* scratch;
};

struct PackedAttentionKernel {
  const char* path;
  // Bytes of a job's scratch, aligned to 64, for so many rows at most.
  size_t (*scratch_bytes)(size_t rows, size_t key_size, size_t value_size);
  // Takes the blocks in their order. Returns their count, or which one is the first whose bitmaps do not have as many
  // bits as they should.
  size_t (*attend)(const PackedAttentionJob& job);
};

extern const PackedAttentionKernel kScalarPackedAttention;
extern const PackedAttentionKernel kAvx2PackedAttention;
extern const PackedAttentionKernel kAvx512PackedAttention;
extern const PackedAttentionKernel kAvx512Vbmi2PackedAttention;
extern const PackedAttentionKernel kAmxPackedAttention;

}  // namespace sparamx
