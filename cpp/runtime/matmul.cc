#include "runtime/matmul.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "runtime/choice.h"
#include "runtime/cpu.h"

namespace sparamx {
namespace {

// Packed bytes below which another work item costs more than it gains: about 2 us of memory time.
constexpr uint64_t kItemBytes = 32 * 1024;
// Bytes from which on more items than CPUs pay: smaller products run in one item per CPU, so that layer after layer a
// CPU finds the activations that it wrote itself.
constexpr uint64_t kSpareItemBytes = 256 * 1024;
// Work items per CPU: threads may be unequal, but every item begins with a cold stream. The host does not say how many
// threads it has. How strips are shared out does not change a bit of the result, so it may depend on the machine.
constexpr size_t kItemsPerCpu = 8;
// With few rows, an item takes at most about so many bytes on average, 60 us, the last ones a fraction of it.
constexpr uint64_t kMostItemBytes = 1024 * 1024;
// Parts that a product with few strips is cut into along K: fixed, as it changes the order of summation.
constexpr size_t kKParts = 16;
// Rows per pass over the weights: a tile is expanded once for all of them. X, or a run of it, is read again for every
// strip pair, so it should stay in the L2; beside a run of X lie the panels.
constexpr size_t kMaxPassRows = 512, kMinPassRows = 64;
constexpr size_t kPassBytes = 1152 * 1024, kRunPassBytes = 576 * 1024;
// Rows from which on kernels hold several rows of X in the L1.
constexpr size_t kBlockedRows = 9;
// Multiply-adds that weigh as much as a packed byte from memory: with more rows, smaller pieces are worth a thread.
constexpr uint64_t kRowsPerByte = 4;
// Strips are handed out in pairs, as the register blocks of larger M take them.
constexpr size_t kStripStep = 2;
// Weights along K whose int8 products an int32 surely holds: 127 * 127 * 2^17 < 2^31.
constexpr size_t kMaxIntegerK = 128 * 1024;
// Activations above which packing them is shared among threads.
constexpr size_t kSerialPackElements = 32 * 1024;

// Rows a power of two apart would fall into the same few cache sets.
size_t UnaliasedStride(size_t bytes) {
  return bytes % 1024 == 0 ? bytes + 64 : bytes;
}

// How much of `whole` lies before an item. A thread of the host takes a run of items, one after the other, then what is
// left of others' runs: items become smaller along a run, so that little is left to wait for at its end. The division
// comes last: 49 groups among 49 items are one each, which 1 / 49 * 49, rounded down, is not.
uint64_t WorkBefore(uint64_t whole, size_t item, size_t items) {
  const size_t cpus = CpuCount(), length = items % cpus == 0 ? items / cpus : 1, left = length - item % length;
  const auto before = static_cast<double>((item / length + 1) * length * length - left * left);
  return static_cast<uint64_t>(static_cast<double>(whole) * before / static_cast<double>(items * length));
}

// The strip at which item `item` of `items` begins.
size_t FirstStrip(const PackedView& w, size_t item, size_t items) {
  const size_t groups = CeilDiv(w.strips, kStripStep);
  if (item == 0) return 0;
  if (item >= items) return w.strips;
  if (w.form == Form::kDense) return std::min<size_t>(w.strips, WorkBefore(groups, item, items) * kStripStep);
  // Masks are read too, so a strip without values still counts, in units of a value.
  const uint64_t mask_weight = std::max<uint64_t>(1, w.tiles * MaskBytesPerTile(w.type) * 8 / CodeBits(w.type));
  auto before = [&](size_t group) {
    const size_t strip = std::min(w.strips, group * kStripStep);
    return ValuesBefore(w, strip, 0) + strip * mask_weight;
  };
  const uint64_t target = WorkBefore(before(groups), item, items);
  size_t low = 0, high = groups;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (before(middle) < target)
      low = middle + 1;
    else
      high = middle;
  }
  if (low > 0 && target - before(low - 1) < before(low) - target) --low;  // the nearest
  return std::min(w.strips, low * kStripStep);
}

// Where each of so many items begins, and the last one ends.
std::vector<size_t> ItemStarts(const PackedView& w, size_t items) {
  std::vector<size_t> starts;
  for (size_t item = 0; item <= items; ++item) starts.push_back(FirstStrip(w, item, items));
  return starts;
}

}  // namespace

