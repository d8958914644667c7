// What an instruction-set level offers to attention. The rules of kernel_table.h hold: plain data, no templates of the
// standard library.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sparamx {

// Keys that a kernel takes at a time: four vectors of 16 scores.
constexpr size_t kKeyBlock = 64;
// Rows that it takes at a time: enough to pay for turning a block of keys over.
constexpr size_t kRowBlock = 96;

// The keys [first, last) that a row may see.
struct VisibleKeys {
  uint32_t first, last;
};

// Some rows (queries of the heads that share a key and value head) against at most kKeyBlock keys. The state of the
// running softmax (max, denominator, sums) goes from one call to the next.
struct AttentionJob {
  const float* q;  // [rows][q_stride], scaled
  size_t q_stride;
  size_t rows;      // 1 to kRowBlock
  size_t key_size;  // numbers of a query and of a key
  size_t value_size;
  const float* k;  // key t of the call stands at k + t * k_stride; null: `turned` holds the keys already
  const float* v;
  size_t k_stride, v_stride;       // floats
  const float *ahead_k, *ahead_v;  // what is read next, one number after the other: asked for early; null: nothing
  uint32_t first_key;              // the number of key 0 of the call, as `visible` and the biases count
  size_t keys;                     // 1 to kKeyBlock
  const VisibleKeys* visible;
  float softcap;             // 0: none
  const float* const* bias;  // per row, indexed by key number; null: none
  const float* const* mask;  // likewise, added after it
  float* max;                // [rows], minus infinity at first
  float* denominator;        // [rows], zero at first
  float* sums;               // [rows][sums_stride], zeros at first
  size_t sums_stride;
  float* turned;  // scratch: [key_size][kKeyBlock], columns without a key zeros up to whole vectors
  float* scores;  // scratch: [rows][kKeyBlock]
};

struct AttentionKernel {
  const char* path;
  void (*attend)(const AttentionJob& job);
};

extern const AttentionKernel kScalarAttention;
extern const AttentionKernel kAvx2Attention;
extern const AttentionKernel kAvx512Attention;

}  // namespace sparamx
