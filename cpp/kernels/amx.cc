// AMX (Sapphire Rapids, Emerald Rapids, Granite Rapids): bf16 weights in TDPBF16PS, int8 in TDPBSUD, int4 in TDPBSSD or
// TDPBF16PS.
//
// Tiles (palette 1, 16 rows of 64 bytes): 0-3 sums (2 row tiles x 2 strips), 4-5 X, 6-7 weights.
// Per tile of 512 weights: expansion 16 x (kmovd + vpexpandw) = 48 cycles of port 5; TDPBF16PS 16 cycles on its own
// unit per 16 rows; a tile load 8 cycles. At 32 rows and more a product needs one tile load: 2 of X and 2 of weights
// feed 4.
//
//   M <= 32  a tile pair is expanded two steps ahead of its products, the sums stay in tiles 0-3 over all of K
//   M > 32   panels of 16 tiles x 2 strips: while every row block multiplies one panel, the next is expanded between
//            its products, a tile a step; sums pass from panel to panel through an array on the stack
#include "kernels/amx_tiles.h"
#include "kernels/avx512_integer.h"
#include "kernels/expand_vbmi2.h"
#include "kernels/half.h"
#include "kernels/pack_rows.h"
#include "kernels/quantized_loop.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

constexpr size_t kStrips = 2;       // strips of a block
constexpr size_t kBlock = 32;       // rows of a block
constexpr size_t kPanelTiles = 16;  // of a strip
constexpr size_t kMaxRows = 512;    // of one job, rounded up: the size of the sums' array
constexpr size_t kAhead = 2;        // tile pairs expanded ahead of their products for small M
constexpr size_t kRing = 4;         // their buffers
constexpr size_t kWarning = 8;      // steps before the end of a strip pair at which the next one is prefetched

// --- What differs between weight types: how tiles come about, which product takes them, what sums mean

// The four products of a step; the tile numbers are part of the instructions.
#define SPARAMX_PRODUCTS(product)         \
  static SPARAMX_INLINE void Product0() { \
    product(0, 4, 6);                     \
  }                                       \
  static SPARAMX_INLINE void Product1() { \
    product(1, 4, 7);                     \
  }                                       \
  static SPARAMX_INLINE void Product2() { \
    product(2, 5, 6);                     \
  }                                       \
  static SPARAMX_INLINE void Product3() { \
    product(3, 5, 7);                     \
  }

struct Bf16Tiles {
  static constexpr size_t kMade = 1;  // tiles that one packed tile becomes
  static constexpr bool kDenseInPlace = true;

  template <bool Sparse>
  static SPARAMX_INLINE void Expand(const PackedView&, size_t, size_t, Cursor* walk, uint8_t* out) {
    ExpandWords<Sparse>(walk, out);
  }
  SPARAMX_PRODUCTS(_tile_dpbf16ps)
  static SPARAMX_INLINE __m512 Result(const MatMulJob&, size_t, size_t, __m512 sum) { return sum; }
};

struct Int8Tiles {
  static constexpr size_t kMade = 1;
  static constexpr bool kDenseInPlace = true;

  template <bool Sparse>
  static SPARAMX_INLINE void Expand(const PackedView&, size_t, size_t, Cursor* walk, uint8_t* out) {
    ExpandCodes<false, Sparse>(walk, out);
  }
  SPARAMX_PRODUCTS(_tile_dpbsud)
  static __m512 Result(const MatMulJob& job, size_t strip, size_t m, __m512 sum) {
    const PackedView& w = *job.weights;
    const QuantizedRowLayout layout = QuantizedLayout(w);
    const uint8_t* row = static_cast<const uint8_t*>(job.x) + m * job.x_row_bytes;
    int32_t correction = 0;
    for (size_t run = job.first_run; run < job.last_run; ++run)
      correction += LoadInt(row + layout.corrections_at + 4 * run);
    const __m512i ints = _mm512_add_epi32(_mm512_castps_si512(sum), _mm512_set1_epi32(correction));
    const __m512 scales = _mm512_loadu_ps(ScalesOf(w, strip, 0));
    const __m512 x_scale = _mm512_set1_ps(LoadFloat(row + layout.scales_at));
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(ints), _mm512_mul_ps(scales, x_scale));
    if (job.first_run != 0) return product;
    // What the row's offset adds, as FirstSum does elsewhere.
    const __m512 weight_sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(w.sums + strip * kStripColumns * 4));
    const __m512 offset = _mm512_set1_ps(LoadFloat(row + layout.offset_at));
    return _mm512_fmadd_ps(weight_sums, _mm512_mul_ps(scales, offset), product);
  }
};

