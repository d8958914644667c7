#include "runtime/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <thread>

#include "runtime/choice.h"
#include "runtime/cpu.h"

namespace sparamx {
namespace {

// Keys that one work item takes, at least, where one block of rows is all there is: the last part has what is left, up
// to twice as many. A shape alone decides it, as it changes the order of summation. An item costs about a microsecond
// (its streams, its queries), so where an entry of the batch would have many they are twice as long.
constexpr size_t kPartKeys = 512, kManyParts = 128;
// Keys that one work item writes to the cache.
constexpr size_t kAppendKeys = 256;
// More make no sense, and fewer leave every size that follows without an overflow.
constexpr size_t kMostHeads = size_t{1} << 16;
constexpr float kNothingSeen = -std::numeric_limits<float>::infinity();

// How many keys an entry of the batch has before this call, new in it, and then.
struct Lengths {
  size_t past, fresh, total;
  int64_t before;  // keys before those of the first query: fewer than none where there are more queries than keys
};

bool IsFirst(const AttentionCall& c) {
  return c.last_keys != nullptr && c.new_keys == c.total;
}

// As GroupQueryAttention has it: where the call brings as many tokens as the longest entry has keys, it is the first
// one, and shorter entries end in padding.
Lengths LengthsOf(const AttentionCall& c, size_t entry) {
  if (c.valid_keys != nullptr) {
    const auto valid = static_cast<size_t>(c.valid_keys[entry]);
    return {0, valid, valid, c.valid_keys[entry] - static_cast<int64_t>(c.queries)};
  }
  const auto from = [&](size_t past, size_t fresh) {
    return Lengths{past, fresh, past + fresh, static_cast<int64_t>(past)};
  };
  if (c.last_keys == nullptr) return from(c.past_capacity, c.new_keys);
  const size_t total = static_cast<size_t>(c.last_keys[entry]) + 1;
  return IsFirst(c) ? from(0, total) : from(total - c.new_keys, c.new_keys);
}

// Rotates the first 2 * half numbers of a head in pairs, scales all.
void RotateHead(const float* in, float* out, size_t size, const float* cos, const float* sin, size_t half,
                bool interleaved, float scale) {
  const size_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
  for (size_t i = 0; i < half; ++i) {
    const float a = in[i * step], b = in[i * step + apart];
    out[i * step] = (a * cos[i] - b * sin[i]) * scale;
    out[i * step + apart] = (b * cos[i] + a * sin[i]) * scale;
  }
  for (size_t i = 2 * half; i < size; ++i) out[i] = in[i] * scale;
}

// Where tokens are rotated to. On a first call GroupQueryAttention looks at one position alone and counts on from it.
int64_t PositionOf(const AttentionCall& c, const Lengths& lengths, size_t entry, size_t token) {
  if (c.positions == nullptr) return static_cast<int64_t>(lengths.past + token);
  if (!IsFirst(c)) return c.positions[entry * c.queries + token];
  // A position that cannot be counted on from is one that no cache has, either.
  const int64_t first = c.positions[0], most = std::numeric_limits<int64_t>::max() - static_cast<int64_t>(token);
  return first > most ? first : first + static_cast<int64_t>(token);
}

// The rows [first, last) of one head that are not new: copies the past ones, zeros those beyond the entry's keys.
void CopyPast(const float* past, float* present, size_t size, const Lengths& lengths, size_t first, size_t last) {
  const size_t copied = std::min(last, lengths.past), beyond = std::max(first, lengths.total);
  if (first < copied) std::memcpy(present + first * size, past + first * size, (copied - first) * size * sizeof(float));
  if (beyond < last) std::memset(present + beyond * size, 0, (last - beyond) * size * sizeof(float));
}

// One work item's own memory.
struct Slot {
  float *q, *sums, *turned, *scores, *max, *denominator;
  VisibleKeys* visible;
  const float **bias, **mask;
  // Of a packed cache: the kernel's, and a rotated key.
  uint8_t* packed;
  float* key;
};

// Hands out the parts of a buffer, each aligned to 64 bytes.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <class T>
  T* Take(size_t count) {
    T* const taken = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += RoundUp(count * sizeof(T), 64);
    return taken;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace

// How a call is split, and where its scratch lies.
struct Attention::Plan {
  size_t group;  // query heads that share a key and value head
  size_t rows;   // per key and value head: queries of its group
  size_t row_blocks, block_rows;
  size_t parts, part_keys;                             // along the keys
  bool in_place;                                       // keys and values are read where the call has them
  bool present_here;                                   // the host has no present: scratch stands in for it
  bool append_first;                                   // new keys are written before anything is read, not on the way
  size_t slots;                                        // work items that may run at a time
  size_t packed_bytes;                                 // scratch of the packed kernel, 0 without one
  size_t open_blocks;                                  // dense ones in scratch, per row of a packed cache
  size_t items() const { return row_blocks * parts; }  // per entry and key and value head

  Slot TakeSlot(Carver* carver, const AttentionCall& c) const {
    Slot s;
    s.q = carver->Take<float>(block_rows * c.key_size);
    s.sums = carver->Take<float>(block_rows * c.value_size);
    s.turned = carver->Take<float>(packed_bytes != 0 ? 0 : c.key_size * kKeyBlock);
    s.scores = carver->Take<float>(block_rows * kKeyBlock);
    s.max = carver->Take<float>(block_rows);
    s.denominator = carver->Take<float>(block_rows);
    s.visible = carver->Take<VisibleKeys>(block_rows);
    s.bias = carver->Take<const float*>(block_rows);
    s.mask = carver->Take<const float*>(block_rows);
    s.packed = carver->Take<uint8_t>(packed_bytes);
    s.key = carver->Take<float>(packed_bytes != 0 ? c.key_size : 0);
    return s;
  }
};

Attention::Plan Attention::PlanFor(const AttentionCall& c) const {
  Plan p;
  p.group = options_.heads / options_.kv_heads;
  p.rows = c.queries * p.group;
  p.row_blocks = std::max<size_t>(1, CeilDiv(p.rows, kRowBlock));
  p.block_rows = std::min(p.rows, kRowBlock);
  p.part_keys = c.total / kPartKeys * options_.kv_heads < kManyParts ? kPartKeys : 2 * kPartKeys;
  p.parts = p.row_blocks == 1 ? std::max<size_t>(1, c.total / p.part_keys) : 1;
  const bool packed = options_.packed;
  p.present_here = !packed && c.present_key == nullptr && (c.past_key != nullptr || c.cos != nullptr);
  p.in_place = !packed && c.present_key == nullptr && !p.present_here;
  p.append_first = !p.in_place && (p.row_blocks > 1 || p.rows == 0);
  p.slots = std::min(c.batch * options_.kv_heads * p.items(), 2 * CpuCount());
  p.packed_bytes = packed ? packed_kernel_->scratch_bytes(p.block_rows, c.key_size, c.value_size) : 0;
  p.open_blocks = packed ? CeilDiv(kCacheBlock - 1 + c.new_keys, kCacheBlock) : 0;
  return p;
}

// Everything that a work item needs.
struct Attention::Task {
  const Attention* attention;
  AttentionCall call;  // with present in scratch where the host has none
  Plan plan;
  float scale;
  std::atomic<uint32_t>* busy;  // [slots]
  uint8_t* slot_memory;
  size_t slot_bytes;
  uint8_t* open;                  // [batch][kv_heads][open_blocks] dense blocks
  std::atomic<uint64_t>* damage;  // the first damaged block, rows after rows; all ones: none was met
  // Results of parts: [batch][kv_heads][parts] of sums [rows][value_size], max [rows], denominator [rows].
  float* partial;

  static void RunAppend(void* user, size_t item) { static_cast<const Task*>(user)->AppendItem(item); }
  static void RunAttend(void* user, size_t item) { static_cast<const Task*>(user)->AttendItem(item); }
  static void RunCombine(void* user, size_t item) { static_cast<const Task*>(user)->CombineItem(item); }
  static void RunCommit(void* user, size_t item) { static_cast<const Task*>(user)->RowOf(item).Commit(); }

  size_t PartFloats() const { return plan.rows * (call.value_size + 2); }
  size_t Claim() const;
  CacheRow RowOf(size_t head) const;
  void PrepareRow(size_t entry, size_t kv_head, size_t first, size_t last, float* rotated) const;
  Status Damaged() const;
  const float* Keys(size_t head) const;
  const float* Values(size_t head) const;
  void AskAfter(size_t head, size_t end, size_t first_seen, AttentionJob* job) const;
  void AskAfterPacked(size_t head, size_t block, size_t first_block, PackedAttentionJob* job) const;
  void AttendPacked(AttentionJob rows, uint8_t* memory, size_t head, size_t first_seen, size_t first,
                    size_t last) const;
  void Append(size_t entry, size_t kv_head, size_t first, size_t last) const;
  void AppendItem(size_t item) const;
  VisibleKeys Visible(const Lengths& lengths, size_t token) const;
  void FillRows(const Slot& slot, size_t entry, size_t kv_head, size_t first_row, size_t rows) const;
  void AttendItem(size_t item) const;
  void CombineItem(size_t item) const;
  void Finish(size_t entry, size_t kv_head, size_t row, float max, float denominator, const float* sums) const;
};

Status Attention::Init(const Options& options) {
  options_ = options;
  const Level* level = nullptr;
  const Status status = ChooseLevel(options.isa, &level);
  if (!status.ok()) return status;
  kernel_ = &ChooseAttention(*level);
  packed_kernel_ = &ChoosePackedAttention(*level);
  if (options.heads > kMostHeads)
    return Status::Invalid("its " + std::to_string(options.heads) + " query heads are more than " +
                           std::to_string(kMostHeads));
  if (options.heads == 0 || options.kv_heads == 0 || options.heads % options.kv_heads != 0)
    return Status::Invalid("its " + std::to_string(options.heads) + " query heads cannot share " +
                           std::to_string(options.kv_heads) + " key and value heads equally");
  if (options.window == 0 || options.window < -1)
    return Status::Invalid("a window of " + std::to_string(options.window) + " keys makes no sense");
  if (options.window > 0 && !options.causal) return Status::Invalid("a window needs causal attention");
  if (!(options.softcap >= 0.0f)) return Status::Invalid("a softcap cannot be negative");
  return CheckCacheOptions(options.cache);
}

// What the rows of an entry hold before the call.
Status Attention::CheckPast(const AttentionCall& c, size_t entry, size_t past) const {
  if (past == 0) return {};
  for (size_t head = 0; head < options_.kv_heads; ++head) {
    const size_t row_bytes = c.layout.RowBytes(c.past_blocks);
    // Made where something is wrong: every call comes through here, and shall allocate nothing.
    const auto which = [&] {
      return "past_cache of entry " + std::to_string(entry) + ", head " + std::to_string(head) + ": ";
    };
    size_t stored = 0;
    const uint8_t* const row = c.past_cache + (entry * options_.kv_heads + head) * row_bytes;
    const Status status = ReadCacheHeader(c.layout, row, c.past_blocks, &stored);
    if (!status.ok()) return {status.code, which() + status.message};
    if (past > stored)
      return Status::Invalid(which() + "it holds " + std::to_string(stored) + " tokens, but the call has a past of " +
                             std::to_string(past));
    if (c.layout.PackedBlocks(past) != c.layout.PackedBlocks(stored))
      return Status::Invalid(which() + "of its " + std::to_string(stored) + " tokens, blocks after the first " +
                             std::to_string(past) + ", the past of the call, are packed already");
  }
  return {};
}

Status Attention::Check(const AttentionCall& c) const {
  for (size_t entry = 0; entry < c.batch; ++entry) {
    const auto which = [&] { return "entry " + std::to_string(entry) + " of the batch"; };
    if (c.last_keys != nullptr) {
      const int64_t total = static_cast<int64_t>(c.last_keys[entry]) + 1;
      if (total < 1 || static_cast<uint64_t>(total) > c.total)
        return Status::Invalid(
            "seqlens_k says that " + which() + " has " + std::to_string(total) +
            " tokens in all, which is not in 1 to total_sequence_length = " + std::to_string(c.total));
      if (!IsFirst(c) && static_cast<uint64_t>(total) < c.new_keys)
        return Status::Invalid("seqlens_k says that " + which() + " has " + std::to_string(total) +
                               " tokens in all, fewer than the " + std::to_string(c.new_keys) +
                               " that this call brings");
      const uint64_t past = IsFirst(c) ? 0 : static_cast<uint64_t>(total) - c.new_keys;
      if (past > c.past_capacity)
        return Status::Invalid(which() + " has a past of " + std::to_string(past) +
                               " tokens, but the past cache holds at most " + std::to_string(c.past_capacity));
    }
    if (c.valid_keys != nullptr && (c.valid_keys[entry] < 0 || static_cast<uint64_t>(c.valid_keys[entry]) > c.new_keys))
      return Status::Invalid("nonpad_kv_seqlen says that " + which() + " has " + std::to_string(c.valid_keys[entry]) +
                             " keys, but the call has " + std::to_string(c.new_keys));
    const Lengths lengths = LengthsOf(c, entry);
    if (options_.packed) {
      const Status status = CheckPast(c, entry, lengths.past);
      if (!status.ok()) return status;
    }
    for (size_t s = 0; c.cos != nullptr && s < std::min(c.queries, lengths.fresh); ++s) {
      const int64_t position = PositionOf(c, lengths, entry, s);
      if (position < 0 || static_cast<uint64_t>(position) >= c.rotary_positions)
        return Status::Invalid("token " + std::to_string(s) + " of " + which() + " has the position " +
                               std::to_string(position) + ", but cos_cache and sin_cache have " +
                               std::to_string(c.rotary_positions) + " rows");
    }
  }
  return {};
}

size_t Attention::ScratchBytes(const AttentionCall& c) const {
  const Plan plan = PlanFor(c);
  Carver carver(nullptr);
  carver.Take<std::atomic<uint32_t>>(plan.slots);
  Carver slot(nullptr);
  plan.TakeSlot(&slot, c);
  carver.Take<uint8_t>(plan.slots * slot.used());
  if (plan.parts > 1) carver.Take<float>(c.batch * options_.kv_heads * plan.parts * plan.rows * (c.value_size + 2));
  if (plan.present_here) {
    carver.Take<float>(c.batch * options_.kv_heads * c.total * c.key_size);
    carver.Take<float>(c.batch * options_.kv_heads * c.total * c.value_size);
  }
  if (options_.packed) {
    carver.Take<std::atomic<uint64_t>>(1);
    carver.Take<uint8_t>(c.batch * options_.kv_heads * plan.open_blocks * c.layout.dense_bytes);
  }
  return carver.used();
}

// A slot that nobody uses, the one that this thread had last if it can be, as its memory is in the thread's caches: a
// step over a packed cache takes 15 % less time. There are at least as many slots as threads, unless the host has more
// threads than twice the CPUs: then some wait here for others to finish.
size_t Attention::Task::Claim() const {
  thread_local size_t last = 0;
  for (size_t i = last % plan.slots;; i = (i + 1) % plan.slots) {
    if (busy[i].exchange(1, std::memory_order_acquire) == 0) return last = i;
    if (i + 1 == plan.slots) std::this_thread::yield();
  }
}

CacheRow Attention::Task::RowOf(size_t head) const {
  const AttentionCall& c = call;
  const Lengths lengths = LengthsOf(c, head / attention->options_.kv_heads);
  CacheRow row = {};
  row.layout = &c.layout;
  row.before = lengths.past;
  row.after = lengths.total;
  row.past_blocks = c.past_blocks;
  row.present_blocks = c.present_blocks;
  row.open = open + head * plan.open_blocks * c.layout.dense_bytes;
  if (c.past_cache != nullptr) row.past = c.past_cache + head * c.layout.RowBytes(c.past_blocks);
  if (c.present_cache != nullptr) row.present = c.present_cache + head * c.layout.RowBytes(c.present_blocks);
  return row;
}

// What Append does, for a packed cache: the tokens [first, last) of whole blocks; new ones stay in scratch.
void Attention::Task::PrepareRow(size_t entry, size_t kv_head, size_t first, size_t last, float* rotated) const {
  const AttentionCall& c = call;
  const Lengths lengths = LengthsOf(c, entry);
  const CacheRow row = RowOf(entry * attention->options_.kv_heads + kv_head);
  last = std::min(last, lengths.total);
  for (size_t t = first; t < last; t += kCacheBlock) row.Prepare(t / kCacheBlock);
  for (size_t t = std::max(first, lengths.past); t < last; ++t) {
    const size_t token = t - lengths.past;
    const float* key = c.key + c.key_strides.At(entry, token, kv_head);
    const float* const value = c.value + c.value_strides.At(entry, token, kv_head);
    if (c.cos != nullptr) {
      const size_t at = static_cast<size_t>(PositionOf(c, lengths, entry, token)) * c.rotary_half;
      RotateHead(key, rotated, c.key_size, c.cos + at, c.sin + at, c.rotary_half, attention->options_.interleaved,
                 1.0f);
      key = rotated;
    }
    WriteCacheToken(c.layout, key, value, t % kCacheBlock, row.Open(t / kCacheBlock));
  }
}

// What a thread most often reads after the blocks before `block`: those behind them, which stand one after the other,
// or the first ones of the next head.
void Attention::Task::AskAfterPacked(size_t head, size_t block, size_t first_block, PackedAttentionJob* job) const {
  CacheRow row = RowOf(head);
  if (!call.layout.IsPacked(block, row.before)) {
    if (head + 1 == call.batch * attention->options_.kv_heads) return;
    row = RowOf(head + 1);
    block = std::max(first_block, call.layout.sink_blocks);
    if (!call.layout.IsPacked(block, row.before)) return;
  }
  job->ahead = row.past + call.layout.PackedAt(block);
  job->ahead_bytes = std::min(kPackedBlocks, call.layout.ClosedBlocks(row.before) - block) * call.layout.packed_bytes;
}

// The visible blocks among the keys [first, last).
void Attention::Task::AttendPacked(AttentionJob rows, uint8_t* memory, size_t head, size_t first_seen, size_t first,
                                   size_t last) const {
  const CacheRow row = RowOf(head);
  PackedBlock blocks[kPackedBlocks];
  for (size_t t = first; t < last;) {
    PackedAttentionJob job = {rows, blocks, 0, nullptr, 0, memory};
    for (; t < last && job.count < kPackedBlocks; t += kCacheBlock) {
      PackedBlock& block = blocks[job.count++];
      row.Locate(t / kCacheBlock, &block.keys, &block.values);
      block.first_key = static_cast<uint32_t>(t);
      block.count = static_cast<uint32_t>(std::min(last - t, kCacheBlock));
    }
    AskAfterPacked(head, t / kCacheBlock, first_seen / kCacheBlock, &job);
    const size_t done = attention->packed_kernel_->attend(job);
    if (done == job.count) continue;
    const uint64_t place = head * CeilDiv(call.total, kCacheBlock) + blocks[done].first_key / kCacheBlock;
    uint64_t least = damage->load();
    while (place < least && !damage->compare_exchange_weak(least, place)) {
    }
    return;
  }
}

Status Attention::Task::Damaged() const {
  const uint64_t blocks = CeilDiv(call.total, kCacheBlock), head = *damage / blocks;
  const uint64_t kv_heads = attention->options_.kv_heads;
  return Status::Damaged("past_cache of entry " + std::to_string(head / kv_heads) + ", head " +
                         std::to_string(head % kv_heads) + ": the bitmap of block " + std::to_string(*damage % blocks) +
                         " does not have as many bits as there are numbers");
}

// Brings the cache rows [first, last) of one head into present: from the past unless it is the same memory, from the
// call's tokens, zeros beyond both.
void Attention::Task::Append(size_t entry, size_t kv_head, size_t first, size_t last) const {
  const AttentionCall& c = call;
  const Lengths lengths = LengthsOf(c, entry);
  const size_t head = entry * attention->options_.kv_heads + kv_head;
  float* const keys = c.present_key + head * c.capacity * c.key_size;
  float* const values = c.present_value + head * c.capacity * c.value_size;
  if (c.past_key != c.present_key) {
    const float* past = c.past_key == nullptr ? nullptr : c.past_key + head * c.past_capacity * c.key_size;
    CopyPast(past, keys, c.key_size, lengths, first, last);
  }
  if (c.past_value != c.present_value) {
    const float* past = c.past_value == nullptr ? nullptr : c.past_value + head * c.past_capacity * c.value_size;
    CopyPast(past, values, c.value_size, lengths, first, last);
  }
  for (size_t t = std::max(first, lengths.past); t < std::min(last, lengths.total); ++t) {
    const size_t token = t - lengths.past;
    const float* const key = c.key + c.key_strides.At(entry, token, kv_head);
    const float* const value = c.value + c.value_strides.At(entry, token, kv_head);
    if (c.cos != nullptr) {
      const size_t at = static_cast<size_t>(PositionOf(c, lengths, entry, token)) * c.rotary_half;
      RotateHead(key, keys + t * c.key_size, c.key_size, c.cos + at, c.sin + at, c.rotary_half,
                 attention->options_.interleaved, 1.0f);
    } else {
      std::memcpy(keys + t * c.key_size, key, c.key_size * sizeof(float));
    }
    std::memcpy(values + t * c.value_size, value, c.value_size * sizeof(float));
  }
}

void Attention::Task::AppendItem(size_t item) const {
  const size_t chunks = CeilDiv(call.capacity, kAppendKeys);
  const size_t first = item % chunks * kAppendKeys, head = item / chunks;
  const size_t kv_heads = attention->options_.kv_heads, last = std::min(call.capacity, first + kAppendKeys);
  if (!attention->options_.packed) return Append(head / kv_heads, head % kv_heads, first, last);
  const size_t claimed = Claim();
  Carver carver(slot_memory + claimed * slot_bytes);
  PrepareRow(head / kv_heads, head % kv_heads, first, last, plan.TakeSlot(&carver, call).key);
  busy[claimed].store(0, std::memory_order_release);
}

// The keys that a query sees: in causal attention its own is the last one, wherever the entry's keys end.
VisibleKeys Attention::Task::Visible(const Lengths& lengths, size_t token) const {
  const Attention::Options& options = attention->options_;
  int64_t first = 0, last = static_cast<int64_t>(lengths.total);
  if (options.causal) {
    const int64_t own = lengths.before + static_cast<int64_t>(token) + 1;
    last = std::max<int64_t>(0, std::min(last, own));
    if (options.window >= 0 && own > options.window) first = own - options.window;
  }
  if (call.bias.data != nullptr) last = std::min(last, static_cast<int64_t>(call.bias.keys));
  return {static_cast<uint32_t>(std::min(first, last)), static_cast<uint32_t>(last)};
}

// The rows [first_row, first_row + rows) of a group: rotated and scaled queries, what they see, and no sums yet.
void Attention::Task::FillRows(const Slot& slot, size_t entry, size_t kv_head, size_t first_row, size_t rows) const {
  const AttentionCall& c = call;
  const Attention::Options& options = attention->options_;
  const Lengths lengths = LengthsOf(c, entry);
  for (size_t r = 0; r < rows; ++r) {
    const size_t token = (first_row + r) / plan.group, head = kv_head * plan.group + (first_row + r) % plan.group;
    const bool is_padding = options.causal && c.last_keys != nullptr && token >= lengths.fresh;
    const float* const in = c.query + c.query_strides.At(entry, token, head);
    float* const out = slot.q + r * c.key_size;
    if (c.cos != nullptr && !is_padding) {
      const size_t at = static_cast<size_t>(PositionOf(c, lengths, entry, token)) * c.rotary_half;
      RotateHead(in, out, c.key_size, c.cos + at, c.sin + at, c.rotary_half, options.interleaved, scale);
    } else {
      for (size_t i = 0; i < c.key_size; ++i) out[i] = in[i] * scale;
    }
    slot.visible[r] = is_padding ? VisibleKeys{0, 0} : Visible(lengths, token);
    if (c.bias.data != nullptr) slot.bias[r] = c.bias.data + c.bias.strides.At(entry, token, head);
    if (c.mask.data != nullptr) slot.mask[r] = c.mask.data + c.mask.strides.At(entry, token, head);
    slot.max[r] = kNothingSeen;
    slot.denominator[r] = 0.0f;
  }
  std::memset(slot.sums, 0, rows * c.value_size * sizeof(float));
}

// The first key, and the first value, of a head; heads of all entries are counted one after the other.
const float* Attention::Task::Keys(size_t head) const {
  if (!plan.in_place) return call.present_key + head * call.capacity * call.key_size;
  const size_t kv_heads = attention->options_.kv_heads;
  return call.key + call.key_strides.At(head / kv_heads, 0, head % kv_heads);
}

const float* Attention::Task::Values(size_t head) const {
  if (!plan.in_place) return call.present_value + head * call.capacity * call.value_size;
  const size_t kv_heads = attention->options_.kv_heads;
  return call.value + call.value_strides.At(head / kv_heads, 0, head % kv_heads);
}

// What a thread most often reads after a block of keys: those behind it, of which there must be some up to `end`, or
// the first ones of the next head. Streams that begin at every head took a fifth of a step's time after 512 tokens.
void Attention::Task::AskAfter(size_t head, size_t end, size_t first_seen, AttentionJob* job) const {
  job->ahead_k = job->ahead_v = nullptr;
  if (job->k_stride != job->key_size || job->v_stride != job->value_size) return;
  size_t next = job->first_key + kKeyBlock;
  if (next + kKeyBlock / 2 > end) {
    if (++head == call.batch * attention->options_.kv_heads) return;
    next = first_seen / kKeyBlock * kKeyBlock;
  }
  job->ahead_k = Keys(head) + next * job->key_size;
  job->ahead_v = Values(head) + next * job->value_size;
}

void Attention::Task::AttendItem(size_t item) const {
  const AttentionCall& c = call;
  const size_t kv_heads = attention->options_.kv_heads;
  const size_t head = item / plan.items(), entry = head / kv_heads, kv_head = head % kv_heads;
  const size_t part = item % plan.parts;
  // The last rows of a causal prompt see most: they come first, so that no long item is left for the end.
  const size_t block = plan.row_blocks - 1 - item / plan.parts % plan.row_blocks;
  const size_t first_row = block * kRowBlock, rows = std::min(plan.rows - first_row, kRowBlock);
  const Lengths lengths = LengthsOf(c, entry);
  const size_t claimed = Claim();
  Carver carver(slot_memory + claimed * slot_bytes);
  Slot slot = plan.TakeSlot(&carver, c);
  if (plan.parts > 1) {
    slot.sums = partial + (head * plan.parts + part) * PartFloats();
    slot.max = slot.sums + rows * c.value_size;
    slot.denominator = slot.max + rows;
  }
  FillRows(slot, entry, kv_head, first_row, rows);

  const bool packed = attention->options_.packed;
  const bool append = !plan.in_place && !plan.append_first;
  const bool is_last_part = part + 1 == plan.parts;
  const size_t begin = part * plan.part_keys;
  const size_t end = is_last_part ? lengths.total : std::min(begin + plan.part_keys, lengths.total);
  const size_t first_seen = slot.visible[0].first;
  size_t last_seen = 0;  // rows at the end may be padding, which sees nothing
  for (size_t r = 0; r < rows; ++r) last_seen = std::max<size_t>(last_seen, slot.visible[r].last);
  AttentionJob job = {};
  job.q = slot.q;
  job.q_stride = job.key_size = c.key_size;
  job.rows = rows;
  job.sums_stride = job.value_size = c.value_size;
  job.k_stride = plan.in_place ? c.key_strides.token : c.key_size;
  job.v_stride = plan.in_place ? c.value_strides.token : c.value_size;
  job.visible = slot.visible;
  job.softcap = attention->options_.softcap;
  job.bias = c.bias.data == nullptr ? nullptr : slot.bias;
  job.mask = c.mask.data == nullptr ? nullptr : slot.mask;
  job.max = slot.max;
  job.denominator = slot.denominator;
  job.sums = slot.sums;
  job.turned = slot.turned;
  job.scores = slot.scores;
  if (packed) {
    if (append) PrepareRow(entry, kv_head, begin, end, slot.key);
    // The first block that some row sees, and the last.
    AttendPacked(job, slot.packed, head, first_seen, std::max(begin, first_seen / kCacheBlock * kCacheBlock),
                 std::min(end, RoundUp(last_seen, kCacheBlock)));
  }
  for (size_t t = begin; t < end && !packed; t += kKeyBlock) {
    const size_t block_end = std::min(end, t + kKeyBlock);
    if (append) Append(entry, kv_head, t, block_end);
    if (block_end <= first_seen || t >= last_seen) continue;
    job.first_key = static_cast<uint32_t>(t);
    job.keys = std::min(block_end, last_seen) - t;
    job.k = Keys(head) + t * job.k_stride;
    job.v = Values(head) + t * job.v_stride;
    AskAfter(head, std::min(lengths.total, last_seen), first_seen, &job);
    attention->kernel_->attend(job);
  }
  // What lies beyond a short entry's keys may begin in an earlier part, which has left it.
  if (append && is_last_part && !packed) Append(entry, kv_head, lengths.total, c.capacity);
  if (plan.parts == 1)
    for (size_t r = 0; r < rows; ++r)
      Finish(entry, kv_head, first_row + r, slot.max[r], slot.denominator[r], slot.sums + r * c.value_size);
  busy[claimed].store(0, std::memory_order_release);
}

// Adds up the parts of one head, in ascending order.
void Attention::Task::CombineItem(size_t item) const {
  const AttentionCall& c = call;
  const size_t rows = plan.rows, size = c.value_size;
  float* const first = partial + item * plan.parts * PartFloats();
  for (size_t r = 0; r < rows; ++r) {
    float max = kNothingSeen, denominator = 0.0f;
    for (size_t part = 0; part < plan.parts; ++part) max = std::max(max, first[part * PartFloats() + rows * size + r]);
    float* const sums = first + r * size;
    for (size_t part = 0; part < plan.parts; ++part) {
      const float* const from = first + part * PartFloats();
      const float part_max = from[rows * size + r];
      const float weight = part_max == kNothingSeen ? 0.0f : std::exp(part_max - max);
      denominator += from[rows * (size + 1) + r] * weight;
      for (size_t i = 0; i < size; ++i) sums[i] = (part == 0 ? 0.0f : sums[i]) + from[r * size + i] * weight;
    }
    Finish(item / attention->options_.kv_heads, item % attention->options_.kv_heads, r, max, denominator, sums);
  }
}

// Divides by the denominator, in which a sink takes part. A query that sees nothing gives zeros.
void Attention::Task::Finish(size_t entry, size_t kv_head, size_t row, float max, float denominator,
                             const float* sums) const {
  const AttentionCall& c = call;
  const Attention::Options& options = attention->options_;
  const size_t token = row / plan.group, head = kv_head * plan.group + row % plan.group;
  float factor = 1.0f;
  if (c.sink != nullptr || options.smooth) {
    const float sink = c.sink != nullptr ? c.sink[head] : 0.0f, top = std::max(max, sink);
    factor = max == kNothingSeen ? 0.0f : std::exp(max - top);
    denominator = denominator * factor + (sink == kNothingSeen ? 0.0f : std::exp(sink - top));
  }
  if (denominator != 0.0f) factor /= denominator;
  float* const out = c.output + c.output_strides.At(entry, token, head);
  for (size_t i = 0; i < c.value_size; ++i) out[i] = sums[i] * factor;
}

Status Attention::Run(const AttentionCall& call, void* scratch, const ParallelFor& parallel) const noexcept {
  const size_t kv_heads = options_.kv_heads;
  Task task = {};
  task.attention = this;
  task.call = call;
  task.plan = PlanFor(call);
  if (call.batch == 0) return {};
  task.scale = options_.scale != 0.0f ? options_.scale : 1.0f / std::sqrt(static_cast<float>(call.key_size));
  Carver carver(static_cast<uint8_t*>(scratch));
  task.busy = carver.Take<std::atomic<uint32_t>>(task.plan.slots);
  for (size_t i = 0; i < task.plan.slots; ++i) new (task.busy + i) std::atomic<uint32_t>(0);
  Carver slot(nullptr);
  task.plan.TakeSlot(&slot, call);
  task.slot_bytes = slot.used();
  task.slot_memory = carver.Take<uint8_t>(task.plan.slots * task.slot_bytes);
  if (task.plan.parts > 1)
    task.partial = carver.Take<float>(call.batch * kv_heads * task.plan.parts * task.PartFloats());
  if (task.plan.present_here) {
    task.call.capacity = call.total;
    task.call.present_key = carver.Take<float>(call.batch * kv_heads * call.total * call.key_size);
    task.call.present_value = carver.Take<float>(call.batch * kv_heads * call.total * call.value_size);
  }
  if (options_.packed) {
    task.damage = new (carver.Take<std::atomic<uint64_t>>(1)) std::atomic<uint64_t>(~uint64_t{0});
    task.open = carver.Take<uint8_t>(call.batch * kv_heads * task.plan.open_blocks * call.layout.dense_bytes);
    task.call.capacity = call.total;
  }
  auto run = [&](size_t count, void (*body)(void*, size_t)) {
    if (count == 0) return;
    if (count == 1) return body(&task, 0);
    parallel.run(parallel.host, count, body, &task);
  };
  if (task.plan.append_first) run(call.batch * kv_heads * CeilDiv(task.call.capacity, kAppendKeys), Task::RunAppend);
  if (task.plan.rows != 0) run(call.batch * kv_heads * task.plan.items(), Task::RunAttend);
  if (task.damage != nullptr && task.damage->load() != ~uint64_t{0}) return task.Damaged();
  if (task.plan.rows != 0 && task.plan.parts > 1) run(call.batch * kv_heads, Task::RunCombine);
  if (call.present_cache != nullptr) run(call.batch * kv_heads, Task::RunCommit);
  return {};
}

}  // namespace sparamx
