// Attention over a cache of keys and values that lives in tensors of the host: which keys each query sees, how the work
// is split, where new keys go. Knows no host: threads come as a callback, memory as pointers. docs/attention.md says
// what is computed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/packed_cache.h"
#include "kernels/attention_kernel.h"
#include "kernels/packed_attention_kernel.h"
#include "runtime/cache_row.h"
#include "runtime/matmul.h"

namespace sparamx {

// Where the numbers of a head of a token stand in a tensor: floats from one to the next.
struct TokenStrides {
  size_t entry = 0, token = 0, head = 0;
  size_t At(size_t e, size_t t, size_t h) const { return e * entry + t * token + h * head; }
};

// What is added to scores: a row of `keys` numbers for each query of each head. A stride of 0 stands for all.
struct ScoreBias {
  const float* data = nullptr;  // null: none
  TokenStrides strides;
  size_t keys = 0;  // those beyond are hidden
};

// What one run is asked. Caches are row-major.
struct AttentionCall {
  size_t batch = 0;
  size_t queries = 0;   // tokens of the query
  size_t new_keys = 0;  // tokens of the key and the value
  size_t key_size = 0;  // numbers of a head of the query and the key
  size_t value_size = 0;
  const float *query = nullptr, *key = nullptr, *value = nullptr;
  TokenStrides query_strides, key_strides, value_strides, output_strides;

  // [batch][kv_heads][capacity][size]; null: none. Past and present may be the same memory.
  const float *past_key = nullptr, *past_value = nullptr;
  size_t past_capacity = 0;
  float *present_key = nullptr, *present_value = nullptr;
  size_t capacity = 0;

  // A packed cache in place of the six above, but for past_capacity: [batch][kv_heads] rows, which have room for so
  // many packed blocks. Past and present may be the same memory.
  CacheLayout layout = {};
  const uint8_t* past_cache = nullptr;
  size_t past_blocks = 0;
  uint8_t* present_cache = nullptr;
  size_t present_blocks = 0;

  const int32_t* last_keys = nullptr;  // [batch], the number of an entry's last key; null: all entries have all keys
  size_t total = 0;                    // keys of the longest entry, past and new
  // [batch], keys of each entry where the call's keys are a whole cache, the queries' own the last of them. No past
  // then.
  const int64_t* valid_keys = nullptr;

  const float *cos = nullptr, *sin = nullptr;  // [rotary_positions][rotary_half]; null: no rotation
  size_t rotary_positions = 0, rotary_half = 0;
  const int64_t* positions = nullptr;  // [batch][queries]; null: as many as keys before the token

  ScoreBias bias, mask;
  const float* sink = nullptr;  // [heads]: a score that every query of the head sees, and that has no value

  float* output = nullptr;
};

class Attention {
 public:
  struct Options {
    size_t heads = 0, kv_heads = 0;
    float scale = 0.0f;    // 0: one over the root of key_size
    float softcap = 0.0f;  // 0: none
    int64_t window = -1;   // keys that a query sees, itself included; -1: all before it
    bool causal = true;
    bool interleaved = false;   // rotary pairs stand side by side, not half a head apart
    bool smooth = false;        // a sink of score zero for every head
    bool packed = false;        // the cache is packed
    CacheOptions cache;         // how
    const char* isa = nullptr;  // a level's name; null: SPARAMX_ISA or the best
  };

  Status Init(const Options& options);

  // Whether the values (lengths, positions) of the call fit its shapes. Shapes are the caller's to check.
  Status Check(const AttentionCall& call) const;

  // Bytes that Run needs for a checked call; align them to 64.
  size_t ScratchBytes(const AttentionCall& call) const;

  // The result does not depend on the number of threads. A packed cache may turn out to be damaged: then nothing has
  // been written to a present cache that is the past one, too.
  Status Run(const AttentionCall& call, void* scratch, const ParallelFor& parallel) const noexcept;

  const char* path() const { return options_.packed ? packed_kernel_->path : kernel_->path; }

 private:
  struct Plan;
  struct Task;
  Plan PlanFor(const AttentionCall& call) const;
  Status CheckPast(const AttentionCall& call, size_t entry, size_t past) const;

  Options options_;
  const AttentionKernel* kernel_ = nullptr;
  const PackedAttentionKernel* packed_kernel_ = nullptr;
};

}  // namespace sparamx