// A row of 64 codes, four along K of 16 columns, becomes two rows of 32 bf16, two along K each. Lane j of four vectors
// is column j / 2 (and 8 + j / 2), k = j % 2 (and 2 + j % 2): the order in which vcvtne2ps2pbf16 joins two of them to a
// row. Byte i of lane j: the i-th of the four.
struct PairOrder {
  alignas(64) uint8_t codes[64];
  alignas(64) int32_t low[16], high[16];  // columns
};
constexpr PairOrder MakePairOrder() {
  PairOrder order = {};
  for (int j = 0; j < 16; ++j) {
    order.low[j] = j / 2;
    order.high[j] = 8 + j / 2;
    for (int i = 0; i < 4; ++i)
      order.codes[4 * j + i] = static_cast<uint8_t>(4 * (8 * (i % 2) + j / 2) + 2 * (i / 2) + j % 2);
  }
  return order;
}
constexpr PairOrder kPairOrder = MakePairOrder();

struct Int4Tiles {
  static constexpr size_t kMade = 2;
  static constexpr bool kDenseInPlace = false;

  // Packed tile `tile` of a strip as two bf16 tiles. Per row of 64 weights, beside their expansion: vpermb, 4 vpermps
  // (all port 5; the table makes numbers of codes), 3 shifts, 4 multiplications, 2 vcvtne2ps2pbf16.
  template <bool Sparse>
  static SPARAMX_INLINE void Expand(const PackedView& w, size_t strip, size_t tile, Cursor* walk, uint8_t* out) {
    const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i order = _mm512_load_si512(kPairOrder.codes);
    CodeStream<true, Sparse> stream(*walk);
    stream.BeginTile();
    const size_t group_rows = Min(w.group_size / 4, 16);
    __m512 low = {}, high = {};
#pragma GCC unroll 16
    for (size_t row = 0; row < 16; ++row) {
      if (row % group_rows == 0) {
        const uint8_t* p = ScalesOf(w, strip, Min(w.groups - 1, (tile * 64 + row * 4) / w.group_size));
        const __m512 scales = Avx512Integer::Scales(p, w.scale_type, ColumnScalesOf(w, strip));
        low = _mm512_permutexvar_ps(_mm512_load_si512(kPairOrder.low), scales);
        high = _mm512_permutexvar_ps(_mm512_load_si512(kPairOrder.high), scales);
      }
      const __m512i codes = _mm512_permutexvar_epi8(order, stream.Row(static_cast<int>(row)));
      const auto weights = [&](__m512i index, __m512 scales) __attribute__((always_inline)) {
        return _mm512_mul_ps(_mm512_permutexvar_ps(index, numbers), scales);  // of an index the low four bits count
      };
      const __m512 w0 = weights(codes, low), w1 = weights(_mm512_srli_epi32(codes, 8), high);
      const __m512 w2 = weights(_mm512_srli_epi32(codes, 16), low), w3 = weights(_mm512_srli_epi32(codes, 24), high);
      _mm512_store_si512(out + row * 128, (__m512i)_mm512_cvtne2ps_pbh(w1, w0));
      _mm512_store_si512(out + row * 128 + 64, (__m512i)_mm512_cvtne2ps_pbh(w3, w2));
    }
    *walk = stream.cursor();
  }
  SPARAMX_PRODUCTS(_tile_dpbf16ps)
  static SPARAMX_INLINE __m512 Result(const MatMulJob&, size_t, size_t, __m512 sum) {
    return sum;
  }
};

