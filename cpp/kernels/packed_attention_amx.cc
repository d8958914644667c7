// Attention over a packed cache with AMX: both products in TDPBF16PS, and yet as exact as in fp32, as queries are three
// bf16 numbers each (24 bits) and weights two or three. Keys and values are bf16 as they are.
//
// Up to 16 rows go through up to 8 blocks: first all keys, then softmax, then all values. Up to 5 rows (decode), the
// parts of their numbers are rows of one tile, so that a tile of keys takes one product; beyond, parts are tiles whose
// products are added up.
// Tiles (palette 1): keys: 0-3 sums (4 strips), 4 queries, 6 keys. Values: 0-1 sums, 2-5 weights (2 parts x 32 keys),
// 6-7 values; sums pass from block to block through memory.
// Per packed tile: expansion 16 x (kmovd + vpexpandw) = 48 cycles of port 5, two tiles ahead of the product, which
// takes 16 cycles on a unit of its own whatever its rows are, and two tile loads of 8 cycles. Softmax of 4 rows takes
// 170 cycles a block.
#include "kernels/amx_tiles.h"
#include "kernels/attention_softmax.h"
#include "kernels/expand_vbmi2.h"
#include "kernels/packed_attention_kernel.h"

namespace sparamx {
namespace {

constexpr size_t kTileDepth = TileK(WeightType::kBf16);
constexpr size_t kMostParts = 3;
constexpr size_t kStackedRows = kTileRows / kMostParts;
constexpr size_t kKeyStrips = kKeyBlock / kStripColumns;
constexpr size_t kVectors = kKeyBlock / kVecFloats;
constexpr size_t kScoreBytes = kKeyBlock * sizeof(float);  // a row of scores of a block
constexpr size_t kWeightBytes = kKeyBlock * 2;             // a row of weights of a block
constexpr size_t kAhead = 6;                               // tiles expanded ahead of their products
constexpr size_t kRing = 8;                                // their buffers
static_assert(kKeyStrips == 4 && kKeyBlock == 2 * kTileDepth, "the tile numbers are part of the instructions");

// Where the parts of a number are.
enum class Parts { kStacked, kTiles };

// How many parts weights have: where they cost nothing, as many as queries.
template <Parts P>
constexpr size_t kWeightParts = P == Parts::kStacked ? kMostParts : 2;

// Where things lie in a job's scratch.
struct Scratch {
  uint8_t* ring;
  uint8_t* queries;    // [part][row][key size in whole tiles] bf16
  size_t query_bytes;  // of a row
  float* products;     // two blocks of [part, row][kKeyBlock]
  float* scores;       // [block][row][kKeyBlock]
  uint8_t* weights;    // [block][part][row][kKeyBlock] bf16
  float* sums;         // [strip][part, row][16]
  size_t bytes;

  Scratch(uint8_t* base, size_t key_size, size_t value_size) : bytes(0) {
    const auto take = [&](size_t count) {
      uint8_t* const taken = base == nullptr ? nullptr : base + bytes;
      bytes += count;
      return taken;
    };
    query_bytes = CeilDiv(key_size, kTileDepth) * kTileRowBytes;
    ring = take(kRing * kTileBytes);
    queries = take(kMostParts * kTileRows * query_bytes);
    products = reinterpret_cast<float*>(take(2 * kTileRows * kScoreBytes));
    scores = reinterpret_cast<float*>(take(kPackedBlocks * kTileRows * kScoreBytes));
    weights = take(kPackedBlocks * 2 * kTileRows * kWeightBytes);
    sums = reinterpret_cast<float*>(take(CeilDiv(value_size, kStripColumns) * kTileBytes));
  }
};

size_t ScratchBytes(size_t, size_t key_size, size_t value_size) {
  return Scratch(nullptr, key_size, value_size).bytes;
}

// Bytes that lie ahead.
struct Region {
  const uint8_t* first;
  size_t lines;
};

Region RegionOf(const CacheTiles& tiles) {
  const uint8_t* const first = tiles.masks != nullptr ? tiles.masks : tiles.values;
  const size_t stored = tiles.masks != nullptr ? 2 * tiles.kept : tiles.strips * tiles.tiles * kTileBytes;
  return {first, CeilDiv(static_cast<size_t>(tiles.values - first) + stored, 64)};
}

SPARAMX_INLINE void AskFor(const uint8_t* p, size_t lines) {
  for (size_t i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(p + 64 * i), _MM_HINT_T1);
}

// The tiles of several blocks, one after the other, expanded a little ahead of their use. What the next block holds is
// asked for on the way: streams without a stride are too much for the hardware's prefetchers.
class BlockStream {
 public:
  BlockStream(const PackedBlock* blocks, size_t count, CacheTiles PackedBlock::*part, const CacheTiles* next,
              uint8_t* ring)
      : blocks_(blocks), count_(count), part_(part), next_(next), ring_(ring), damaged_(count) {
    for (size_t i = 0; i < kAhead; ++i) Advance();
  }