// How a product with so many rows is computed.
struct MatMul::Plan {
  size_t rows;
  const Kernel* kernel;

  // How the rows of X lie for the kernel: packed into scratch, or X itself where the kernel takes it as it is.
  bool x_in_place;
  size_t x_row_bytes;
  size_t x_bytes;    // of scratch
  size_t pack_rows;  // that a work item packs
  size_t pack_items() const { return CeilDiv(rows, pack_rows); }

  // Items count row passes first, then K parts, then ranges of strips: passes over the same strips follow each other,
  // while their weights are in the cache.
  size_t passes, pass_rows;
  size_t strip_items;
  size_t k_parts;
  size_t items() const { return passes * k_parts * strip_items; }

  // Where things lie in scratch, in bytes: the packed rows of X first, then, where there are several K parts, their
  // sums, and for fp16 in fp32: the bias, Y, and a row of X for every item that packs.
  size_t parts_at, bias_at, y_at, x_rows_at, scratch_bytes;
};

Status MatMul::Init(const uint8_t* blob, uint64_t blob_size, const Options& options) {
  Status status = Parse(blob, blob_size, &weights_);
  if (!status.ok()) return status;
  status = ChooseLevel(options.isa, &level_, &forced_level_);
  if (!status.ok()) return status;
  activations_ = options.default_activations ? DefaultActivations(weights_.type) : options.activations;
  if (!GoesWith(weights_.type, activations_))
    return Status::Invalid("its weight type does not go with these activations");
  element_ = options.element;
  kernel_ = options.kernel;
  status = SetOutputs(options);
  if (status.ok()) item_starts_ = ItemStarts(weights_, PlanFor(1).strip_items);
  return status;
}

namespace {

// Some strips of a matrix as a matrix of their own (which has no count of its non-zeros).
PackedView Columns(const PackedView& whole, size_t first_strip, uint64_t columns) {
  PackedView w = whole;
  const size_t first_tile = first_strip * w.tiles;
  w.n = columns;
  w.strips = CeilDiv(columns, kStripColumns);
  if (w.form == Form::kSparse) {
    w.offsets += first_strip * w.runs * sizeof(uint64_t);  // they count from the first value of the whole
    w.bitmap += first_tile * MaskBytesPerTile(w.type);
  } else {
    w.values += ValueBytes(w.type, first_tile * TileWeights(w.type));
  }
  if (w.groups != 0) w.scales += first_strip * w.groups * kStripColumns * ScaleBytes(w.scale_type);
  if (w.column_scales != nullptr) w.column_scales += first_strip * kStripColumns * sizeof(float);
  if (w.sums != nullptr) w.sums += first_strip * kStripColumns * sizeof(int32_t);
  return w;
}

}  // namespace

Status MatMul::SetOutputs(const Options& options) {
  std::vector<uint64_t> splits = options.splits;
  if (splits.empty()) splits.push_back(weights_.n);
  const std::vector<Epilogue>& epilogues = options.epilogues;
  if (epilogues.size() > 1 && epilogues.size() != splits.size())
    return Status::Invalid("it has " + std::to_string(epilogues.size()) + " epilogues for " +
                           std::to_string(splits.size()) + " outputs");
  outputs_.clear();
  uint64_t column = 0;
  for (size_t i = 0; i < splits.size(); ++i) {
    const bool last = i + 1 == splits.size();
    if (!options.splits.empty() && splits[i] == 0) return Status::Invalid("one of its splits has no columns");
    if (!last && splits[i] % kStripColumns != 0)
      return Status::Invalid("its split " + std::to_string(splits[i]) + " is not a multiple of " +
                             std::to_string(kStripColumns) + ", as all but the last must be");
    if (splits[i] > weights_.n - column) return Status::Invalid("its splits have more than N columns");
    const size_t strip = column / kStripColumns;
    const Epilogue epilogue = epilogues.empty() ? Epilogue::kNone : epilogues[epilogues.size() == 1 ? 0 : i];
    outputs_.push_back({Columns(weights_, strip, splits[i]), strip, epilogue});
    column += splits[i];
  }
  if (column != weights_.n) return Status::Invalid("its splits have fewer than N columns");
  return {};
}