// --- One step along K: weights from b0 and b1, rows from x, into the sums

template <class Kind, int RowTiles, int Strips>
SPARAMX_INLINE void Products(const uint8_t* x, size_t x_row_bytes, const uint8_t* b0, const uint8_t* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(4, x, x_row_bytes);
  Kind::Product0();
  if (Strips == 2) {
    _tile_loadd(7, b1, 64);
    Kind::Product1();
  }
  if (RowTiles == 2) {
    _tile_loadd(5, x + 16 * x_row_bytes, x_row_bytes);
    Kind::Product2();
    if (Strips == 2) Kind::Product3();
  }
}

template <int RowTiles>
SPARAMX_INLINE void ZeroSums() {
  _tile_zero(0);
  _tile_zero(1);
  if (RowTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// The sums' array: rows of kStrips * 16 floats.
constexpr size_t kSumStride = kStrips * kStripColumns * sizeof(float);

template <int RowTiles>
SPARAMX_INLINE void LoadSums(const float* sums) {
  const auto* p = reinterpret_cast<const uint8_t*>(sums);
  Barrier();
  _tile_loadd(0, p, kSumStride);
  _tile_loadd(1, p + 64, kSumStride);
  if (RowTiles == 2) {
    _tile_loadd(2, p + 16 * kSumStride, kSumStride);
    _tile_loadd(3, p + 16 * kSumStride + 64, kSumStride);
  }
}

template <int RowTiles>
SPARAMX_INLINE void StoreSums(float* sums) {
  auto* p = reinterpret_cast<uint8_t*>(sums);
  _tile_stored(0, p, kSumStride);
  _tile_stored(1, p + 64, kSumStride);
  if (RowTiles == 2) {
    _tile_stored(2, p + 16 * kSumStride, kSumStride);
    _tile_stored(3, p + 16 * kSumStride + 64, kSumStride);
  }
  Barrier();
}

// From the sums' array to Y, with bias and epilogue.
template <class Kind>
void Deliver(const MatMulJob& job, size_t strip, size_t strips, const float* sums) {
  for (size_t s = 0; s < strips; ++s) {
    const size_t columns = ColumnsOf(*job.weights, strip + s);
    float* y = job.y + (strip + s) * kStripColumns;
    for (size_t m = 0; m < job.rows; ++m) {
      const __m512 sum = _mm512_load_ps(sums + (m * kStrips + s) * kStripColumns);
      Avx512Base::Store(y + m * job.y_stride, columns, Kind::Result(job, strip + s, m, sum));
    }
  }
  FinishStrips(job, strip, strips);
}

// A range of packed tiles of `Strips` strips on the way to the tile unit: expanded into a buffer in turn, or, where
// that is the layout already, used where they lie in the blob.
template <class Kind, bool Sparse, int Strips>
class Feed {
 public:
  static constexpr bool kInPlace = !Sparse && Kind::kDenseInPlace;

  Feed(const MatMulJob& job, size_t strip, size_t first) : weights_(*job.weights), strip_(strip) {
    for (int s = 0; s < Strips; ++s) {
      walks_[s] = StartOf(weights_, strip + s, job.first_run);
      next_[s] = first;
    }
  }
  // The next packed tile of strip s: writes Kind::kMade tiles.
  SPARAMX_INLINE void Expand(size_t s, uint8_t* out) {
    Kind::template Expand<Sparse>(weights_, strip_ + s, next_[s]++, &walks_[s], out);
  }
  const uint8_t* InPlace(size_t s) const { return walks_[s].values; }

 private:
  const PackedView& weights_;
  size_t strip_;
  Cursor walks_[Strips];
  size_t next_[Strips];
};

// The walk through a strip pair leaves its second stream at the start of the pair after; the stream beside it is new to
// the prefetchers, so its beginning is asked for before it is needed.
SPARAMX_INLINE void PrefetchStrip(const MatMulJob& job, size_t strip) {
  if (strip >= job.last_strip) return;
  const Cursor start = StartOf(*job.weights, strip, job.first_run);
  for (size_t i = 0; i < kPrefetchBytes; i += 64) Prefetch(start.values + i);
  if (start.masks != nullptr)
    for (size_t i = 0; i < kPrefetchBytes / 4; i += 64) Prefetch(start.masks + i);
}

template <class Kind, bool Sparse, int RowTiles, int Strips>
void SmallStrips(const MatMulJob& job, size_t strip, size_t first, size_t last) {
  using Source = Feed<Kind, Sparse, Strips>;
  constexpr size_t kBytes = Kind::kMade * kTileBytes;  // that a packed tile becomes
  alignas(64) uint8_t ring[Source::kInPlace ? 1 : kRing][Strips][kBytes];
  alignas(64) float sums[RowTiles * 16 * kStrips * kStripColumns];
  Source feed(job, strip, first);
  ZeroSums<RowTiles>();
  const uint8_t* x = static_cast<const uint8_t*>(job.x) + first * Kind::kMade * kTileRowBytes;
  if (!Source::kInPlace)
    for (size_t t = 0; t < Min(kAhead, last - first); ++t)
      for (size_t s = 0; s < Strips; ++s) feed.Expand(s, ring[t][s]);
  const size_t warning = last - first > kWarning ? last - first - kWarning : 0;
  for (size_t t = 0; t < last - first; ++t) {
    if (t == warning) PrefetchStrip(job, strip + 2 * kStrips - 1);
    const uint8_t *b0, *b1;
    if (Source::kInPlace) {
      b0 = feed.InPlace(0) + t * kBytes;
      b1 = feed.InPlace(Strips - 1) + t * kBytes;
    } else {
      if (t + kAhead < last - first)
        for (size_t s = 0; s < Strips; ++s) feed.Expand(s, ring[(t + kAhead) % kRing][s]);
      b0 = ring[t % kRing][0];
      b1 = ring[t % kRing][Strips - 1];
    }
    Barrier();
    for (size_t i = 0; i < Kind::kMade; ++i) {
      Products<Kind, RowTiles, Strips>(x, job.x_row_bytes, b0 + i * kTileBytes, b1 + i * kTileBytes);
      x += kTileRowBytes;
    }
    Barrier();
  }
  StoreSums<RowTiles>(sums);
  Deliver<Kind>(job, strip, Strips, sums);
}

// One block of rows over one panel; `background` expands a tile of the next panel at every step.
template <class Kind, int RowTiles, int Strips, typename Background>
SPARAMX_INLINE void PanelBlock(const uint8_t* x, size_t x_row_bytes, const uint8_t* b0, const uint8_t* b1, size_t tiles,
                               bool first, float* sums, Background&& background) {
  if (first)
    ZeroSums<RowTiles>();
  else
    LoadSums<RowTiles>(sums);
  for (size_t t = 0; t < tiles; ++t) {
    Products<Kind, RowTiles, Strips>(x + t * kTileRowBytes, x_row_bytes, b0 + t * kTileBytes, b1 + t * kTileBytes);
    background();
  }
  StoreSums<RowTiles>(sums);
}

template <class Kind, bool Sparse, int Strips>
void PanelStripsAmx(const MatMulJob& job, size_t strip, size_t first, size_t last) {
  using Source = Feed<Kind, Sparse, Strips>;
  constexpr size_t kMade = Kind::kMade, kPacked = kPanelTiles / kMade;  // packed tiles of a panel's strip
  alignas(64) uint8_t panels[Source::kInPlace ? 1 : 2][Strips][Source::kInPlace ? 1 : kPanelTiles][kTileBytes];
  alignas(64) float sums[kMaxRows * kStrips * kStripColumns];
  Source feed(job, strip, first);
  const size_t rows = RoundUp(job.rows, 16);
  size_t current = 0;
  if (!Source::kInPlace)
    for (size_t t = 0; t < Min(kPacked, last - first); ++t)
      for (size_t s = 0; s < Strips; ++s) feed.Expand(s, panels[0][s][t * kMade]);
  for (size_t tile = first; tile < last; tile += kPacked) {
    const size_t tiles = Min(kPacked, last - tile), next_tiles = Min(kPacked, last - tile - tiles);
    const size_t in_place = (tile - first) * kTileBytes;
    const uint8_t* b0 = Source::kInPlace ? feed.InPlace(0) + in_place : panels[current][0][0];
    const uint8_t* b1 = Source::kInPlace ? feed.InPlace(Strips - 1) + in_place : panels[current][Strips - 1][0];
    size_t expanded = 0;
    const auto background = [&]() __attribute__((always_inline)) {
      if (Source::kInPlace || expanded == next_tiles * Strips) return;
      const size_t s = expanded % Strips;
      feed.Expand(s, panels[current ^ 1][s][expanded / Strips * kMade]);
      ++expanded;
    };
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + tile * kMade * kTileRowBytes;
    Barrier();
    for (size_t m = 0; m < rows; m += kBlock) {
      float* block_sums = sums + m * kStrips * kStripColumns;
      const uint8_t* block_x = x + m * job.x_row_bytes;
      if (rows - m >= kBlock)
        PanelBlock<Kind, 2, Strips>(block_x, job.x_row_bytes, b0, b1, tiles * kMade, tile == first, block_sums,
                                    background);
      else
        PanelBlock<Kind, 1, Strips>(block_x, job.x_row_bytes, b0, b1, tiles * kMade, tile == first, block_sums,
                                    background);
    }
    while (!Source::kInPlace && expanded < next_tiles * Strips) background();
    if (!Source::kInPlace) current ^= 1;
    Barrier();
  }
  Deliver<Kind>(job, strip, Strips, sums);
}

template <class Kind, bool Sparse, int Strips>
void AnyRows(const MatMulJob& job, size_t strip, size_t first, size_t last) {
  if (job.rows <= 16) return SmallStrips<Kind, Sparse, 1, Strips>(job, strip, first, last);
  if (job.rows <= kBlock) return SmallStrips<Kind, Sparse, 2, Strips>(job, strip, first, last);
  PanelStripsAmx<Kind, Sparse, Strips>(job, strip, first, last);
}

template <class Kind, bool Sparse>
void MultiplyAmxForm(const MatMulJob& job) {
  const PackedView& w = *job.weights;
  const size_t first = job.first_run * TilesPerRun(w.type), last = Min(job.last_run * TilesPerRun(w.type), w.tiles);
  const bool small = job.rows <= kBlock;
  const TileScope scope(small ? Min(job.rows, 16) : 16, small ? (job.rows > 16 ? job.rows - 16 : 0) : 16);
  size_t strip = job.first_strip;
  for (; strip + kStrips <= job.last_strip; strip += kStrips) AnyRows<Kind, Sparse, 2>(job, strip, first, last);
  if (strip < job.last_strip) AnyRows<Kind, Sparse, 1>(job, strip, first, last);
}

template <class Kind>
void MultiplyAmx(const MatMulJob& job) {
  if (job.weights->form == Form::kSparse) return MultiplyAmxForm<Kind, true>(job);
  MultiplyAmxForm<Kind, false>(job);
}

// --- int4 with int8 activations, M <= 32: TDPBSSD over one group of K at a time
//
// A segment (a group, or 64 of a longer one) is s / 4 rows of a weight tile and s bytes of X; a group's integer sums go
// through L1 to fp32, scaled. What each part adds per 1024 weights, 16 rows and groups of 32, measured on Granite
// Rapids: expansion 80 cycles, two products with their loads 30, two stores of a tile 50, conversion and scaling 80 to
// 110. They add up rather than overlap; sums in registers (one strip at a time), later flushes, and neighbouring groups
// in tiles of their own were no faster.
struct SignedTiles {
  SPARAMX_PRODUCTS(_tile_dpbssd)
};

#undef SPARAMX_PRODUCTS

// sums[m][16 s ..] += ints * weight scale * activation scale, for one row tile of one strip.
SPARAMX_INLINE void FlushInts(const int32_t* ints, size_t rows, const uint8_t* x, size_t x_row_bytes, size_t scales_at,
                              __m512 scales, float* sums) {
  for (size_t m = 0; m < rows; ++m) {
    const uint8_t* row = x + m * x_row_bytes;
    const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(LoadFloat(row + scales_at)));
    float* out = sums + m * kStrips * kStripColumns;
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(ints + m * 16));
    _mm512_store_ps(out, _mm512_fmadd_ps(sum, scale, _mm512_load_ps(out)));
  }
}

