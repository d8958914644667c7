// Attention over a packed cache with AMX: both products in TDPBF16PS, and yet as exact as in fp32, as queries are three
// bf16 numbers each (24 bits) and weights two or three. Keys and values are bf16 as they are.
//
// Up to 16 rows go through up to 8 blocks: first all keys, then softmax, then all values. Up to 5 rows (decode), the
// parts of their numbers are rows of one tile, so that a tile of keys takes one product; beyond, parts are tiles whose
// products are added up.
// Tiles (palette 1): keys: 0-1 sums, 2-5 queries where four tiles hold them (128 numbers) and parts are rows, else 4
// one of them, 6-7 keys. Values: 0-1 sums, 2-5 weights (2 parts x 32 keys), 6-7 values; sums pass from block to block
// through memory.
// Per packed tile, in cycles: expansion 50, which is port 5's time for 16 x (kmovd + vpexpandw), with its other work
// 56, and 20 to 30 more for loading it, a product of 16 on a unit of its own, and what is stored. Softmax of 4 rows
// takes 280 a block; a block of 128 numbers 3000 in all (measured with all of it in the L2).
#include "kernels/amx_tiles.h"
#include "kernels/attention_softmax.h"
#include "kernels/expand_vbmi2.h"
#include "kernels/packed_attention_kernel.h"

namespace sparamx {
namespace {

constexpr size_t kTileDepth = TileK(WeightType::kBf16);
constexpr size_t kQueryParts = 3;
constexpr size_t kWeightParts = 2;
constexpr size_t kStackedRows = kTileRows / kQueryParts;
constexpr size_t kHeldTiles = 4;  // of queries that stay in registers
constexpr size_t kKeyStrips = kKeyBlock / kStripColumns;
constexpr size_t kVectors = kKeyBlock / kVecFloats;
constexpr size_t kScoreBytes = kKeyBlock * sizeof(float);  // a row of scores of a block
constexpr size_t kWeightBytes = kKeyBlock * 2;             // a row of weights of a block
constexpr size_t kAhead = 6;                               // tiles expanded ahead of their products
constexpr size_t kRing = 8;                                // their buffers
static_assert(kKeyStrips == 4 && kKeyBlock == 2 * kTileDepth, "the tile numbers are part of the instructions");

// Where the parts of a number are.
enum class Parts { kStacked, kTiles };

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
    queries = take(kQueryParts * kTileRows * query_bytes);
    products = reinterpret_cast<float*>(take(2 * kTileRows * kScoreBytes));
    scores = reinterpret_cast<float*>(take(kPackedBlocks * kTileRows * kScoreBytes));
    weights = take(kPackedBlocks * kWeightParts * kTileRows * kWeightBytes);
    sums = reinterpret_cast<float*>(take(CeilDiv(value_size, kStripColumns) * kTileBytes));
  }
};

size_t ScratchBytes(size_t, size_t key_size, size_t value_size) {
  return Scratch(nullptr, key_size, value_size).bytes;
}

// What is read after this job, asked for a little with every tile: two streams that never pause, as memory gives most
// to them, and both without a stride that the hardware's prefetchers could follow.
class ReadAhead {
 public:
  ReadAhead(const uint8_t* first, size_t bytes, size_t tiles)
      : first_(first), second_(first + bytes / 2), end_(first + bytes / 2), lines_(CeilDiv(bytes, 2 * 64 * tiles)) {}

  SPARAMX_INLINE void Ask() {
    const uint8_t *first = first_, *second = second_;
    if (first >= end_) return;
    const size_t lines = lines_;
    for (size_t i = 0; i < lines; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(first + 64 * i), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(second + 64 * i), _MM_HINT_T1);
    }
    first_ = first + 64 * lines;
    second_ = second + 64 * lines;
  }

 private:
  const uint8_t *first_, *second_, *end_;
  size_t lines_;
};

// The tiles of several blocks, one after the other, expanded a little ahead of their use.
class BlockStream {
 public:
  BlockStream(const PackedBlock* blocks, size_t count, CacheTiles PackedBlock::*part, ReadAhead* ahead, uint8_t* ring)
      : blocks_(blocks), count_(count), part_(part), ahead_(ahead), ring_(ring), damaged_(count) {
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
  }

  __attribute__((noinline)) void Advance() {
    if (left_ == 0) {
      if (block_ == count_) return;
      Begin();
    }
    uint8_t* const buffer = ring_ + made_ % kRing * kTileBytes;
    const uint8_t** const place = places_ + made_++ % kRing;
    Cursor cursor = cursor_;
    if (cursor.masks != nullptr) {
      *place = buffer;
      ExpandWords<true>(&cursor, buffer);
      cursor_ = cursor;
    } else {
      *place = cursor.values;
      cursor_.values += kTileBytes;
    }
    ahead_->Ask();
    if (--left_ == 0) End();
  }

