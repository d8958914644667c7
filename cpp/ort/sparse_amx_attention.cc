#include "ort/sparse_amx_attention.h"

#include <algorithm>

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
};
// Roles that make sense only together.
constexpr Role kPairs[][2] = {{Role::kKey, Role::kValue},
                              {Role::kPastKey, Role::kPastValue},
                              {Role::kSeqlensK, Role::kTotalSequenceLength},
                              {Role::kCosCache, Role::kSinCache}};

// Keys and positions are counted in 32 bits.
constexpr int64_t kMostKeys = 0x7fffffff;

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
  const OrtErrorCode code = status.code == StatusCode::kUnsupported ? ORT_NOT_IMPLEMENTED : ORT_INVALID_ARGUMENT;
  throw Ort::Exception("SparseAMXAttention node '" + name_ + "': " + status.message, code);
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
  for (size_t begin = 0; begin < roles.size();) {
    const size_t end = std::min(roles.find(',', begin), roles.size());
    const std::string name = roles.substr(begin, end - begin);
    size_t role = 0;
    while (role < kRoles && name != kRoleRules[role].name) ++role;
    if (role == kRoles) Fail(Status::Invalid("its attribute roles names '" + name + "', which is no role"));
    if (Has(static_cast<Role>(role))) Fail(Status::Invalid("its attribute roles names " + name + " twice"));
    roles_.push_back(static_cast<Role>(role));
    begin = end + 1;
  }
}

void SparseAMXAttentionKernel::CheckRoles() const {
  for (const auto& pair : kPairs)
    if (Has(pair[0]) != Has(pair[1]))
      Fail(Status::Invalid(std::string("its attribute roles must name ") + NameOf(pair[0]) + " and " + NameOf(pair[1]) +
                           " both or neither"));
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
  const OrtValue* value = nullptr;
  Ort::ThrowOnError(api_.KernelContext_GetInput(context, SparseAMXAttention::kQuery, &value));
  *query = Read(api_, value);
  for (size_t i = 0; i < roles_.size(); ++i) {
    Ort::ThrowOnError(api_.KernelContext_GetInput(context, i + 1, &value));
    Tensor& tensor = (*inputs)[static_cast<size_t>(roles_[i])];
    tensor = Read(api_, value);
    const RoleRule& rule = kRoleRules[static_cast<size_t>(roles_[i])];
    if (tensor.type != rule.type)
      Fail(Status::Invalid(std::string(rule.name) + " does not have the element type that its role asks for"));
  }
}

// Query, key and value: [batch, tokens, heads * size] each, or all side by side in the query.
void SparseAMXAttentionKernel::SetTokens(const Tensor& query, const Inputs& inputs, AttentionCall* call) const {
  const int64_t heads = Signed(options_.heads), kv_heads = Signed(options_.kv_heads);
  const bool packed = !Has(Role::kKey);
  const int64_t parts = packed ? heads + 2 * kv_heads : heads;
  if (query.shape.size() != 3 || query.shape[2] % parts != 0)
    Fail(Status::Invalid("query has the shape " + ShapeText(query.shape) +
                         ", but it must be [batch, tokens, a multiple of " + std::to_string(parts) + "]"));
  const int64_t batch = query.shape[0], tokens = query.shape[1], size = query.shape[2] / parts;
  call->batch = static_cast<size_t>(batch);
  call->queries = call->new_keys = static_cast<size_t>(tokens);
  call->key_size = call->value_size = static_cast<size_t>(size);
  call->query = static_cast<const float*>(query.data);
  call->query_stride = call->key_stride = call->value_stride = static_cast<size_t>(query.shape[2]);
  if (packed) {
    call->key = call->query + heads * size;
    call->value = call->key + kv_heads * size;
    return;
  }
  const Tensor &key = At(inputs, Role::kKey), &value = At(inputs, Role::kValue);
  const int64_t new_keys = options_.causal || key.shape.size() != 3 ? tokens : key.shape[1];
  Expect(key, "key", ShapeOf({batch, new_keys, kv_heads * size}));
  if (value.shape.size() != 3 || value.shape[0] != batch || value.shape[1] != new_keys ||
      value.shape[2] % kv_heads != 0)
    Fail(Status::Invalid("value has the shape " + ShapeText(value.shape) + ", but it must be [" +
                         std::to_string(batch) + ", " + std::to_string(new_keys) + ", a multiple of " +
                         std::to_string(kv_heads) + "]"));
  call->new_keys = static_cast<size_t>(new_keys);
  call->value_size = static_cast<size_t>(value.shape[2] / kv_heads);
  call->key = static_cast<const float*>(key.data);
  call->value = static_cast<const float*>(value.data);
  call->key_stride = static_cast<size_t>(key.shape[2]);
  call->value_stride = static_cast<size_t>(value.shape[2]);
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
  SetTotal(inputs, call);
}