// The integer sums of one group, as they leave the tiles.
template <int RowTiles>
struct GroupSums {
  alignas(64) int32_t ints[RowTiles * 2][16 * 16];

  template <int Strips>
  SPARAMX_INLINE void Store() {
    _tile_stored(0, ints[0], 64);
    if (Strips == 2) _tile_stored(1, ints[1], 64);
    if (RowTiles == 2) {
      _tile_stored(2, ints[2 * (RowTiles - 1)], 64);
      if (Strips == 2) _tile_stored(3, ints[2 * (RowTiles - 1) + 1], 64);
    }
    Barrier();
  }

  template <int Strips>
  SPARAMX_INLINE void Flush(const MatMulJob& job, const QuantizedRowLayout& layout, size_t strip, size_t group,
                            float* sums) const {
    const PackedView& w = *job.weights;
    const auto* x = static_cast<const uint8_t*>(job.x);
    for (size_t s = 0; s < Strips; ++s) {
      const uint8_t* p = ScalesOf(w, strip + s, group);
      const __m512 scales = Avx512Integer::Scales(p, w.scale_type, ColumnScalesOf(w, strip + s));
      for (size_t tile_row = 0; tile_row < RowTiles; ++tile_row)
        FlushInts(ints[2 * tile_row + s], Min(16, job.rows - 16 * tile_row), x + 16 * tile_row * job.x_row_bytes,
                  job.x_row_bytes, layout.scales_at + 4 * group, scales,
                  sums + (16 * tile_row * kStrips + s) * kStripColumns);
    }
  }
};