  void End() {
    const CacheTiles& from = blocks_[block_].*part_;
    const bool whole = from.masks == nullptr || cursor_.values == from.values + 2 * from.kept;
    if (!whole && block_ < damaged_) damaged_ = block_;
    ++block_;
  }

  const PackedBlock* blocks_;
  size_t count_;
  CacheTiles PackedBlock::*part_;
  ReadAhead* ahead_;
  uint8_t* ring_;
  size_t damaged_;
  Cursor cursor_ = {};
  size_t block_ = 0, left_ = 0, made_ = 0, taken_ = 0;
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
      StoreParts<kQueryParts>(_mm512_maskz_loadu_ps(mask, q + (there != 0 ? i : 0)),
                              s.queries + r * s.query_bytes + 2 * i, rows * s.query_bytes);
    }
  }
}

// Sixteen columns of a row: where parts are rows, the sum of so many, which lie `apart` floats from each other.
template <Parts P, size_t Count>
SPARAMX_INLINE __m512 Whole(const float* p, size_t apart) {
  __m512 sum = _mm512_load_ps(p);
#pragma GCC unroll 2
  for (size_t part = 1; P == Parts::kStacked && part < Count; ++part)
    sum = _mm512_add_ps(sum, _mm512_load_ps(p + part * apart));
  return sum;
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
      x[n] = (Lanes)Whole<P, kQueryParts>(products + r * kKeyBlock + n * kVecFloats, rows * kKeyBlock);
    FinishScores(job, first + r, x, kVectors);
    for (size_t n = 0; n < kVectors; ++n) top[r] = x[n] > top[r] ? x[n] : top[r];
    __builtin_memcpy(scores + r * kKeyBlock, x, sizeof x);
  }
}

// A strip of a block of keys.
#define SPARAMX_KEY_STRIP(strip)                                                                     \
  _tile_zero(0);                                                                                     \
  for (size_t tile = 0; tile < tiles; ++tile) {                                                      \
    const uint8_t* const k = stream.Take();                                                          \
    _tile_loadd(6, k, 64);                                                                           \
    for (size_t part = 0; part < parts; ++part) {                                                    \
      _tile_loadd(4, s.queries + part * rows * s.query_bytes + tile * kTileRowBytes, s.query_bytes); \
      _tile_dpbf16ps(0, 4, 6);                                                                       \
    }                                                                                                \
  }                                                                                                  \
  _tile_stored(0, reinterpret_cast<uint8_t*>(products) + (strip)*64, kScoreBytes)

// The same where the queries are in the tiles 2 to 5, into the tile `Sum`: two strips in turn, as the products of one
// wait for each other.
#define SPARAMX_HELD_STRIP(Sum, strip) \
  _tile_zero(Sum);                     \
  _tile_loadd(6, stream.Take(), 64);   \
  _tile_dpbf16ps(Sum, 2, 6);           \
  _tile_loadd(7, stream.Take(), 64);   \
  _tile_dpbf16ps(Sum, 3, 7);           \
  _tile_loadd(6, stream.Take(), 64);   \
  _tile_dpbf16ps(Sum, 4, 6);           \
  _tile_loadd(7, stream.Take(), 64);   \
  _tile_dpbf16ps(Sum, 5, 7);           \
  _tile_stored(Sum, reinterpret_cast<uint8_t*>(products) + (strip)*64, kScoreBytes)

