// Y = epilogue(X W + bias) for a packed W: which kernel, how the work is split, where scratch lies. Y may be several
// outputs side by side. Knows no host: threads come as a callback, memory as pointers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "format/packed_format.h"
#include "kernels/kernel_table.h"

namespace sparamx {

// Runs body(user, i) once for every i in [0, count), in any order, from any threads, and returns when all are done.
struct ParallelFor {
  void (*run)(void* host, size_t count, void (*body)(void* user, size_t i), void* user);
  void* host;
};

// One of the outputs: the weights of its columns as a matrix of their own, and where they begin in the whole.
struct MatMulOutput {
  PackedView weights;
  size_t first_strip;
  Epilogue epilogue;

  size_t first_column() const { return first_strip * kStripColumns; }
};

// The numbers of X, bias and Y.
enum class Element : uint8_t { kFp32 = 0, kFp16 = 1 };

class MatMul {
 public:
  struct Options {
    Element element = Element::kFp32;
    // Columns of every output, N together; all but the last a multiple of 16. Empty: one output of N columns.
    std::vector<uint64_t> splits;
    std::vector<Epilogue> epilogues;  // one for every output, or one for all; empty: none
    bool default_activations = true;  // bf16 for bf16 weights, fp32 for fp32 weights
    Activations activations = Activations::kFp32;
    const char* isa = nullptr;       // a level's name; null: SPARAMX_ISA or the best
    const Kernel* kernel = nullptr;  // runs at every M, for measurements; null: the choice of choice.cc
  };

  // Checks the blob. The blob must outlive the object, unchanged.
  Status Init(const uint8_t* blob, uint64_t blob_size, const Options& options);

  // Bytes that Run needs for M rows; align them to 64.
  size_t ScratchBytes(size_t rows) const;

  // X[rows, K] and every output y[i][rows, columns(i)] are row-major; bias is null or N numbers. The result does not
  // depend on the number of threads.
  void Run(const void* x, size_t rows, const void* bias, void* const* y, void* scratch,
           const ParallelFor& parallel) const noexcept;

  const PackedView& weights() const { return weights_; }
  size_t outputs() const { return outputs_.size(); }
  size_t columns(size_t output) const { return outputs_[output].weights.n; }
  // The name of the kernel that runs for M = rows.
  const char* path(size_t rows) const { return KernelFor(rows).path; }

 private:
  struct Plan;
  Status SetOutputs(const Options& options);
  const Kernel& KernelFor(size_t rows) const;
  Plan PlanFor(size_t rows) const;
  void PlanX(Plan* plan) const;
  void PlanSplit(Plan* plan) const;
  void PlanScratch(Plan* plan) const;

  PackedView weights_ = {};
  const Level* level_ = nullptr;
  bool forced_level_ = false;
  const Kernel* kernel_ = nullptr;
  Activations activations_ = Activations::kFp32;
  Element element_ = Element::kFp32;
  std::vector<MatMulOutput> outputs_;
  // Where the work items of one row begin: in every call, looking for it would take a microsecond an item, as the
  // offsets that are looked at are in no cache.
  std::vector<size_t> item_starts_;
};

}  // namespace sparamx