  SPARAMX_INLINE const uint8_t* Take() {
    Advance();
    Barrier();
    return places_[taken_++ % kRing];
  }

  // The first damaged block among those whose tiles have all been taken.
  size_t damaged() const { return damaged_; }

 private:
  void Begin() {
    const CacheTiles& from = blocks_[block_].*part_;
    cursor_ = {from.masks, from.values};
    left_ = from.strips * from.tiles;
    const CacheTiles* next = block_ + 1 < count_ ? &(blocks_[block_ + 1].*part_) : next_;
    region_ = next != nullptr ? RegionOf(*next) : Region{};
    lines_ = CeilDiv(region_.lines, left_);
  }

  __attribute__((noinline)) void Advance() {
    if (block_ == count_) return;
    if (left_ == 0) Begin();
    uint8_t* const buffer = ring_ + made_ % kRing * kTileBytes;
    const uint8_t** const place = places_ + made_++ % kRing;
    *place = cursor_.masks != nullptr ? buffer : cursor_.values;
    if (cursor_.masks != nullptr)
      ExpandWords<true>(&cursor_, buffer);
    else
      cursor_.values += kTileBytes;
    AskFor(region_.first, lines_);
    region_.first += 64 * lines_;
    if (--left_ != 0) return;
    const CacheTiles& from = blocks_[block_].*part_;
    const bool whole = from.masks == nullptr || cursor_.values == from.values + 2 * from.kept;
    if (!whole && block_ < damaged_) damaged_ = block_;
    ++block_;
  }