// A packed cache tells how many tokens it holds; seqlens_k may tell of fewer.
void SparseAMXAttentionKernel::SetPackedPast(const Inputs& inputs, AttentionCall* call) const {
  if (call->key_size == 0 || call->value_size == 0) Fail(Status::Invalid("a packed cache needs heads of some size"));
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
  if (Signed(call->capacity) > kMostKeys) Fail(Status::Invalid("its cache has more tokens than 32 bits can count"));
}

void SparseAMXAttentionKernel::SetRotary(const Inputs& inputs, AttentionCall* call) const {
  if (!Has(Role::kCosCache)) return;
  const Tensor &cos = At(inputs, Role::kCosCache), &sin = At(inputs, Role::kSinCache);
  if (cos.shape.size() != 2 || cos.shape[1] * 2 > Signed(call->key_size))
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

void SparseAMXAttentionKernel::SetBiases(const Inputs& inputs, AttentionCall* call) const {
  const int64_t heads = Signed(options_.heads), batch = Signed(call->batch), total = Signed(call->total);
  if (Has(Role::kAttentionBias)) {
    const Tensor& bias = At(inputs, Role::kAttentionBias);
    const auto is_one_or = [](int64_t dimension, int64_t all) { return dimension == 1 || dimension == all; };
    if (bias.shape.size() != 4 || !is_one_or(bias.shape[0], batch) || !is_one_or(bias.shape[1], heads) ||
        bias.shape[2] != Signed(call->queries) || bias.shape[3] != total)
      Fail(Status::Invalid("attention_bias has the shape " + ShapeText(bias.shape) + ", but it must be " +
                           ShapeText(ShapeOf({batch, heads, Signed(call->queries), total})) +
                           ", where each of the first two may be 1"));
    call->bias = static_cast<const float*>(bias.data);
    call->bias_batches = static_cast<size_t>(bias.shape[0]);
    call->bias_heads = static_cast<size_t>(bias.shape[1]);
  }
  if (Has(Role::kKeyPaddingMask))
    Expect(At(inputs, Role::kKeyPaddingMask), "key_padding_mask", ShapeOf({batch, total}));
  if (Has(Role::kHeadSink)) {
    Expect(At(inputs, Role::kHeadSink), "head_sink", ShapeOf({heads}));
    call->sink = static_cast<const float*>(At(inputs, Role::kHeadSink).data);
  }
}

void SparseAMXAttentionKernel::SetOutputs(OrtKernelContext* context, AttentionCall* call) const {
  size_t outputs = 0;
  Ort::ThrowOnError(api_.KernelContext_GetOutputCount(context, &outputs));
  const auto output = [&](size_t index, const Shape& shape) -> void* {
    OrtValue* value = nullptr;
    if (index >= outputs) return nullptr;
    Ort::ThrowOnError(api_.KernelContext_GetOutput(context, index, shape.begin(), shape.size(), &value));
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    Ort::ThrowOnError(api_.GetTensorMutableData(value, &data));
    return data;
  };
  const int64_t batch = Signed(call->batch), kv_heads = Signed(options_.kv_heads), capacity = Signed(call->capacity);
  call->output = static_cast<float*>(output(
      SparseAMXAttention::kOutput, ShapeOf({batch, Signed(call->queries), Signed(options_.heads * call->value_size)})));
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
  SetBiases(inputs, &call);
  const Status status = attention_.Check(call);
  if (!status.ok()) Fail(status);
  SetOutputs(context, &call);

  const Tensor& mask = At(inputs, Role::kKeyPaddingMask);
  const size_t bytes = RoundUp(attention_.ScratchBytes(call), 64);
  Scratch scratch(api_, context, cpu_memory_, bytes + mask.elements * sizeof(float));
  if (mask.data != nullptr) {
    // The mask as what it adds to the scores.
    auto* const key_bias = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch.get()) + bytes);
    for (size_t i = 0; i < mask.elements; ++i)
      key_bias[i] = static_cast<const int32_t*>(mask.data)[i] != 0 ? 0.0f : mask_filter_value_;
    call.key_bias = key_bias;
  }
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
    if (shape.lengths.size() != 3 || heads.size() != 1 || kv_heads.size() != 1) return;
    const std::string roles = "," + InferredString(context, "roles") + ",";
    const size_t value = roles.find(",value,");
    const bool packed = value == std::string::npos;
    const int64_t parts = packed ? heads[0] + 2 * kv_heads[0] : kv_heads[0];
    int64_t from = shape.lengths[2];
    if (!packed) {
      const auto input = std::count(roles.begin(), roles.begin() + Signed(value) + 1, ',');
      const InferredShape values = InferredInputShape(context, static_cast<size_t>(input));
      from = values.lengths.size() == 3 ? values.lengths[2] : -1;
    }
    const bool known = from > 0 && parts > 0 && from % parts == 0;
    shape.SetLength(2, known ? from / parts * heads[0] : -1);
    InferOutput(context, kOutput, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  });
}

}  // namespace sparamx
