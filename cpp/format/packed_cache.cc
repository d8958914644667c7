#include "format/packed_cache.h"

#include <cmath>
#include <cstring>

#include "format/number.h"

namespace sparamx {
namespace {

constexpr char kMagic[8] = {'S', 'P', 'A', 'R', 'A', 'M', 'X', 'C'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 64;
constexpr size_t kTileWords = TileWeights(WeightType::kBf16);
constexpr size_t kTileDepth = TileK(WeightType::kBf16);
constexpr size_t kMostTokens = size_t{1} << 24;  // of sink and recent: no offset overflows
constexpr size_t kFields = 7;                    // numbers of 32 bits between version and tokens

// Pruned numbers are counted to the nearest whole one.
size_t Kept(size_t numbers, float sparsity) {
  return numbers - static_cast<size_t>(std::floor(static_cast<double>(numbers) * sparsity + 0.5));
}

// Word (k, n) of a matrix in bf16 tiles that has `tiles` of them along K.
size_t WordAt(size_t k, size_t n, size_t tiles) {
  const size_t tile = n / kStripColumns * tiles + k / kTileDepth;
  return tile * kTileWords + k % kTileDepth / 2 * 32 + n % kStripColumns * 2 + k % 2;
}

struct HeaderField {
  const char* name;
  uint32_t value;
};

// What the header of every row says, in its order after the version.
void FieldsOf(const CacheLayout& l, HeaderField (&fields)[kFields]) {
  const HeaderField all[kFields] = {
      {"tokens in a block", static_cast<uint32_t>(kCacheBlock)},
      {"numbers in a key", static_cast<uint32_t>(l.key_size)},
      {"numbers in a value", static_cast<uint32_t>(l.value_size)},
      {"numbers kept of a block of keys", static_cast<uint32_t>(l.key_kept)},
      {"numbers kept of a block of values", static_cast<uint32_t>(l.value_kept)},
      {"blocks of sink tokens", static_cast<uint32_t>(l.sink_blocks)},
      {"recent tokens", static_cast<uint32_t>(l.recent)},
  };
  std::memcpy(fields, all, sizeof all);
}

uint16_t LoadWord(const uint8_t* words, size_t i) {
  uint16_t word;
  std::memcpy(&word, words + 2 * i, sizeof word);
  return word;
}

uint16_t Magnitude(uint16_t word) {
  return static_cast<uint16_t>(word & 0x7fffu);
}

// How many words have at least this magnitude.
size_t CountFrom(const uint8_t* words, size_t count, int16_t magnitude) {
  size_t total = 0;
  // Counts of 16 bits, so that the compiler's vectors hold as many as there are words.
  constexpr size_t kRun = 4096;
  for (size_t first = 0; first < count; first += kRun) {
    const size_t last = first + kRun < count ? first + kRun : count;
    uint16_t counted = 0;
    for (size_t i = first; i < last; ++i)
      counted = static_cast<uint16_t>(counted + (static_cast<int16_t>(Magnitude(LoadWord(words, i))) >= magnitude));
    total += counted;
  }
  return total;
}

// The largest magnitude that at least `kept` words have; 2^15 - 1, as large as any, where none is kept.
uint16_t Threshold(const uint8_t* words, size_t count, size_t kept) {
  uint16_t threshold = 0;
  for (int bit = 14; bit >= 0; --bit) {
    const auto candidate = static_cast<uint16_t>(threshold | 1u << bit);
    if (CountFrom(words, count, static_cast<int16_t>(candidate)) >= kept) threshold = candidate;
  }
  return threshold;
}

// Keeps exactly `kept` of the words (whole tiles), and a bit for each in the bitmap.
void PackWords(const uint8_t* words, size_t count, size_t kept, uint8_t* masks, uint8_t* values) {
  const uint16_t threshold = Threshold(words, count, kept);
  const size_t above = threshold < 0x7fff ? CountFrom(words, count, static_cast<int16_t>(threshold + 1)) : 0;
  size_t ties = kept - above, next = 0;
  for (size_t first = 0; first < count; first += 32) {
    uint16_t chosen[33];  // one more than is kept is written
    uint32_t mask = 0;
    size_t n = 0;
    for (size_t i = 0; i < 32; ++i) {
      const uint16_t word = LoadWord(words, first + i), magnitude = Magnitude(word);
      const bool tie = magnitude == threshold && ties > 0;
      const bool keep = magnitude > threshold || tie;
      ties -= tie;
      chosen[n] = word;
      n += keep;
      mask |= static_cast<uint32_t>(keep) << i;
    }
    std::memcpy(masks + first / 8, &mask, sizeof mask);
    std::memcpy(values + 2 * next, chosen, 2 * n);
    next += n;
  }
  std::memset(values + 2 * kept, 0, RoundUp(2 * kept, kSectionAlignment) - 2 * kept);
}

}  // namespace

Status CheckCacheOptions(const CacheOptions& options) {
  for (const float sparsity : {options.key_sparsity, options.value_sparsity})
    if (!(sparsity >= 0.0f && sparsity < 1.0f)) return Status::Invalid("the sparsity of a cache is from 0 to below 1");
  if (options.sink > kMostTokens || options.recent > kMostTokens)
    return Status::Invalid("sink and recent are from 0 to " + std::to_string(kMostTokens) + " tokens");
  return {};
}

CacheLayout::CacheLayout(const CacheOptions& options, size_t size_of_key, size_t size_of_value)
    : key_size(size_of_key), value_size(size_of_value) {
  key_words = kCacheBlock * RoundUp(key_size, kTileDepth);
  value_words = kCacheBlock * RoundUp(value_size, kStripColumns);
  key_kept = Kept(kCacheBlock * key_size, options.key_sparsity);
  value_kept = Kept(kCacheBlock * value_size, options.value_sparsity);
  keys_sparse = key_kept < kCacheBlock * key_size;
  values_sparse = value_kept < kCacheBlock * value_size;
  sink_blocks = CeilDiv(options.sink, kCacheBlock);
  recent = options.recent;
  tail_blocks = CeilDiv(recent + kCacheBlock - 1, kCacheBlock);
  value_masks_at = keys_sparse ? RoundUp(key_words / 8, kSectionAlignment) : 0;
  key_values_at = value_masks_at + (values_sparse ? RoundUp(value_words / 8, kSectionAlignment) : 0);
  value_values_at = key_values_at + RoundUp(2 * (keys_sparse ? key_kept : key_words), kSectionAlignment);
  packed_bytes = value_values_at + RoundUp(2 * (values_sparse ? value_kept : value_words), kSectionAlignment);
  dense_bytes = 2 * (key_words + value_words);
}

size_t CacheLayout::PackedBlocks(size_t tokens) const {
  const size_t closed = ClosedBlocks(tokens);
  return closed < sink_blocks ? 0 : closed - sink_blocks;
}

size_t CacheLayout::RowBytes(size_t packed_blocks) const {
  return kHeaderBytes + packed_blocks * packed_bytes + (sink_blocks + tail_blocks) * dense_bytes;
}

bool CacheLayout::BlocksOfRow(size_t row_bytes, size_t* packed_blocks) const {
  const size_t least = RowBytes(0);
  if (row_bytes < least) return false;
  *packed_blocks = packed_bytes == 0 ? 0 : (row_bytes - least) / packed_bytes;
  return RowBytes(*packed_blocks) == row_bytes;
}

size_t CacheLayout::Capacity(size_t packed_blocks) const {
  return (sink_blocks + packed_blocks + 1) * kCacheBlock + recent - 1;
}

size_t CacheLayout::PackedAt(size_t block) const {
  return kHeaderBytes + (block - sink_blocks) * packed_bytes;
}

size_t CacheLayout::DenseAt(size_t block, size_t packed_blocks) const {
  const size_t place = block < sink_blocks ? block : sink_blocks + block % tail_blocks;
  return kHeaderBytes + packed_blocks * packed_bytes + place * dense_bytes;
}

size_t CacheLayout::KeyWord(size_t token, size_t i) const {
  return WordAt(i, token, CeilDiv(key_size, kTileDepth));
}

size_t CacheLayout::ValueWord(size_t token, size_t i) const {
  return key_words + WordAt(token, i, kCacheBlock / kTileDepth);
}

Status ReadCacheHeader(const CacheLayout& layout, const uint8_t* row, size_t packed_blocks, size_t* tokens) {
  static constexpr uint8_t kEmpty[kHeaderBytes] = {};
  *tokens = 0;
  if (std::memcmp(row, kEmpty, sizeof kEmpty) == 0) return {};
  if (std::memcmp(row, kMagic, sizeof kMagic) != 0) return Status::Damaged("it is not a packed cache");
  uint32_t version = 0;
  std::memcpy(&version, row + 8, sizeof version);
  if (version != kVersion)
    return Status::Unsupported("its format version is " + std::to_string(version) + ", this library knows " +
                               std::to_string(kVersion));
  HeaderField fields[kFields];
  FieldsOf(layout, fields);
  for (size_t i = 0; i < kFields; ++i) {
    uint32_t value = 0;
    std::memcpy(&value, row + 12 + 4 * i, sizeof value);
    if (value != fields[i].value)
      return Status::Damaged("its " + std::string(fields[i].name) + " are " + std::to_string(value) +
                             ", but the node's are " + std::to_string(fields[i].value));
  }
  uint64_t count = 0;
  std::memcpy(&count, row + 40, sizeof count);
  if (std::memcmp(row + 48, kEmpty, kHeaderBytes - 48) != 0)
    return Status::Damaged("the reserved bytes of its header are not zero");
  if (count > layout.Capacity(packed_blocks))
    return Status::Damaged("it says that it holds " + std::to_string(count) + " tokens, but has room for " +
                           std::to_string(layout.Capacity(packed_blocks)));
  *tokens = static_cast<size_t>(count);
  return {};
}

void WriteCacheHeader(const CacheLayout& layout, size_t tokens, uint8_t* row) {
  std::memset(row, 0, kHeaderBytes);
  std::memcpy(row, kMagic, sizeof kMagic);
  std::memcpy(row + 8, &kVersion, sizeof kVersion);
  HeaderField fields[kFields];
  FieldsOf(layout, fields);
  for (size_t i = 0; i < kFields; ++i) std::memcpy(row + 12 + 4 * i, &fields[i].value, sizeof fields[i].value);
  const uint64_t count = tokens;
  std::memcpy(row + 40, &count, sizeof count);
}

void WriteCacheToken(const CacheLayout& layout, const float* key, const float* value, size_t token, uint8_t* dense) {
  for (size_t i = 0; i < layout.key_size; ++i) {
    const uint16_t word = Bf16FromFloat(key[i]);
    std::memcpy(dense + 2 * layout.KeyWord(token, i), &word, sizeof word);
  }
  for (size_t i = 0; i < layout.value_size; ++i) {
    const uint16_t word = Bf16FromFloat(value[i]);
    std::memcpy(dense + 2 * layout.ValueWord(token, i), &word, sizeof word);
  }
}

void CopyCacheTokens(const CacheLayout& layout, const uint8_t* from, size_t first, size_t last, uint8_t* dense) {
  for (size_t token = first; token < last; ++token) {
    for (size_t i = 0; i < layout.key_size; ++i)
      std::memcpy(dense + 2 * layout.KeyWord(token, i), from + 2 * layout.KeyWord(token, i), 2);
    for (size_t i = 0; i < layout.value_size; ++i)
      std::memcpy(dense + 2 * layout.ValueWord(token, i), from + 2 * layout.ValueWord(token, i), 2);
  }
}

void ZeroCacheTokens(const CacheLayout& layout, size_t first, size_t last, uint8_t* dense) {
  for (size_t token = first; token < last; ++token) {
    for (size_t i = 0; i < layout.key_size; ++i) std::memset(dense + 2 * layout.KeyWord(token, i), 0, 2);
    for (size_t i = 0; i < layout.value_size; ++i) std::memset(dense + 2 * layout.ValueWord(token, i), 0, 2);
  }
}

void PackCacheBlock(const CacheLayout& layout, const uint8_t* dense, uint8_t* packed) {
  const uint8_t* const values = dense + 2 * layout.key_words;
  if (layout.keys_sparse)
    PackWords(dense, layout.key_words, layout.key_kept, packed, packed + layout.key_values_at);
  else
    std::memcpy(packed + layout.key_values_at, dense, 2 * layout.key_words);
  if (layout.values_sparse)
    PackWords(values, layout.value_words, layout.value_kept, packed + layout.value_masks_at,
              packed + layout.value_values_at);
  else
    std::memcpy(packed + layout.value_values_at, values, 2 * layout.value_words);
}

}  // namespace sparamx