  const PackedBlock* blocks_;
  size_t count_;
  CacheTiles PackedBlock::*part_;
  const CacheTiles* next_;
  uint8_t* ring_;
  size_t damaged_;
  Cursor cursor_ = {};
  size_t block_ = 0, left_ = 0, made_ = 0, taken_ = 0;
  Region region_ = {};
  size_t lines_ = 0;
  const uint8_t* places_[kRing] = {};
};

// Sixteen numbers as bf16, and what they leave.
SPARAMX_INLINE __m256i TakePart(__m512* x) {
  const __m256i part = (__m256i)_mm512_cvtneps_pbh(*x);
  *x = _mm512_sub_ps(*x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
  return part;
}

template <size_t Count>
SPARAMX_INLINE void StoreParts(__m512 x, uint8_t* out, size_t apart) {
#pragma GCC unroll 3
  for (size_t part = 0; part < Count; ++part)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + part * apart), TakePart(&x));
}

// The rows [first, first + rows).
void SplitQueries(const AttentionJob& job, size_t first, size_t rows, const Scratch& s) {
  for (size_t r = 0; r < rows; ++r) {
    const float* const q = job.q + (first + r) * job.q_stride;
    for (size_t i = 0; i < s.query_bytes / 2; i += 16) {
      const size_t there = i >= job.key_size ? 0 : Smaller(16, job.key_size - i);
      const auto mask = static_cast<__mmask16>((1u << there) - 1);
      StoreParts<kMostParts>(_mm512_maskz_loadu_ps(mask, q + (there != 0 ? i : 0)),
                             s.queries + r * s.query_bytes + 2 * i, rows * s.query_bytes);
    }
  }
}

// Sixteen columns of a row: the sum of its parts, which lie `apart` floats from each other.
template <Parts P>
SPARAMX_INLINE __m512 Whole(const float* p, size_t apart) {
  if (P == Parts::kTiles) return _mm512_load_ps(p);
  return _mm512_add_ps(_mm512_load_ps(p), _mm512_add_ps(_mm512_load_ps(p + apart), _mm512_load_ps(p + 2 * apart)));
}

// From products to scores, and the largest of each row so far, lane by lane.
template <Parts P>
SPARAMX_INLINE void Score(AttentionJob job, const PackedBlock& block, size_t first, size_t rows, const float* products,
                          float* scores, Lanes* top) {
  job.first_key = block.first_key;
  job.keys = block.count;
  for (size_t r = 0; r < rows; ++r) {
    Lanes x[kVectors];
    for (size_t n = 0; n < kVectors; ++n)
      x[n] = (Lanes)Whole<P>(products + r * kKeyBlock + n * kVecFloats, rows * kKeyBlock);
    FinishScores(job, first + r, x, kVectors);
    for (size_t n = 0; n < kVectors; ++n) top[r] = x[n] > top[r] ? x[n] : top[r];
    __builtin_memcpy(scores + r * kKeyBlock, x, sizeof x);
  }
}

// Strip `Sum` of a block of keys.
#define SPARAMX_KEY_STRIP(Sum)                                                                       \
  _tile_zero(Sum);                                                                                   \
  for (size_t tile = 0; tile < tiles; ++tile) {                                                      \
    const uint8_t* const k = stream.Take();                                                          \
    _tile_loadd(6, k, 64);                                                                           \
    for (size_t part = 0; part < parts; ++part) {                                                    \
      _tile_loadd(4, s.queries + part * rows * s.query_bytes + tile * kTileRowBytes, s.query_bytes); \
      _tile_dpbf16ps(Sum, 4, 6);                                                                     \
    }                                                                                                \
  }                                                                                                  \
  _tile_stored(Sum, reinterpret_cast<uint8_t*>(products) + Sum * 64, kScoreBytes)

// Scores of all blocks. Those of a block are finished when the next one's products are on their way.
template <Parts P>
size_t MultiplyKeys(const PackedAttentionJob& job, size_t first, size_t rows, const Scratch& s, Lanes* top) {
  const size_t tiles = job.blocks[0].keys.tiles, parts = P == Parts::kStacked ? 1 : kMostParts;
  BlockStream stream(job.blocks, job.count, &PackedBlock::keys, &job.blocks[0].values, s.ring);
  const auto score = [&](size_t b) __attribute__((always_inline)) {
    Score<P>(job.rows, job.blocks[b], first, rows, s.products + b % 2 * kTileRows * kKeyBlock,
             s.scores + b * kTileRows * kKeyBlock, top);
  };
  for (size_t b = 0; b < job.count; ++b) {
    float* const products = s.products + b % 2 * kTileRows * kKeyBlock;
    SPARAMX_KEY_STRIP(0);
    SPARAMX_KEY_STRIP(1);
    SPARAMX_KEY_STRIP(2);
    SPARAMX_KEY_STRIP(3);
    Barrier();
    if (b > 0) score(b - 1);
  }
  score(job.count - 1);
  return stream.damaged();
}
#undef SPARAMX_KEY_STRIP

// From the scores of all blocks to weights; the factors for what was summed before.
template <Parts P>
void Softmax(const PackedAttentionJob& packed, size_t first, size_t rows, const Scratch& s, const Lanes* top,
             float* factors) {
  const AttentionJob& job = packed.rows;
  for (size_t r = 0; r < rows; ++r) {
    float base;
    factors[r] = RaiseLargest(job, first + r, top[r], &base);
    Lanes shift, total = {};
    Splat(base, &shift);
    for (size_t b = 0; b < packed.count; ++b)
      for (size_t n = 0; n < kVectors; ++n) {
        Lanes x;
        __builtin_memcpy(&x, s.scores + (b * kTileRows + r) * kKeyBlock + n * kVecFloats, sizeof x);
        x -= shift;
        ExpOrZero(&x);
        total += x;
        StoreParts<kWeightParts<P>>((__m512)x, s.weights + (b * 2 * kTileRows + r) * kWeightBytes + 32 * n,
                                    rows * kWeightBytes);
      }
    job.denominator[first + r] = job.denominator[first + r] * factors[r] + Sum(total);
  }
}

// A strip of values into the sums of its own.
#define SPARAMX_VALUE_STRIP(Sum, strip)                                            \
  do {                                                                             \
    uint8_t* const sums = reinterpret_cast<uint8_t*>(s.sums) + (strip)*kTileBytes; \
    const uint8_t* const low = stream.Take();                                      \
    const uint8_t* const high = stream.Take();                                     \
    if (b == 0)                                                                    \
      _tile_zero(Sum);                                                             \
    else                                                                           \
      _tile_loadd(Sum, sums, 64);                                                  \
    _tile_loadd(6, low, 64);                                                       \
    _tile_dpbf16ps(Sum, 4, 6);                                                     \
    _tile_loadd(7, high, 64);                                                      \
    _tile_dpbf16ps(Sum, 5, 7);                                                     \
    if (P == Parts::kTiles) {                                                      \
      _tile_dpbf16ps(Sum, 2, 6);                                                   \
      _tile_dpbf16ps(Sum, 3, 7);                                                   \
    }                                                                              \
    _tile_stored(Sum, sums, 64);                                                   \
  } while (false)

template <Parts P>
size_t MultiplyValues(const PackedAttentionJob& job, size_t rows, const Scratch& s) {
  const size_t strips = job.blocks[0].values.strips;
  BlockStream stream(job.blocks, job.count, &PackedBlock::values, job.next == nullptr ? nullptr : &job.next->keys,
                     s.ring);
  for (size_t b = 0; b < job.count; ++b) {
    const uint8_t* const weights = s.weights + b * 2 * kTileRows * kWeightBytes;
    _tile_loadd(4, weights, kWeightBytes);
    _tile_loadd(5, weights + 64, kWeightBytes);
    if (P == Parts::kTiles) {
      _tile_loadd(2, weights + rows * kWeightBytes, kWeightBytes);
      _tile_loadd(3, weights + rows * kWeightBytes + 64, kWeightBytes);
    }
    size_t strip = 0;
    for (; strip + 2 <= strips; strip += 2) {
      SPARAMX_VALUE_STRIP(0, strip);
      SPARAMX_VALUE_STRIP(1, strip + 1);
    }
    if (strip < strips) SPARAMX_VALUE_STRIP(0, strip);
  }
  Barrier();
  return stream.damaged();
}
#undef SPARAMX_VALUE_STRIP

template <Parts P>
void AddSums(const AttentionJob& job, size_t first, size_t rows, const Scratch& s, const float* factors) {
  for (size_t r = 0; r < rows; ++r) {
    float* const sums = job.sums + (first + r) * job.sums_stride;
    const __m512 factor = _mm512_set1_ps(factors[r]);
    for (size_t i = 0; i < job.value_size; i += kStripColumns) {
      const auto mask = static_cast<__mmask16>((1u << Smaller(16, job.value_size - i)) - 1);
      const __m512 product = Whole<P>(s.sums + (i / kStripColumns * kTileRows + r) * 16, rows * 16);
      _mm512_mask_storeu_ps(sums + i, mask, _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, sums + i), factor, product));
    }
  }
}

