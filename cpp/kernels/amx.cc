// AMX (Sapphire Rapids, Emerald Rapids, Granite Rapids): bf16 weights in TDPBF16PS.
//
// Tiles (palette 1, 16 rows of 64 bytes): 0-3 sums (2 row tiles x 2 strips), 4-5 X, 6-7 weights.
// Per tile of 512 weights: expansion 16 x (kmovd + vpexpandw) = 48 cycles of port 5; TDPBF16PS 16 cycles on its own
// unit per 16 rows; a tile load 8 cycles. At 32 rows and more a product needs one tile load: 2 of X and 2 of weights
// feed 4.
//
//   M <= 32  a tile pair is expanded one step ahead of its products, the sums stay in tiles 0-3 over all of K
//   M > 32   panels of 16 tiles x 2 strips: while every row block multiplies one panel, the next is expanded between
//   the
//            products, one tile per step; sums pass from panel to panel through an array on the stack
//
// GCC 12's tile intrinsics do not tell the compiler that they touch memory, hence the barriers.
#include "kernels/expand_vbmi2.h"
#include "kernels/pack_rows.h"
#include "kernels/strip_loop.h"

namespace sparamx {
namespace {

constexpr size_t kTileBytes = kTileRows * kTileRowBytes;
constexpr size_t kStrips = 2;       // strips of a block
constexpr size_t kBlock = 32;       // rows of a block
constexpr size_t kPanelTiles = 16;  // per strip: K = 512
constexpr size_t kMaxRows = 512;    // of one job, rounded up: the size of the sums' array
constexpr size_t kRing = 4;         // expanded tile pairs in flight for small M

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};

SPARAMX_INLINE void Barrier() {
  __asm__ volatile("" ::: "memory");
}

// Loads the configuration for a scope: ONNX Runtime's own kernels share the thread, so nothing may stay behind.
class TileScope {
 public:
  // Row tiles of X and of the sums have `first` and `second` rows; a tile of 0 rows is not configured.
  TileScope(size_t first, size_t second) {
    TileConfig config = {};
    config.palette = 1;
    const size_t rows[8] = {first, first, second, second, first, second, 16, 16};
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = static_cast<uint8_t>(rows[t]);
      config.column_bytes[t] = rows[t] == 0 ? 0 : 64;
    }
    Barrier();
    _tile_loadconfig(&config);
    Barrier();
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// One step along K: weights from b[strip], rows from x, into the sums.
template <int RowTiles, int Strips>
SPARAMX_INLINE void Products(const uint8_t* x, size_t x_row_bytes, const uint8_t* b0, const uint8_t* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(4, x, x_row_bytes);
  _tile_dpbf16ps(0, 4, 6);
  if (Strips == 2) {
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if (RowTiles == 2) {
    _tile_loadd(5, x + 16 * x_row_bytes, x_row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if (Strips == 2) _tile_dpbf16ps(3, 5, 7);
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
void Deliver(const MatMulJob& job, size_t strip, size_t strips, const float* sums) {
  const size_t n0 = strip * kStripColumns;
  for (size_t s = 0; s < strips; ++s) {
    const size_t columns = ColumnsOf(*job.weights, strip + s);
    for (size_t m = 0; m < job.rows; ++m)
      Avx512Base::Store(job.y + m * job.y_stride + n0 + s * kStripColumns, columns,
                        _mm512_load_ps(sums + m * kStrips * kStripColumns + s * kStripColumns));
  }
  FinishStrips(job, strip, strips);
}

// Where the tiles of a strip pair come from: the blob itself (dense), or a buffer into which they are expanded in turn.
template <bool Sparse, int Strips>
class Feed {
 public:
  Feed(const MatMulJob& job, size_t strip) {
    for (int s = 0; s < Strips; ++s) cursors_[s] = StartOf(*job.weights, strip + s, job.first_run);
  }
  SPARAMX_INLINE void Expand(int s, uint8_t* out) { ExpandWords<true>(&cursors_[s], out); }
  // Dense tiles are used where they lie.
  SPARAMX_INLINE const uint8_t* Take(int s) {
    const uint8_t* tile = cursors_[s].values;
    cursors_[s].values += kTileBytes;
    return tile;
  }

 private:
  Cursor cursors_[Strips];
};

template <bool Sparse, int RowTiles, int Strips>
void SmallStrips(const MatMulJob& job, size_t strip, size_t first, size_t last) {
  alignas(64) uint8_t ring[Sparse ? kRing : 1][Strips][kTileBytes];
  alignas(64) float sums[RowTiles * 16 * kStrips * kStripColumns];
  Feed<Sparse, Strips> feed(job, strip);
  ZeroSums<RowTiles>();
  const uint8_t* x = static_cast<const uint8_t*>(job.x) + first * kTileRowBytes;
  if (Sparse)
    for (int s = 0; s < Strips; ++s) feed.Expand(s, ring[0][s]);
  for (size_t t = 0; t < last - first; ++t) {
    if (Sparse) {
      if (t + 1 < last - first)
        for (int s = 0; s < Strips; ++s) feed.Expand(s, ring[(t + 1) % kRing][s]);
      Barrier();
      Products<RowTiles, Strips>(x, job.x_row_bytes, ring[t % kRing][0], ring[t % kRing][Strips - 1]);
      Barrier();
    } else {
      const uint8_t* b0 = feed.Take(0);
      const uint8_t* b1 = Strips == 2 ? feed.Take(Strips - 1) : nullptr;
      Products<RowTiles, Strips>(x, job.x_row_bytes, b0, b1);
    }
    x += kTileRowBytes;
  }
  StoreSums<RowTiles>(sums);
  Deliver(job, strip, Strips, sums);
}

// One block of rows over one panel; `background` expands a tile of the next panel at every step.
template <int RowTiles, int Strips, typename Background>
SPARAMX_INLINE void PanelBlock(const uint8_t* x, size_t x_row_bytes, const uint8_t* b0, const uint8_t* b1, size_t tiles,
                               bool first, float* sums, Background&& background) {
  if (first)
    ZeroSums<RowTiles>();
  else
    LoadSums<RowTiles>(sums);
  for (size_t t = 0; t < tiles; ++t) {
    Products<RowTiles, Strips>(x + t * kTileRowBytes, x_row_bytes, b0 + t * kTileBytes, b1 + t * kTileBytes);
    background();
  }
  StoreSums<RowTiles>(sums);
}

template <bool Sparse, int Strips>
void PanelStripsAmx(const MatMulJob& job, size_t strip, size_t first, size_t last) {
  alignas(64) uint8_t panels[Sparse ? 2 : 1][Strips][Sparse ? kPanelTiles : 1][kTileBytes];
  alignas(64) float sums[kMaxRows * kStrips * kStripColumns];
  Feed<Sparse, Strips> feed(job, strip);
  const size_t rows = RoundUp(job.rows, 16);
  int current = 0;
  if (Sparse)
    for (size_t t = 0; t < Min(kPanelTiles, last - first); ++t)
      for (int s = 0; s < Strips; ++s) feed.Expand(s, panels[0][s][t]);
  const uint8_t* dense[2] = {nullptr, nullptr};
  if (!Sparse)
    for (int s = 0; s < Strips; ++s) dense[s] = feed.Take(s);
  for (size_t tile = first; tile < last; tile += kPanelTiles) {
    const size_t tiles = Min(kPanelTiles, last - tile), next_tiles = Min(kPanelTiles, last - tile - tiles);
    const uint8_t* b0 = Sparse ? panels[current][0][0] : dense[0] + (tile - first) * kTileBytes;
    const uint8_t* b1 = Sparse        ? panels[current][Strips - 1][0]
                        : Strips == 2 ? dense[1] + (tile - first) * kTileBytes
                                      : b0;
    size_t expanded = 0;
    const auto background = [&]() __attribute__((always_inline)) {
      if (!Sparse || expanded == next_tiles * Strips) return;
      const size_t s = expanded % Strips;
      feed.Expand(static_cast<int>(s), panels[current ^ 1][s][expanded / Strips]);
      ++expanded;
    };
    const uint8_t* x = static_cast<const uint8_t*>(job.x) + tile * kTileRowBytes;
    Barrier();
    for (size_t m = 0; m < rows; m += kBlock) {
      float* block_sums = sums + m * kStrips * kStripColumns;
      if (rows - m >= kBlock)
        PanelBlock<2, Strips>(x + m * job.x_row_bytes, job.x_row_bytes, b0, b1, tiles, tile == first, block_sums,
                              background);
      else
        PanelBlock<1, Strips>(x + m * job.x_row_bytes, job.x_row_bytes, b0, b1, tiles, tile == first, block_sums,
                              background);
    }
    while (Sparse && expanded < next_tiles * Strips) background();
    if (Sparse) current ^= 1;
    Barrier();
  }
  Deliver(job, strip, Strips, sums);
}

template <bool Sparse, int Strips>
void AnyRows(const MatMulJob& job, size_t strip, size_t first, size_t last) {
  if (job.rows <= 16) return SmallStrips<Sparse, 1, Strips>(job, strip, first, last);
  if (job.rows <= kBlock) return SmallStrips<Sparse, 2, Strips>(job, strip, first, last);
  PanelStripsAmx<Sparse, Strips>(job, strip, first, last);
}

template <bool Sparse>
void MultiplyAmx(const MatMulJob& job) {
  const PackedView& w = *job.weights;
  const size_t first = job.first_run * TilesPerRun(w.type), last = Min(job.last_run * TilesPerRun(w.type), w.tiles);
  const bool small = job.rows <= kBlock;
  const TileScope scope(small ? Min(job.rows, 16) : 16, small ? (job.rows > 16 ? job.rows - 16 : 0) : 16);
  size_t strip = job.first_strip;
  for (; strip + kStrips <= job.last_strip; strip += kStrips) AnyRows<Sparse, 2>(job, strip, first, last);
  if (strip < job.last_strip) AnyRows<Sparse, 1>(job, strip, first, last);
}

void MultiplyBf16(const MatMulJob& job) {
  if (job.weights->form == Form::kSparse) return MultiplyAmx<true>(job);
  MultiplyAmx<false>(job);
}

}  // namespace

const Level kAmxLevel = {
    "amx",
    kAvx2 | kAvx512 | kAvx512Vbmi2 | kAvx512Vnni | kAvx512Bf16 | kAmxTile | kAmxBf16 | kAmxInt8,
    {
        {},
        {{}, {"amx", 2, 16, PackRowsBf16, MultiplyBf16}},
        {},
        {},
    },
    FinishRows,
};

}  // namespace sparamx