// A group's sums are flushed while the next group is on its way through the tiles: products and stores have latencies
// of more than 50 cycles.
template <bool Sparse, int RowTiles, int Strips>
void GroupStrips(const MatMulJob& job, size_t strip, size_t first, size_t last) {
  const PackedView& w = *job.weights;
  const QuantizedRowLayout layout = QuantizedLayout(w);
  const size_t segment_k = Min(w.group_size, 64), tiles_per_group = w.group_size / 64;
  alignas(64) uint8_t ring[kRing][Strips][kTileBytes];
  alignas(64) float sums[RowTiles * 16 * kStrips * kStripColumns];
  GroupSums<RowTiles> stored[2];
  size_t groups_done = 0, last_group = 0;
  __builtin_memset(sums, 0, sizeof sums);
  Cursor cursors[Strips];
  for (size_t s = 0; s < Strips; ++s) cursors[s] = StartOf(w, strip + s, job.first_run);
  for (size_t t = 0; t < Min(kAhead, last - first); ++t)
    for (size_t s = 0; s < Strips; ++s) ExpandCodes<true, Sparse, CodeForm::kSigned>(&cursors[s], ring[t][s]);
  const auto* x = static_cast<const uint8_t*>(job.x);
  const size_t warning = last - first > kWarning ? last - first - kWarning : 0;
  for (size_t t = 0; t < last - first; ++t) {
    if (t == warning) PrefetchStrip(job, strip + 2 * kStrips - 1);
    if (t + kAhead < last - first)
      for (size_t s = 0; s < Strips; ++s)
        ExpandCodes<true, Sparse, CodeForm::kSigned>(&cursors[s], ring[(t + kAhead) % kRing][s]);
    const size_t tile = first + t;
    for (size_t k = 0; k < 64; k += segment_k) {
      if (tiles_per_group <= 1 || tile % tiles_per_group == 0) ZeroSums<RowTiles>();
      const uint8_t* b0 = ring[t % kRing][0] + k * 16;
      const uint8_t* b1 = ring[t % kRing][Strips - 1] + k * 16;
      Barrier();
      Products<SignedTiles, RowTiles, Strips>(x + tile * 64 + k, job.x_row_bytes, b0, b1);
      const size_t group = (tile * 64 + k) / w.group_size;
      if (tiles_per_group > 1 && (tile + 1) % tiles_per_group != 0 && t + 1 < last - first) continue;
      if (group >= w.groups) continue;  // padding
      stored[groups_done % 2].template Store<Strips>();
      if (groups_done > 0) stored[(groups_done - 1) % 2].template Flush<Strips>(job, layout, strip, last_group, sums);
      last_group = group;
      ++groups_done;
    }
  }
  if (groups_done > 0) stored[(groups_done - 1) % 2].template Flush<Strips>(job, layout, strip, last_group, sums);
  Deliver<Bf16Tiles>(job, strip, Strips, sums);  // the sums are fp32 already
}

