#include "runtime/huge_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace sparamx {
namespace {

constexpr size_t kHugePage = 2 * 1024 * 1024;

}  // namespace

Status HugePages::Wanted(bool* wanted) {
  const char* const variable = std::getenv("SPARAMX_HUGE_PAGES");
  const std::string value = variable == nullptr ? "" : variable;
  *wanted = value == "1";
  if (*wanted || value.empty() || value == "0") return {};
  return Status::Invalid("SPARAMX_HUGE_PAGES=" + value + " is neither 0 nor 1");
}

HugePages::~HugePages() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

bool HugePages::Copy(const void* bytes, size_t count) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (count < kHugePage || count > SIZE_MAX - 2 * kHugePage) return false;
  const size_t needed = RoundUp(count, page), reserved = needed + kHugePage;
  void* const base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return false;
  // Huge pages begin at multiples of their size: what lies before the first one and behind the copy goes back.
  auto* const first = static_cast<uint8_t*>(base);
  const size_t before = RoundUp(reinterpret_cast<uintptr_t>(base), kHugePage) - reinterpret_cast<uintptr_t>(base);
  if (before != 0) munmap(first, before);
  if (before + needed != reserved) munmap(first + before + needed, reserved - before - needed);
  data_ = first + before;
  mapped_ = needed;
  if (madvise(data_, mapped_, MADV_HUGEPAGE) != 0) {
    munmap(data_, mapped_);
    data_ = nullptr;
    return false;
  }
  std::memcpy(data_, bytes, count);
  return true;
}

}  // namespace sparamx
