// Which kernel for which weight type and M: the one table of that choice.
#pragma once

#include <cstddef>
#include <string>

#include "kernels/kernel_table.h"

namespace sparamx {

// What X is rounded to unless somebody asks otherwise: fp32 for fp32 weights, bf16 for bf16, int8 for int8 and int4.
Activations DefaultActivations(WeightType type);

// Whether these activations may be asked for: on every CPU the same, whatever kernels a level has beside.
bool GoesWith(WeightType type, Activations activations);

// The kernel of a level, or, where the level has none for the combination, that of the next lower one that has. Null
// where no level has it.
const Kernel* FindKernel(const Level& level, WeightType type, Activations activations);

// The kernel for M = rows: by the table, or, where somebody forced the level, that level's own (FindKernel).
const Kernel* ChooseKernel(const Level& level, bool forced, WeightType type, Activations activations, size_t rows);

// The attention kernel of a level, or that of the next lower one that has its own.
const AttentionKernel& ChooseAttention(const Level& level);
const PackedAttentionKernel& ChoosePackedAttention(const Level& level);

// One JSON document for `sparamx-onnx info`: CPU, features, levels with reasons, the choice per weight type and M, and
// the kernels of attention.
std::string CpuInfoJson();

}  // namespace sparamx