template <bool Sparse, int Strips>
void AnyGroupRows(const MatMulJob& job, size_t strip, size_t first, size_t last) {
  if (job.rows <= 16) return GroupStrips<Sparse, 1, Strips>(job, strip, first, last);
  GroupStrips<Sparse, 2, Strips>(job, strip, first, last);
}

template <bool Sparse>
void MultiplyGroupsForm(const MatMulJob& whole) {
  const PackedView& w = *whole.weights;
  const size_t first = whole.first_run * TilesPerRun(w.type), last = Min(whole.last_run * TilesPerRun(w.type), w.tiles);
  // Forced levels bring more rows than this way is made for: 32 at a time.
  for (size_t m = 0; m < whole.rows; m += kBlock) {
    MatMulJob job = whole;
    job.rows = Min(kBlock, whole.rows - m);
    job.x = static_cast<const uint8_t*>(whole.x) + m * whole.x_row_bytes;
    job.y = whole.y + m * whole.y_stride;
    const TileScope scope(Min(job.rows, 16), job.rows > 16 ? job.rows - 16 : 0, Min(w.group_size, 64));
    size_t strip = job.first_strip;
    for (; strip + kStrips <= job.last_strip; strip += kStrips) AnyGroupRows<Sparse, 2>(job, strip, first, last);
    if (strip < job.last_strip) AnyGroupRows<Sparse, 1>(job, strip, first, last);
  }
}

void MultiplyGroups(const MatMulJob& job) {
  if (job.weights->form == Form::kSparse) return MultiplyGroupsForm<true>(job);
  MultiplyGroupsForm<false>(job);
}

}  // namespace

const Level kAmxLevel = {
    "amx",
    kAvx2 | kAvx512 | kAvx512Vbmi2 | kAvx512Vnni | kGfni | kAvx512Bf16 | kAmxTile | kAmxBf16 | kAmxInt8,
    {
        {},
        {{}, {"amx", 16, RowBytesBf16, PackRowsBf16, MultiplyAmx<Bf16Tiles>, false}},
        {{}, {}, {"amx", 16, RowBytesQuantized, PackRowsQuantized, MultiplyAmx<Int8Tiles>, false}},
        {{},
         {"amx", 16, RowBytesBf16, PackRowsBf16, MultiplyAmx<Int4Tiles>, false},
         {"amx", 16, RowBytesQuantized, PackRowsGrouped, MultiplyGroups, false}},
    },
    FinishRows,
    HalvesToFloats,
    FloatsToHalves,
    nullptr,
    &kAmxPackedAttention,
};

}  // namespace sparamx
