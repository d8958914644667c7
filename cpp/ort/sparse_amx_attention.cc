#include "ort/sparse_amx_attention.h"

#include <algorithm>
#include <limits>

namespace sparamx {
namespace {

constexpr size_t kRoles = static_cast<size_t>(Role::kCount);

struct RoleRule {
  const char* name;
  ONNXTensorElementDataType type;
};
constexpr RoleRule kRoleRules[kRoles] = {
    {"key", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"value", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"past_key", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"past_value", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"past_cache", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
    {"seqlens_k", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {"total_sequence_length", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {"cos_cache", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"sin_cache", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"position_ids", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
    {"attention_bias", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"key_padding_mask", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {"head_sink", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"nonpad_kv_seqlen", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
};
// Roles that make sense only together.
constexpr Role kPairs[][2] = {{Role::kPastKey, Role::kPastValue},
                              {Role::kSeqlensK, Role::kTotalSequenceLength},
                              {Role::kCosCache, Role::kSinCache}};

// Keys and positions are counted in 32 bits.
constexpr size_t kMostKeys = 0x7fffffff;
// Numbers of a head. A tensor without elements may claim any length: no size that follows from this one overflows.
constexpr size_t kMostNumbers = size_t{1} << 20;

const char* NameOf(Role role) {
  return kRoleRules[static_cast<size_t>(role)].name;
}

const Tensor& At(const std::array<Tensor, kRoles>& inputs, Role role) {
  return inputs[static_cast<size_t>(role)];
}

int64_t Signed(size_t value) {
  return static_cast<int64_t>(value);
}

Shape ShapeOf(std::initializer_list<int64_t> lengths) {
  Shape shape(lengths.size());
  std::copy(lengths.begin(), lengths.end(), shape.begin());
  return shape;
}

}  // namespace

void SparseAMXAttentionKernel::Fail(const Status& status) const {
  FailNode("SparseAMXAttention", name_, status);
}

SparseAMXAttentionKernel::SparseAMXAttentionKernel(const OrtApi& api, const OrtKernelInfo* raw_info)
    : api_(api), cpu_memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
  const Ort::ConstKernelInfo info(raw_info);
  name_ = info.GetNodeName();
  const int64_t heads = IntAttribute(info, "num_heads"), kv_heads = IntAttribute(info, "kv_num_heads");
  options_.heads = static_cast<size_t>(std::max<int64_t>(0, heads));
  options_.kv_heads = static_cast<size_t>(std::max<int64_t>(0, kv_heads));
  options_.scale = FloatAttribute(info, "scale", 0.0f);
  options_.softcap = FloatAttribute(info, "softcap", 0.0f);
  options_.window = IntAttribute(info, "local_window_size", -1);
  options_.causal = IntAttribute(info, "causal", 1) != 0;
  options_.interleaved = IntAttribute(info, "rotary_interleaved", 0) != 0;
  options_.smooth = IntAttribute(info, "smooth_softmax", 0) != 0;
  mask_filter_value_ = FloatAttribute(info, "mask_filter_value", -10000.0f);
  const std::string cache = StringAttribute(info, "cache", "float");
  if (cache != "float" && cache != "packed")
    Fail(Status::Invalid("its attribute cache is '" + cache + "', but it must be float or packed"));
  options_.packed = cache == "packed";
  options_.cache.key_sparsity = FloatAttribute(info, "k_sparsity", 0.0f);
  options_.cache.value_sparsity = FloatAttribute(info, "v_sparsity", 0.0f);
  // Negative ones become too large.
  options_.cache.sink = static_cast<size_t>(IntAttribute(info, "sink", 0));
  options_.cache.recent = static_cast<size_t>(IntAttribute(info, "recent", 0));
  ReadRoles(StringAttribute(info, "roles", ""));
  CheckRoles();
  CheckOutputs(info);
  const Status status = attention_.Init(options_);
  if (!status.ok()) Fail(status);
}

void SparseAMXAttentionKernel::ReadRoles(const std::string& roles) {
  for (const std::string& name : Words(roles)) {
    size_t role = 0;
    while (role < kRoles && name != kRoleRules[role].name) ++role;
    if (role == kRoles) Fail(Status::Invalid("its attribute roles names '" + name + "', which is no role"));
    if (Has(static_cast<Role>(role))) Fail(Status::Invalid("its attribute roles names " + name + " twice"));
    roles_.push_back(static_cast<Role>(role));
  }
}

void SparseAMXAttentionKernel::CheckRoles() const {
  for (const auto& pair : kPairs)
    if (Has(pair[0]) != Has(pair[1]))
      Fail(Status::Invalid(std::string("its attribute roles must name ") + NameOf(pair[0]) + " and " + NameOf(pair[1]) +
                           " both or neither"));
  if (Has(Role::kValue) && !Has(Role::kKey)) Fail(Status::Invalid("its attribute roles name value, but not key"));
  for (const Role role : {Role::kPastKey, Role::kPastCache, Role::kSeqlensK, Role::kCosCache})
    if (Has(Role::kNonpadKvSeqlen) && Has(role))
      Fail(Status::Invalid(std::string("nonpad_kv_seqlen cannot go with ") + NameOf(role)));
  if (Has(Role::kNonpadKvSeqlen) && options_.packed)
    Fail(Status::Invalid("nonpad_kv_seqlen cannot go with a packed cache"));
  const Role other = options_.packed ? Role::kPastKey : Role::kPastCache;
  if (Has(other))
    Fail(Status::Invalid(std::string("its cache is ") + (options_.packed ? "packed" : "float") +
                         ", so it cannot have the input " + NameOf(other)));
  if (Has(Role::kPositionIds) && !Has(Role::kCosCache))
    Fail(Status::Invalid("position_ids need cos_cache and sin_cache"));
  if (Has(Role::kCosCache) && !options_.causal) Fail(Status::Invalid("cos_cache needs causal attention"));
}

void SparseAMXAttentionKernel::CheckOutputs(const Ort::ConstKernelInfo& info) const {
  constexpr const char* kNames[SparseAMXAttention::kOutputs] = {"output", "present_key", "present_value",
                                                                "present_cache"};
  for (size_t i = SparseAMXAttention::kPresentKey; i < info.GetOutputCount(); ++i)
    if (options_.packed != (i == SparseAMXAttention::kPresentCache) && !info.GetOutputName(i).empty())
      Fail(Status::Invalid(std::string("its cache is ") + (options_.packed ? "packed" : "float") +
                           ", so it cannot have the output " + kNames[i]));
}

bool SparseAMXAttentionKernel::Has(Role role) const {
  return std::find(roles_.begin(), roles_.end(), role) != roles_.end();
}

OrtStatusPtr SparseAMXAttentionKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return StatusOf(api_, [&] { Compute(context); });
}

void SparseAMXAttentionKernel::Expect(const Tensor& tensor, const char* name, const Shape& shape) const {
  if (!std::equal(tensor.shape.begin(), tensor.shape.end(), shape.begin(), shape.end()))
    Fail(Status::Invalid(std::string(name) + " has the shape " + ShapeText(tensor.shape) + ", but it must be " +
                         ShapeText(shape)));
}

void SparseAMXAttentionKernel::ReadInputs(OrtKernelContext* context, Tensor* query, Inputs* inputs) const {
  size_t count = 0;
  Ort::ThrowOnError(api_.KernelContext_GetInputCount(context, &count));
  if (count != roles_.size() + 1)
    Fail(Status::Invalid("it has " + std::to_string(count - 1) +
                         " inputs after the query, but its attribute roles names " + std::to_string(roles_.size())));
  *query = ReadInput(api_, context, SparseAMXAttention::kQuery);
  for (size_t i = 0; i < roles_.size(); ++i) {
    Tensor& tensor = (*inputs)[static_cast<size_t>(roles_[i])];
    tensor = ReadInput(api_, context, i + 1);
    const RoleRule& rule = kRoleRules[static_cast<size_t>(roles_[i])];
    const bool is_choice = roles_[i] == Role::kAttentionBias && tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    if (tensor.type != rule.type && !is_choice)
      Fail(Status::Invalid(std::string(rule.name) + " does not have the element type that its role asks for"));
  }
}

// Layouts: [batch, tokens, heads * size], [batch, heads, tokens, size], and, where `pack` of query, key and value stand
// side by side at each head, [batch, tokens, heads, pack, size].
Heads SparseAMXAttentionKernel::ReadHeads(const Tensor& tensor, const char* name, size_t heads, size_t pack) const {
  const Shape& s = tensor.shape;
  const int64_t h = Signed(heads), p = Signed(pack);
  const auto view = [&](int64_t token_count, int64_t length, bool by_head) {
    const auto tokens = static_cast<size_t>(token_count), size = static_cast<size_t>(length);
    if (size == 0 || size > kMostNumbers)
      Fail(Status::Invalid(std::string(name) + " has the shape " + ShapeText(s) +
                           ", but it must have heads of some size, of at most " + std::to_string(kMostNumbers) +
                           " numbers"));
    const size_t entry = tokens * heads * size * pack, head = (by_head ? tokens : 1) * size * pack;
    return Heads{static_cast<const float*>(tensor.data),
                 static_cast<size_t>(s[0]),
                 tokens,
                 size,
                 {entry, by_head ? size : heads * size * pack, head}};
  };
  if (pack == 1 && s.size() == 3 && s[2] % h == 0) return view(s[1], s[2] / h, false);
  if (pack == 1 && s.size() == 4 && s[1] == h) return view(s[2], s[3], true);
  if (pack > 1 && s.size() == 5 && s[2] == h && s[3] == p) return view(s[1], s[4], false);
  const std::string count = std::to_string(heads);
  Fail(Status::Invalid(std::string(name) + " has the shape " + ShapeText(s) + ", but it must be " +
                       (pack > 1
                            ? "[batch, tokens, " + count + ", " + std::to_string(pack) + ", size]"
                            : "[batch, tokens, a multiple of " + count + "] or [batch, " + count + ", tokens, size]")));
}

// Query, key and value, of which all three, or the last two, may lie in one tensor.
void SparseAMXAttentionKernel::SetTokens(const Tensor& query, const Inputs& inputs, AttentionCall* call) const {
  const size_t heads = options_.heads, kv_heads = options_.kv_heads;
  const bool all_in_one = !Has(Role::kKey), is_interleaved = all_in_one && query.shape.size() == 5;
  Heads q =
      ReadHeads(query, "query", all_in_one && !is_interleaved ? heads + 2 * kv_heads : heads, is_interleaved ? 3 : 1);
  Heads k = q, v = q;
  if (is_interleaved) {
    if (heads != kv_heads) Fail(Status::Invalid("query, key and value side by side at each head need equally many"));
    k.data = q.data + q.size;
    v.data = k.data + q.size;
  } else if (all_in_one) {
    k.data = q.data + heads * q.strides.head;
    v.data = k.data + kv_heads * q.strides.head;
  } else {
    k = v = ReadHeads(At(inputs, Role::kKey), "key", kv_heads, Has(Role::kValue) ? 1 : 2);
    if (Has(Role::kValue))
      v = ReadHeads(At(inputs, Role::kValue), "value", kv_heads, 1);
    else
      v.data = k.data + k.size;
  }
  // Where tokens are counted from the cache's end or rotated, keys are those of the queries.
  const bool same_tokens = options_.causal && (Has(Role::kSeqlensK) || Has(Role::kCosCache) || options_.packed);
  const auto expect = [&](Role role, const Heads& x, size_t tokens, size_t size) {
    if (x.batch != q.batch || x.tokens != tokens || x.size != size)
      Fail(Status::Invalid(std::string(NameOf(role)) + " has the shape " + ShapeText(At(inputs, role).shape) +
                           ", which is not that of " + std::to_string(q.batch) + " entries of " +
                           std::to_string(tokens) + " tokens of " + std::to_string(kv_heads) + " heads of " +
                           std::to_string(size)));
  };
  if (!all_in_one) expect(Role::kKey, k, same_tokens ? q.tokens : k.tokens, q.size);
  if (Has(Role::kValue)) expect(Role::kValue, v, k.tokens, v.size);
  call->batch = q.batch;
  call->queries = q.tokens;
  call->new_keys = k.tokens;
  call->key_size = q.size;
  call->value_size = v.size;
  call->query = q.data;
  call->key = k.data;
  call->value = v.data;
  call->query_strides = q.strides;
  call->key_strides = k.strides;
  call->value_strides = v.strides;
}

// The cache before this call, and how many tokens there are in all.
void SparseAMXAttentionKernel::SetPast(const Inputs& inputs, AttentionCall* call) const {
  if (Has(Role::kPastKey)) {
    const Tensor &key = At(inputs, Role::kPastKey), &value = At(inputs, Role::kPastValue);
    const int64_t capacity = key.shape.size() == 4 ? key.shape[2] : 0;
    Expect(key, "past_key",
           ShapeOf({Signed(call->batch), Signed(options_.kv_heads), capacity, Signed(call->key_size)}));
    Expect(value, "past_value",
           ShapeOf({Signed(call->batch), Signed(options_.kv_heads), capacity, Signed(call->value_size)}));
    call->past_key = static_cast<const float*>(key.data);
    call->past_value = static_cast<const float*>(value.data);
    call->past_capacity = static_cast<size_t>(capacity);
  }
  if (Has(Role::kNonpadKvSeqlen)) {
    Expect(At(inputs, Role::kNonpadKvSeqlen), "nonpad_kv_seqlen", ShapeOf({Signed(call->batch)}));
    call->valid_keys = static_cast<const int64_t*>(At(inputs, Role::kNonpadKvSeqlen).data);
  }
  SetTotal(inputs, call);
}

// A packed cache tells how many tokens it holds; seqlens_k may tell of fewer.
void SparseAMXAttentionKernel::SetPackedPast(const Inputs& inputs, AttentionCall* call) const {
  call->layout = CacheLayout(options_.cache, call->key_size, call->value_size);
  if (Has(Role::kPastCache)) {
    const Tensor& cache = At(inputs, Role::kPastCache);
    const int64_t bytes = cache.shape.size() == 3 ? cache.shape[2] : 0;
    Expect(cache, "past_cache", ShapeOf({Signed(call->batch), Signed(options_.kv_heads), bytes}));
    if (bytes != 0) {
      if (!call->layout.BlocksOfRow(static_cast<size_t>(bytes), &call->past_blocks))
        Fail(Status::Invalid("past_cache has rows of " + std::to_string(bytes) + " bytes, but they must have 0 or " +
                             std::to_string(call->layout.RowBytes(0)) + " and a multiple of " +
                             std::to_string(call->layout.packed_bytes)));
      call->past_cache = static_cast<const uint8_t*>(cache.data);
      if (Has(Role::kSeqlensK)) {
        call->past_capacity = call->layout.Capacity(call->past_blocks);
      } else if (call->batch > 0) {
        const Status status = ReadCacheHeader(call->layout, call->past_cache, call->past_blocks, &call->past_capacity);
        if (!status.ok()) Fail({status.code, "past_cache of entry 0, head 0: " + status.message});
      }
    }
  }
  SetTotal(inputs, call);
  call->present_blocks = std::max(call->past_blocks, call->layout.PackedBlocks(call->total));
}

void SparseAMXAttentionKernel::SetTotal(const Inputs& inputs, AttentionCall* call) const {
  call->total = call->past_capacity + call->new_keys;
  if (Has(Role::kSeqlensK)) {
    const Tensor &last = At(inputs, Role::kSeqlensK), &total = At(inputs, Role::kTotalSequenceLength);
    if (last.elements != call->batch || last.shape.empty() || last.shape[0] != Signed(call->batch))
      Fail(Status::Invalid("seqlens_k has the shape " + ShapeText(last.shape) + ", but it must be [" +
                           std::to_string(call->batch) + "]"));
    if (total.elements != 1)
      Fail(Status::Invalid("total_sequence_length has the shape " + ShapeText(total.shape) +
                           ", but it must be one number"));
    const int32_t keys = *static_cast<const int32_t*>(total.data);
    if (keys < 0 || static_cast<size_t>(keys) < call->new_keys ||
        static_cast<size_t>(keys) > call->past_capacity + call->new_keys)
      Fail(Status::Invalid("total_sequence_length is " + std::to_string(keys) + ", which is not in " +
                           std::to_string(call->new_keys) + " to " +
                           std::to_string(call->past_capacity + call->new_keys) +
                           ", the tokens of this call alone and with a full past"));
    call->last_keys = static_cast<const int32_t*>(last.data);
    call->total = static_cast<size_t>(keys);
  }
  call->capacity = std::max(call->past_capacity, call->total);
  if (call->capacity > kMostKeys) Fail(Status::Invalid("its cache has more tokens than 32 bits can count"));
}

void SparseAMXAttentionKernel::SetRotary(const Inputs& inputs, AttentionCall* call) const {
  if (!Has(Role::kCosCache)) return;
  const Tensor &cos = At(inputs, Role::kCosCache), &sin = At(inputs, Role::kSinCache);
  if (cos.shape.size() != 2 || cos.shape[1] > Signed(call->key_size / 2))
    Fail(Status::Invalid("cos_cache has the shape " + ShapeText(cos.shape) + ", but it must be [positions, at most " +
                         std::to_string(call->key_size / 2) + "]"));
  Expect(sin, "sin_cache", cos.shape);
  call->cos = static_cast<const float*>(cos.data);
  call->sin = static_cast<const float*>(sin.data);
  call->rotary_positions = static_cast<size_t>(cos.shape[0]);
  call->rotary_half = static_cast<size_t>(cos.shape[1]);
  if (!Has(Role::kPositionIds)) return;
  const Tensor& positions = At(inputs, Role::kPositionIds);
  Expect(positions, "position_ids", ShapeOf({Signed(call->batch), Signed(call->queries)}));
  call->positions = static_cast<const int64_t*>(positions.data);
}

// Numbers or truths whose shape, from its end, is [batch, heads, queries, keys], of which all but the last may be 1.
void SparseAMXAttentionKernel::SetBias(const Inputs& inputs, AttentionCall* call) const {
  if (!Has(Role::kAttentionBias)) return;
  const Tensor& bias = At(inputs, Role::kAttentionBias);
  const int64_t whole[] = {Signed(call->batch), Signed(options_.heads), Signed(call->queries), Signed(call->total)};
  size_t* const strides[] = {&call->bias.strides.entry, &call->bias.strides.head, &call->bias.strides.token};
  const size_t rank = bias.shape.size();
  // Fewer keys hide the others, but where the lengths of the entries are given, they are known to all.
  bool fits = rank >= 1 && rank <= 4 &&
              (bias.shape.back() == whole[3] || (bias.shape.back() < whole[3] && !Has(Role::kSeqlensK)));
  size_t step = fits ? static_cast<size_t>(bias.shape.back()) : 0;
  call->bias.keys = step;
  for (size_t i = 2; fits && i + rank >= 4 && i < 3; --i) {
    const int64_t length = bias.shape[i + rank - 4];
    fits = length == 1 || length == whole[i];
    *strides[i] = length == 1 ? 0 : step;
    step *= static_cast<size_t>(length);
  }
  if (!fits)
    Fail(Status::Invalid("attention_bias has the shape " + ShapeText(bias.shape) + ", but it must be " +
                         ShapeText(ShapeOf({whole[0], whole[1], whole[2], whole[3]})) +
                         ", where each but the last may be 1 or, in the front, missing"));
  call->bias.data = static_cast<const float*>(bias.data);  // or truths, see WriteAdded
}

// Truths of [batch, total] or [batch, queries, total], or [batch] numbers of keys that count.
void SparseAMXAttentionKernel::SetMask(const Inputs& inputs, AttentionCall* call) const {
  if (!Has(Role::kKeyPaddingMask)) return;
  const Tensor& mask = At(inputs, Role::kKeyPaddingMask);
  const int64_t batch = Signed(call->batch), total = Signed(call->total), queries = Signed(call->queries);
  if (mask.shape.size() == 1)
    Expect(mask, "key_padding_mask", ShapeOf({batch}));
  else if (mask.shape.size() == 3)
    Expect(mask, "key_padding_mask", ShapeOf({batch, queries, total}));
  else
    Expect(mask, "key_padding_mask", ShapeOf({batch, total}));
  call->mask.keys = call->total;
  call->mask.strides.token = mask.shape.size() == 3 ? call->total : 0;
  call->mask.strides.entry = mask.shape.size() == 3 ? call->queries * call->total : call->total;
}

void SparseAMXAttentionKernel::SetSink(const Inputs& inputs, AttentionCall* call) const {
  if (!Has(Role::kHeadSink)) return;
  Expect(At(inputs, Role::kHeadSink), "head_sink", ShapeOf({Signed(options_.heads)}));
  call->sink = static_cast<const float*>(At(inputs, Role::kHeadSink).data);
}

// How many floats WriteAdded writes.
size_t SparseAMXAttentionKernel::AddedFloats(const Inputs& inputs, const AttentionCall& call) const {
  const Tensor &bias = At(inputs, Role::kAttentionBias), &mask = At(inputs, Role::kKeyPaddingMask);
  return (bias.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL ? bias.elements : 0) +
         (mask.shape.size() == 1 ? call.batch * call.total : mask.elements);
}

// Masks as what they add to the scores.
void SparseAMXAttentionKernel::WriteAdded(const Inputs& inputs, float* added, AttentionCall* call) const {
  const Tensor &bias = At(inputs, Role::kAttentionBias), &mask = At(inputs, Role::kKeyPaddingMask);
  if (bias.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL) {
    const auto* const sees = static_cast<const uint8_t*>(bias.data);
    for (size_t i = 0; i < bias.elements; ++i) added[i] = sees[i] != 0 ? 0.0f : -std::numeric_limits<float>::infinity();
    call->bias.data = added;
    added += bias.elements;
  }
  if (mask.data == nullptr) return;
  const auto* const sees = static_cast<const int32_t*>(mask.data);
  call->mask.data = added;
  if (mask.shape.size() != 1) {
    for (size_t i = 0; i < mask.elements; ++i) added[i] = sees[i] != 0 ? 0.0f : mask_filter_value_;
    return;
  }
  for (size_t entry = 0; entry < call->batch; ++entry)
    for (size_t t = 0; t < call->total; ++t) *added++ = Signed(t) < sees[entry] ? 0.0f : mask_filter_value_;
}

// Where the host has refused a present cache because its one buffer is full, says so.
void SparseAMXAttentionKernel::CheckRoom(const AttentionCall& call) const {
  const bool has_past = options_.packed ? call.past_cache != nullptr : call.past_key != nullptr;
  const size_t room = options_.packed ? call.layout.Capacity(call.past_blocks) : call.past_capacity;
  if (!has_past || call.total <= room) return;
  Fail(Status::Invalid("with the tokens of this call its cache has " + std::to_string(call.total) +
                       " tokens, but the buffer given for past and present has room for " + std::to_string(room)));
}

// One buffer for past and present must be of one shape: in a larger one, rows have other places.
void SparseAMXAttentionKernel::CheckOneBuffer(const AttentionCall& call) const {
  const size_t rows = call.batch * options_.kv_heads;
  const bool is_one = options_.packed ? call.past_cache != nullptr && call.past_cache == call.present_cache
                                      : (call.past_key != nullptr && call.past_key == call.present_key) ||
                                            (call.past_value != nullptr && call.past_value == call.present_value);
  const bool has_one_shape =
      options_.packed ? call.past_blocks == call.present_blocks : rows <= 1 || call.past_capacity == call.capacity;
  if (is_one && !has_one_shape) Fail(Status::Invalid("past and present are one buffer, but of different shapes"));
}

void SparseAMXAttentionKernel::SetOutputs(OrtKernelContext* context, size_t query_rank, AttentionCall* call) const {
  size_t outputs = 0;
  Ort::ThrowOnError(api_.KernelContext_GetOutputCount(context, &outputs));
  const auto output = [&](size_t index, const Shape& shape) -> void* {
    if (index >= outputs) return nullptr;
    try {
      return MakeOutput(api_, context, index, shape);
    } catch (const Ort::Exception&) {
      if (index != SparseAMXAttention::kOutput) CheckRoom(*call);
      throw;
    }
  };
  const int64_t batch = Signed(call->batch), kv_heads = Signed(options_.kv_heads), capacity = Signed(call->capacity);
  const int64_t queries = Signed(call->queries), heads = Signed(options_.heads), size = Signed(call->value_size);
  const bool by_head = query_rank == 4;
  call->output =
      static_cast<float*>(output(SparseAMXAttention::kOutput, by_head ? ShapeOf({batch, heads, queries, size})
                                                                      : ShapeOf({batch, queries, heads * size})));
  call->output_strides.entry = options_.heads * call->queries * call->value_size;
  call->output_strides.token = (by_head ? 1 : options_.heads) * call->value_size;
  call->output_strides.head = (by_head ? call->queries : 1) * call->value_size;
  if (options_.packed) {
    call->present_cache =
        static_cast<uint8_t*>(output(SparseAMXAttention::kPresentCache,
                                     ShapeOf({batch, kv_heads, Signed(call->layout.RowBytes(call->present_blocks))})));
    return;
  }
  call->present_key = static_cast<float*>(
      output(SparseAMXAttention::kPresentKey, ShapeOf({batch, kv_heads, capacity, Signed(call->key_size)})));
  call->present_value = static_cast<float*>(
      output(SparseAMXAttention::kPresentValue, ShapeOf({batch, kv_heads, capacity, Signed(call->value_size)})));
  if ((call->present_key == nullptr) != (call->present_value == nullptr))
    Fail(Status::Invalid("it must have both outputs present_key and present_value, or neither"));
  if (call->valid_keys != nullptr && call->present_key != nullptr)
    Fail(Status::Invalid("nonpad_kv_seqlen cannot go with the output present_key"));
}

void SparseAMXAttentionKernel::Compute(OrtKernelContext* context) const {
  Tensor query;
  Inputs inputs;
  ReadInputs(context, &query, &inputs);
  AttentionCall call;
  SetTokens(query, inputs, &call);
  if (options_.packed)
    SetPackedPast(inputs, &call);
  else
    SetPast(inputs, &call);
  SetRotary(inputs, &call);
  SetBias(inputs, &call);
  SetMask(inputs, &call);
  SetSink(inputs, &call);
  const Status status = attention_.Check(call);
  if (!status.ok()) Fail(status);
  SetOutputs(context, query.shape.size(), &call);
  CheckOneBuffer(call);

  const size_t bytes = RoundUp(attention_.ScratchBytes(call), 64);
  Scratch scratch(api_, context, cpu_memory_, bytes + AddedFloats(inputs, call) * sizeof(float));
  WriteAdded(inputs, reinterpret_cast<float*>(static_cast<uint8_t*>(scratch.get()) + bytes), &call);
  Host host = {&api_, context};
  const Status result = attention_.Run(call, scratch.get(), {Host::ParallelRun, &host});
  if (!result.ok()) Fail(result);
}

OrtStatusPtr SparseAMXAttention::CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info,
                                                void** kernel) const noexcept {
  return StatusOf(api, [&] { *kernel = new SparseAMXAttentionKernel(api, info); });
}

// The output has the query's shape, but for the last dimension where keys or values lie in the query or differ in size.
// Without this, ONNX Runtime loses the fusions around the node.
OrtStatusPtr SparseAMXAttention::InferOutputShapes(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
  return StatusOf(Ort::GetApi(), [&] {
    InferredShape shape = InferredInputShape(context, kQuery);
    const std::vector<int64_t> heads = InferredInts(context, "num_heads"),
                               kv_heads = InferredInts(context, "kv_num_heads");
    const size_t rank = shape.lengths.size();
    if (rank < 3 || rank > 5 || heads.size() != 1 || kv_heads.size() != 1) return;
    const std::string roles = "," + InferredString(context, "roles") + ",";
    const auto input_of = [&](const char* role) {
      const size_t at = roles.find(role);
      return at == std::string::npos ? 0 : static_cast<size_t>(std::count(roles.begin(), roles.begin() + at + 1, ','));
    };
    // The tensor in which the values lie, and how many heads are side by side in its last dimension.
    const size_t value = input_of(",value,"), key = input_of(",key,"), input = value != 0 ? value : key;
    const InferredShape from = input == 0 ? shape : InferredInputShape(context, input);
    if (from.lengths.size() < 3) return;
    const int64_t width = from.lengths.back();
    const int64_t parts = from.lengths.size() > 3 ? 1 : input == 0 ? heads[0] + 2 * kv_heads[0] : kv_heads[0];
    const bool known = width > 0 && parts > 0 && width % parts == 0;
    if (rank == 5) {  // [batch, tokens, heads, 3, size]
      shape.lengths.resize(3);
      shape.names.resize(3);
    }
    shape.SetLength(rank == 4 ? 3 : 2, known ? width / parts * (rank == 4 ? 1 : heads[0]) : -1);
    InferOutput(context, kOutput, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  });
}

}  // namespace sparamx