const Kernel& MatMul::KernelFor(size_t rows) const {
  return kernel_ != nullptr ? *kernel_ : *ChooseKernel(*level_, forced_level_, weights_.type, activations_, rows);
}

MatMul::Plan MatMul::PlanFor(size_t rows) const {
  Plan plan = {};
  plan.rows = rows;
  plan.kernel = &KernelFor(rows);
  PlanX(&plan);
  PlanSplit(&plan);
  PlanScratch(&plan);
  return plan;
}

void MatMul::PlanX(Plan* p) const {
  const bool whole_tiles = weights_.k % TileK(weights_.type) == 0;
  const size_t x_bytes = weights_.k * sizeof(float);
  const bool strided_well = p->rows < kBlockedRows || UnaliasedStride(x_bytes) == x_bytes;
  p->x_in_place = activations_ == Activations::kFp32 && whole_tiles && element_ == Element::kFp32 && strided_well;
  p->x_row_bytes = p->x_in_place ? x_bytes : UnaliasedStride(RoundUp(p->kernel->x_row_bytes(weights_), 64));
  p->x_bytes = p->x_in_place ? 0 : RoundUp(p->rows, p->kernel->x_row_multiple) * p->x_row_bytes;
  p->pack_rows = std::max<size_t>(1, CeilDiv(kSerialPackElements, std::max<size_t>(1, weights_.k)));
}

// What changes the order of summation (K parts, passes) depends on the shape alone, not on threads or values.
void MatMul::PlanSplit(Plan* p) const {
  const bool by_runs = p->kernel->goes_by_runs;
  const size_t row_bytes = p->x_row_bytes / (by_runs ? std::max<size_t>(1, weights_.runs) : 1);
  const size_t fitting =
      (by_runs ? kRunPassBytes : kPassBytes) / std::max<size_t>(1, row_bytes) / kMinPassRows * kMinPassRows;
  const size_t most_rows = std::min(kMaxPassRows, std::max(kMinPassRows, fitting));
  const size_t least_passes = CeilDiv(p->rows, most_rows);
  p->pass_rows = std::min(p->rows, RoundUp(CeilDiv(p->rows, least_passes), p->kernel->x_row_multiple));
  p->passes = CeilDiv(p->rows, p->pass_rows);
  const uint64_t bytes =
      ValueBytes(weights_.type, static_cast<uint64_t>(weights_.strips) * weights_.tiles * TileWeights(weights_.type)) /
      2;
  const uint64_t work = bytes * (1 + p->pass_rows / kRowsPerByte);
  const auto worth = static_cast<size_t>(std::max<uint64_t>(1, work / kItemBytes));
  const size_t pairs = std::max<size_t>(1, CeilDiv(weights_.strips, kStripStep));
  const size_t cpus = CpuCount();
  const size_t most =
      std::max(kItemsPerCpu * cpus, static_cast<size_t>(p->rows < kBlockedRows ? bytes / kMostItemBytes : 0));
  const size_t spare = std::min(most, static_cast<size_t>(work / kSpareItemBytes));
  p->strip_items = std::min({worth, pairs, std::max(cpus, spare)});
  if (p->strip_items > cpus) p->strip_items -= p->strip_items % cpus;
  const size_t parts = std::min(worth, kKParts) / pairs;
  p->k_parts = p->passes == 1 ? std::max<size_t>(1, std::min(weights_.runs, parts)) : 1;
  if (weights_.type == WeightType::kInt8) p->k_parts = std::max(p->k_parts, CeilDiv(weights_.k, kMaxIntegerK));
}