// The rows [first, first + rows) through all blocks.
template <Parts P>
size_t AttendRows(const PackedAttentionJob& job, size_t first, size_t rows, const Scratch& s) {
  Lanes top[kTileRows];
  for (Lanes& t : top) Splat(kMinusInfinity, &t);
  float factors[kTileRows];
  const size_t tile_rows = P == Parts::kStacked ? kMostParts * rows : rows;
  SplitQueries(job.rows, first, rows, s);
  const TileScope scope(tile_rows, tile_rows);
  const size_t sound_keys = MultiplyKeys<P>(job, first, rows, s, top);
  if (sound_keys < job.count) return sound_keys;
  Softmax<P>(job, first, rows, s, top, factors);
  const size_t sound_values = MultiplyValues<P>(job, rows, s);
  if (sound_values < job.count) return sound_values;
  AddSums<P>(job.rows, first, rows, s, factors);
  return job.count;
}

size_t AttendAmx(const PackedAttentionJob& job) {
  const Region region = RegionOf(job.blocks[0].keys);
  AskFor(region.first, region.lines);
  const Scratch s(job.scratch, job.rows.key_size, job.rows.value_size);
  if (job.rows.rows <= kStackedRows) return AttendRows<Parts::kStacked>(job, 0, job.rows.rows, s);
  size_t sound = job.count;
  for (size_t r = 0; r < job.rows.rows && sound == job.count; r += kTileRows)
    sound = AttendRows<Parts::kTiles>(job, r, Smaller(kTileRows, job.rows.rows - r), s);
  return sound;
}

}  // namespace

const PackedAttentionKernel kAmxPackedAttention = {"amx", ScratchBytes, AttendAmx};

}  // namespace sparamx
