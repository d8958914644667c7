// Which instruction-set level to use: the only place that asks the CPU and reads SPARAMX_ISA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "format/packed_format.h"
#include "kernels/kernel_table.h"

namespace sparamx {

// CpuFeature bits that the CPU has (CPUID), the operating system saves (XCR0) and, for AMX, permits. Asked once per
// process.
uint64_t CpuFeatures();

enum class Vendor { kIntel, kAmd, kOther };
Vendor CpuVendor();

// Logical CPUs that this process may use. Asked once per process.
size_t CpuCount();

// All levels of this library, lowest first.
const std::vector<const Level*>& Levels();

// The names of the features in `needed` that this CPU lacks, comma-separated; empty if it has all.
std::string MissingFeatures(uint64_t needed);

// `name` null or "auto": SPARAMX_ISA if set, else the highest level that the CPU runs. An unknown or unsupported name
// is an error that names it; no fallback. `forced` (may be null) tells whether somebody asked for the level.
Status ChooseLevel(const char* name, const Level** level, bool* forced = nullptr);

// What `name` null or "auto" falls back to before the CPU decides: SPARAMX_ISA, or null.
const char* ForcedLevel();

std::string CpuName();

// The names of all features that the CPU has.
std::vector<std::string> FeatureNames();

// Why the operating system refused AMX that the CPU has; empty where it did not.
const std::string& AmxRefusal();

}  // namespace sparamx
