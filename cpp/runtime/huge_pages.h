// A copy of packed weights in huge pages, which SPARAMX_HUGE_PAGES=1 asks for. The pages of a mapped file are small on
// most file systems, and looking up where they lie costs a part of the memory's speed; a copy does without, but takes
// its memory in every process.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/packed_format.h"

namespace sparamx {

class HugePages {
 public:
  // 1 asks for copies; 0, nothing or no such variable does not. Anything else is an error.
  static Status Wanted(bool* wanted);

  HugePages() = default;
  ~HugePages();
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;

  // False if the bytes do not fill a huge page or the system has none to give: the original must do then. Once at most.
  bool Copy(const void* bytes, size_t count);
  const uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t mapped_ = 0;  // bytes
};

}  // namespace sparamx