// Scores of all blocks. Those of a block are finished when the next one's products are on their way.
template <Parts P>
size_t MultiplyKeys(const PackedAttentionJob& job, size_t first, size_t rows, const Scratch& s, Lanes* top,
                    ReadAhead* ahead) {
  const size_t tiles = job.blocks[0].keys.tiles, parts = P == Parts::kStacked ? 1 : kQueryParts;
  BlockStream stream(job.blocks, job.count, &PackedBlock::keys, ahead, s.ring);
  const auto score = [&](size_t b) __attribute__((always_inline)) {
    Score<P>(job.rows, job.blocks[b], first, rows, s.products + b % 2 * kTileRows * kKeyBlock,
             s.scores + b * kTileRows * kKeyBlock, top);
  };
  const bool held = P == Parts::kStacked && tiles == kHeldTiles;
  if (held) {
    _tile_loadd(2, s.queries, s.query_bytes);
    _tile_loadd(3, s.queries + kTileRowBytes, s.query_bytes);
    _tile_loadd(4, s.queries + 2 * kTileRowBytes, s.query_bytes);
    _tile_loadd(5, s.queries + 3 * kTileRowBytes, s.query_bytes);
  }
  for (size_t b = 0; b < job.count; ++b) {
    float* const products = s.products + b % 2 * kTileRows * kKeyBlock;
    if (held) {
      SPARAMX_HELD_STRIP(0, 0);
      SPARAMX_HELD_STRIP(1, 1);
      SPARAMX_HELD_STRIP(0, 2);
      SPARAMX_HELD_STRIP(1, 3);
    } else {
      for (size_t strip = 0; strip < kKeyStrips; ++strip) {
        SPARAMX_KEY_STRIP(strip);
      }
    }
    Barrier();
    if (b > 0) score(b - 1);
  }
  score(job.count - 1);
  return stream.damaged();
}
#undef SPARAMX_HELD_STRIP
#undef SPARAMX_KEY_STRIP

// exp(x) for x up to 0, zero from where fp32 has no normal number left; NaN stays NaN. The polynomial of lanes.h, but
// with FMA: half the instructions.
SPARAMX_INLINE __m512 ExpOfNegative(__m512 x) {
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), magic), magic);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.37511501e-3f), _mm512_set1_ps(8.36898759e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.16695438e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.66665182e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.99999881e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(counts, p, n);
}