void MatMul::PlanScratch(Plan* p) const {
  const size_t y_bytes = p->rows * weights_.n * sizeof(float);
  p->parts_at = p->x_bytes;
  p->bias_at = RoundUp(p->parts_at + (p->k_parts == 1 ? 0 : p->k_parts * y_bytes), 64);
  p->scratch_bytes = p->bias_at;
  if (element_ == Element::kFp32) return;
  p->y_at = RoundUp(p->bias_at + weights_.n * sizeof(float), 64);
  p->x_rows_at = RoundUp(p->y_at + y_bytes, 64);
  p->scratch_bytes = p->x_rows_at + p->pack_items() * weights_.k * sizeof(float);
}

size_t MatMul::ScratchBytes(size_t rows) const {
  return rows == 0 ? 0 : PlanFor(rows).scratch_bytes;
}

namespace {

struct Call {
  const Level* level;
  const Kernel* kernel;
  const PackedView* weights;  // of all outputs
  const std::vector<MatMulOutput>* outputs;
  MatMulJob job;  // what all items have in common
  size_t total_rows, passes, pass_rows, strip_items, k_parts;
  const size_t* item_starts;  // strips; null: not known yet
  const void* x;
  size_t pack_rows;
  void* const* y;
  float* partial;   // the bare sums of one K part after the other, each [total_rows, N]; null where there is one part
  float* y_floats;  // of fp16: one output [total_rows, its columns] after the other; null for fp32
  float* x_floats;  // of fp16: a row for every item that packs

  // Where an output is computed.
  float* Floats(size_t output) const {
    if (y_floats == nullptr) return static_cast<float*>(y[output]);
    return y_floats + total_rows * (*outputs)[output].first_column();
  }
  // Writes finished results, where Floats is not the output itself.
  void Deliver(size_t output, size_t first_row, size_t rows, size_t column, size_t end_column) const {
    if (y_floats == nullptr) return;
    const size_t n = (*outputs)[output].weights.n, first = first_row * n + column;
    level->floats_to_halves(Floats(output) + first, n, rows, std::min(end_column, n) - column,
                            static_cast<uint16_t*>(y[output]) + first, n);
  }
};

void PackItem(void* user, size_t item) {
  const Call& c = *static_cast<const Call*>(user);
  const size_t k = c.weights->k;
  const size_t first = item * c.pack_rows, rows = std::min(c.pack_rows, c.total_rows - first);
  uint8_t* out = static_cast<uint8_t*>(const_cast<void*>(c.job.x)) + first * c.job.x_row_bytes;
  if (c.y_floats == nullptr)
    return c.kernel->pack_rows(*c.weights, static_cast<const float*>(c.x) + first * k, rows, out, c.job.x_row_bytes);
  float* row = c.x_floats + item * k;
  for (size_t m = 0; m < rows; ++m) {
    c.level->halves_to_floats(static_cast<const uint16_t*>(c.x) + (first + m) * k, k, row);
    c.kernel->pack_rows(*c.weights, row, 1, out + m * c.job.x_row_bytes, c.job.x_row_bytes);
  }
}

void MultiplyItem(void* user, size_t item) {
  const Call& c = *static_cast<const Call*>(user);
  const PackedView& w = *c.weights;
  const size_t pass = item % c.passes, part = item / c.passes % c.k_parts, strip_item = item / c.passes / c.k_parts;
  const size_t first_row = pass * c.pass_rows;
  const bool known = c.item_starts != nullptr;
  const size_t first_strip = known ? c.item_starts[strip_item] : FirstStrip(w, strip_item, c.strip_items);
  const size_t last_strip = known ? c.item_starts[strip_item + 1] : FirstStrip(w, strip_item + 1, c.strip_items);
  if (first_strip == last_strip) return;  // all values are in the strips of its neighbours
  MatMulJob job = c.job;
  job.rows = std::min(c.pass_rows, c.total_rows - first_row);
  job.x = static_cast<const uint8_t*>(job.x) + first_row * job.x_row_bytes;
  job.first_run = w.runs * part / c.k_parts;
  job.last_run = w.runs * (part + 1) / c.k_parts;
  // An item whose strips belong to several outputs is one job for each of them.
  for (size_t i = 0; i < c.outputs->size(); ++i) {
    const MatMulOutput& output = (*c.outputs)[i];
    const size_t end = output.first_strip + output.weights.strips;
    if (end <= first_strip || output.first_strip >= last_strip) continue;
    job.weights = &output.weights;
    job.first_strip = std::max(first_strip, output.first_strip) - output.first_strip;
    job.last_strip = std::min(last_strip, end) - output.first_strip;
    job.y_stride = c.partial != nullptr ? w.n : output.weights.n;
    job.y = (c.partial != nullptr ? c.partial + part * c.total_rows * w.n + output.first_column() : c.Floats(i)) +
            first_row * job.y_stride;
    job.bias = c.job.bias == nullptr ? nullptr : c.job.bias + output.first_column();
    job.epilogue = output.epilogue;
    c.kernel->multiply(job);
    if (c.partial == nullptr)
      c.Deliver(i, first_row, job.rows, job.first_strip * kStripColumns, job.last_strip * kStripColumns);
  }
}

// An output from the sums of all K parts, in ascending order; without K, all sums are zero.
void FinishOutput(const Call& c, size_t i) {
  const MatMulOutput& output = (*c.outputs)[i];
  const size_t n = c.weights->n, columns = output.weights.n;
  float* y = c.Floats(i);
  for (size_t m = 0; m < c.total_rows; ++m) {
    for (size_t column = 0; column < columns; ++column) {
      const size_t at = m * n + output.first_column() + column;
      float sum = c.k_parts == 0 ? 0 : c.partial[at];
      for (size_t p = 1; p < c.k_parts; ++p) sum += c.partial[p * c.total_rows * n + at];
      y[m * columns + column] = sum;
    }
  }
  const float* bias = c.job.bias == nullptr ? nullptr : c.job.bias + output.first_column();
  c.level->finish(y, columns, c.total_rows, columns, bias, output.epilogue);
  c.Deliver(i, 0, c.total_rows, 0, columns);
}

}  // namespace

