// Which instruction-set level to use: the only place that asks the CPU and reads SPARAMX_ISA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format/packed_format.h"
#include "kernels/kernel_table.h"

namespace sparamx {

// CpuFeature bits that the CPU has (CPUID) and the operating system saves (XCR0). Asked once per process.
uint64_t CpuFeatures();

// All levels of this library, lowest first.
const std::vector<const Level*>& Levels();

// The names of the features in `needed` that this CPU lacks, comma-separated; empty if it has all.
std::string MissingFeatures(uint64_t needed);

// `name` null or "auto": SPARAMX_ISA if set, else the highest level that the CPU runs. An unknown or unsupported name is an
// error that names it; no fallback.
Status ChooseLevel(const char* name, const Level** level);

// The kernel of a level, or, where the level has none for the combination, that of the next lower one that has. Null where
// no level has it.
const Kernel* FindKernel(const Level& level, WeightType type, Activations activations);

// One JSON document for `sparamx-onnx info`.
std::string CpuInfoJson();

}  // namespace sparamx