// From the scores of all blocks to weights; the factors for what was summed before.
void Softmax(const PackedAttentionJob& packed, size_t first, size_t rows, const Scratch& s, const Lanes* top,
             float* factors, ReadAhead* ahead) {
  const AttentionJob& job = packed.rows;
  for (size_t r = 0; r < rows; ++r) {
    float base;
    factors[r] = RaiseLargest(job, first + r, top[r], &base);
    const __m512 shift = _mm512_set1_ps(base);
    __m512 total = _mm512_setzero_ps();
    for (size_t b = 0; b < packed.count; ++b) {
      const float* const scores = s.scores + (b * kTileRows + r) * kKeyBlock;
      uint8_t* const weights = s.weights + (b * kWeightParts * kTileRows + r) * kWeightBytes;
#pragma GCC unroll 4
      for (size_t n = 0; n < kVectors; ++n) {
        const __m512 x = ExpOfNegative(_mm512_sub_ps(_mm512_load_ps(scores + n * kVecFloats), shift));
        total = _mm512_add_ps(total, x);
        StoreParts<kWeightParts>(x, weights + 32 * n, rows * kWeightBytes);
      }
      ahead->Ask();
    }
    job.denominator[first + r] = job.denominator[first + r] * factors[r] + Sum((Lanes)total);
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
size_t MultiplyValues(const PackedAttentionJob& job, size_t rows, const Scratch& s, ReadAhead* ahead) {
  const size_t strips = job.blocks[0].values.strips;
  BlockStream stream(job.blocks, job.count, &PackedBlock::values, ahead, s.ring);
  for (size_t b = 0; b < job.count; ++b) {
    const uint8_t* const weights = s.weights + b * kWeightParts * kTileRows * kWeightBytes;
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

SPARAMX_INLINE float NumberAt(const uint8_t* p) {
  const uint32_t bits = LoadU16(p) << 16;
  float number;
  __builtin_memcpy(&number, &bits, sizeof number);
  return number;
}

template <Parts P>
bool AreFinite(const Scratch& s, size_t rows, size_t r, size_t value_size) {
  __m512 all = _mm512_setzero_ps();
  for (size_t i = 0; i < value_size; i += kStripColumns) {
    const __m512 x = Whole<P, kWeightParts>(s.sums + (i / kStripColumns * kTileRows + r) * 16, rows * 16);
    all = _mm512_add_ps(all, _mm512_sub_ps(x, x));
  }
  return Sum((Lanes)all) == 0.0f;
}

// The sums of row r again, key by key and without those that it does not see: what they hold does not matter.
__attribute__((noinline)) void SumSeen(const PackedAttentionJob& packed, size_t first, size_t rows, size_t r,
                                       const Scratch& s) {
  const size_t strips = packed.blocks[0].values.strips;
  for (size_t strip = 0; strip < strips; ++strip)
    for (size_t row = r; row < kTileRows; row += rows)
      __builtin_memset(s.sums + (strip * kTileRows + row) * 16, 0, kTileRowBytes);
  for (size_t b = 0; b < packed.count; ++b) {
    const PackedBlock& block = packed.blocks[b];
    AttentionJob job = packed.rows;
    job.first_key = block.first_key;
    job.keys = block.count;
    Cursor cursor = {block.values.masks, block.values.values};
    for (size_t tile = 0; tile < strips * block.values.tiles; ++tile) {
      float* const sums = s.sums + (tile / block.values.tiles * kTileRows + r) * 16;
      const size_t start = tile % block.values.tiles * kTileDepth;
      const uint8_t* words = cursor.values;
      if (cursor.masks != nullptr) {
        ExpandWords<true>(&cursor, s.ring);
        words = s.ring;
      } else {
        cursor.values += kTileBytes;
      }
      for (size_t t = 0; t < kTileDepth; ++t) {
        if (start + t >= block.count || IsHidden(job, first + r, start + t)) continue;
        float weight = 0.0f;
        for (size_t part = 0; part < kWeightParts; ++part)
          weight +=
              NumberAt(s.weights + (b * kWeightParts * kTileRows + part * rows + r) * kWeightBytes + 2 * (start + t));
        for (size_t c = 0; c < kStripColumns; ++c)
          sums[c] += weight * NumberAt(words + t / 2 * kTileRowBytes + 4 * c + 2 * (t % 2));
      }
    }
  }
}

template <Parts P>
void AddSums(const PackedAttentionJob& packed, size_t first, size_t rows, const Scratch& s, const float* factors) {
  const AttentionJob& job = packed.rows;
  const PackedBlock& last = packed.blocks[packed.count - 1];
  const bool may_hide = MayHide(job, packed.blocks[0].first_key, last.first_key + last.count);
  for (size_t r = 0; r < rows; ++r) {
    if (may_hide && !AreFinite<P>(s, rows, r, job.value_size)) SumSeen(packed, first, rows, r, s);
    float* const sums = job.sums + (first + r) * job.sums_stride;
    const __m512 factor = _mm512_set1_ps(factors[r]);
    for (size_t i = 0; i < job.value_size; i += kStripColumns) {
      const auto mask = static_cast<__mmask16>((1u << Smaller(16, job.value_size - i)) - 1);
      const __m512 product = Whole<P, kWeightParts>(s.sums + (i / kStripColumns * kTileRows + r) * 16, rows * 16);
      _mm512_mask_storeu_ps(sums + i, mask, _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, sums + i), factor, product));
    }
  }
}

// The rows [first, first + rows) through all blocks.
template <Parts P>
size_t AttendRows(const PackedAttentionJob& job, size_t first, size_t rows, const Scratch& s, ReadAhead* ahead) {
  Lanes top[kTileRows];
  for (Lanes& t : top) Splat(kMinusInfinity, &t);
  float factors[kTileRows];
  SplitQueries(job.rows, first, rows, s);
  {
    const size_t tile_rows = P == Parts::kStacked ? kQueryParts * rows : rows;
    const TileScope scope(tile_rows, tile_rows);
    const size_t sound = MultiplyKeys<P>(job, first, rows, s, top, ahead);
    if (sound < job.count) return sound;
  }
  Softmax(job, first, rows, s, top, factors, ahead);
  {
    const size_t tile_rows = P == Parts::kStacked ? kWeightParts * rows : rows;
    const TileScope scope(tile_rows, tile_rows);
    const size_t sound = MultiplyValues<P>(job, rows, s, ahead);
    if (sound < job.count) return sound;
  }
  AddSums<P>(job, first, rows, s, factors);
  return job.count;
}

size_t AttendAmx(const PackedAttentionJob& job) {
  const Scratch s(job.scratch, job.rows.key_size, job.rows.value_size);
  const CacheTiles &keys = job.blocks[0].keys, &values = job.blocks[0].values;
  // A step with every tile, and where rows are few, with every row's softmax of a block.
  const size_t steps = keys.strips * keys.tiles + values.strips * values.tiles + Smaller(job.rows.rows, kTileRows);
  ReadAhead ahead(job.ahead, job.ahead_bytes, job.count * steps);
  if (job.rows.rows <= kStackedRows) return AttendRows<Parts::kStacked>(job, 0, job.rows.rows, s, &ahead);
  size_t sound = job.count;
  for (size_t r = 0; r < job.rows.rows && sound == job.count; r += kTileRows)
    sound = AttendRows<Parts::kTiles>(job, r, Smaller(kTileRows, job.rows.rows - r), s, &ahead);
  return sound;
}

}  // namespace

const PackedAttentionKernel kAmxPackedAttention = {"amx", ScratchBytes, AttendAmx};

}  // namespace sparamx