void MatMul::Run(const void* x, size_t rows, const void* bias, void* const* y, void* scratch,
                 const ParallelFor& parallel) const noexcept {
  if (rows == 0 || weights_.n == 0) return;
  const Plan plan = PlanFor(rows);
  const auto floats = [&](size_t at) { return reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + at); };
  Call c = {};
  c.level = level_;
  c.kernel = plan.kernel;
  c.weights = &weights_;
  c.outputs = &outputs_;
  c.total_rows = rows;
  c.passes = plan.passes;
  c.pass_rows = plan.pass_rows;
  c.strip_items = plan.strip_items;
  c.item_starts = item_starts_.size() == plan.strip_items + 1 ? item_starts_.data() : nullptr;
  c.k_parts = weights_.k == 0 ? 0 : plan.k_parts;
  c.x = x;
  c.pack_rows = plan.pack_rows;
  c.y = y;
  c.job.x = plan.x_in_place ? x : scratch;
  c.job.x_row_bytes = plan.x_row_bytes;
  c.job.finish = c.k_parts == 1;
  c.job.bias = static_cast<const float*>(bias);
  if (c.k_parts > 1) c.partial = floats(plan.parts_at);
  if (element_ == Element::kFp16) {
    c.y_floats = floats(plan.y_at);
    c.x_floats = floats(plan.x_rows_at);
    if (bias != nullptr) {
      level_->halves_to_floats(static_cast<const uint16_t*>(bias), weights_.n, floats(plan.bias_at));
      c.job.bias = floats(plan.bias_at);
    }
  }

  const auto run = [&](size_t count, void (*body)(void*, size_t)) {
    if (count == 1) return body(&c, 0);
    parallel.run(parallel.host, count, body, &c);
  };
  if (c.k_parts > 0 && !plan.x_in_place) {
    run(plan.pack_items(), PackItem);
    const size_t used = rows * plan.x_row_bytes;
    std::memset(static_cast<uint8_t*>(scratch) + used, 0, plan.x_bytes - used);
  }
  if (c.k_parts > 0) run(plan.items(), MultiplyItem);
  if (c.k_parts == 1) return;
  for (size_t i = 0; i < outputs(); ++i) FinishOutput(c, i);
}

}  // namespace sparamx
