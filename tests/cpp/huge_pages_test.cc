// Copies in huge pages: what is copied, where it lies, and who asks for it.
#include "runtime/huge_pages.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace sparamx {
namespace {

constexpr size_t kHugePage = 2 * 1024 * 1024;

TEST(HugePages, TheCopyIsTheSame) {
  std::vector<uint8_t> bytes(3 * kHugePage + 12345);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
  for (size_t count : {kHugePage, kHugePage + 1, bytes.size()}) {
    HugePages copy;
    ASSERT_TRUE(copy.Copy(bytes.data(), count)) << count;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(copy.data()) % kHugePage, 0u);
    EXPECT_EQ(std::memcmp(copy.data(), bytes.data(), count), 0) << count;
  }
}

TEST(HugePages, LessThanAPageIsNotCopied) {
  const std::vector<uint8_t> bytes(kHugePage - 1);
  HugePages copy;
  EXPECT_FALSE(copy.Copy(bytes.data(), bytes.size()));
  EXPECT_EQ(copy.data(), nullptr);
  EXPECT_FALSE(copy.Copy(bytes.data(), SIZE_MAX));  // more than there can be
}

TEST(HugePages, TheEnvironmentAsksForThem) {
  bool wanted = true;
  unsetenv("SPARAMX_HUGE_PAGES");
  EXPECT_TRUE(HugePages::Wanted(&wanted).ok());
  EXPECT_FALSE(wanted);
  for (const char* value : {"", "0", "1"}) {
    setenv("SPARAMX_HUGE_PAGES", value, 1);
    EXPECT_TRUE(HugePages::Wanted(&wanted).ok()) << value;
    EXPECT_EQ(wanted, *value == '1') << value;
  }
  setenv("SPARAMX_HUGE_PAGES", "yes", 1);
  EXPECT_EQ(HugePages::Wanted(&wanted).message, "SPARAMX_HUGE_PAGES=yes is neither 0 nor 1");
  unsetenv("SPARAMX_HUGE_PAGES");
}

}  // namespace
}  // namespace sparamx
