// The SparseAMXAttention operator: a thin adapter from ONNX Runtime's custom-op interface to runtime/attention.h.
#pragma once

#include <array>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

#include "ort/host.h"
#include "runtime/attention.h"

namespace sparamx {

// What an input after the query is, by the name that the attribute `roles` gives it.
enum class Role {
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kPastCache,
  kSeqlensK,
  kTotalSequenceLength,
  kCosCache,
  kSinCache,
  kPositionIds,
  kAttentionBias,
  kKeyPaddingMask,
  kHeadSink,
  kNonpadKvSeqlen,
  kCount
};

// A tensor of tokens, whatever its layout.
struct Heads {
  const float* data;
  size_t batch, tokens, size;
  TokenStrides strides;
};

class SparseAMXAttentionKernel {
 public:
  // Throws Ort::Exception with a sentence that names the node.
  SparseAMXAttentionKernel(const OrtApi& api, const OrtKernelInfo* info);

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  using Inputs = std::array<Tensor, static_cast<size_t>(Role::kCount)>;

  void ReadRoles(const std::string& roles);
  void CheckRoles() const;
  void CheckOutputs(const Ort::ConstKernelInfo& info) const;
  bool Has(Role role) const;
  void Compute(OrtKernelContext* context) const;
  void ReadInputs(OrtKernelContext* context, Tensor* query, Inputs* inputs) const;
  void SetTokens(const Tensor& query, const Inputs& inputs, AttentionCall* call) const;
  Heads ReadHeads(const Tensor& tensor, const char* name, size_t heads, size_t pack) const;
  void SetPast(const Inputs& inputs, AttentionCall* call) const;
  void SetPackedPast(const Inputs& inputs, AttentionCall* call) const;
  void SetTotal(const Inputs& inputs, AttentionCall* call) const;
  void SetRotary(const Inputs& inputs, AttentionCall* call) const;
  void SetBias(const Inputs& inputs, AttentionCall* call) const;
  void SetMask(const Inputs& inputs, AttentionCall* call) const;
  void SetSink(const Inputs& inputs, AttentionCall* call) const;
  size_t AddedFloats(const Inputs& inputs, const AttentionCall& call) const;
  void WriteAdded(const Inputs& inputs, float* added, AttentionCall* call) const;
  void CheckRoom(const AttentionCall& call) const;
  void CheckOneBuffer(const AttentionCall& call) const;
  void SetOutputs(OrtKernelContext* context, size_t query_rank, AttentionCall* call) const;
  void Expect(const Tensor& tensor, const char* name, const Shape& shape) const;
  [[noreturn]] void Fail(const Status& status) const;

  const OrtApi& api_;
  std::string name_;
  Attention::Options options_;
  float mask_filter_value_;
  std::vector<Role> roles_;  // of the inputs after the query
  Attention attention_;
  Ort::MemoryInfo cpu_memory_;
};

struct SparseAMXAttention : Ort::CustomOpBase<SparseAMXAttention, SparseAMXAttentionKernel, true> {
  static constexpr size_t kQuery = 0, kInputs = 2;  // the second is as many as `roles` names
  static constexpr size_t kOutput = 0, kPresentKey = 1, kPresentValue = 2, kPresentCache = 3, kOutputs = 4;

  // The interface's version, not that of the headers at hand: an older runtime refuses a newer one.
  SparseAMXAttention() {
    OrtCustomOp::version = kApiVersion;
    OrtCustomOp::InferOutputShapeFn = InferOutputShapes;
  }

  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept;
  const char* GetName() const { return "SparseAMXAttention"; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return kInputs; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == kQuery ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i == kQuery ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  }
  bool GetVariadicInputHomogeneity() const { return false; }
  int GetVariadicInputMinArity() const { return 0; }  // a query alone has keys and values in it
  size_t GetOutputTypeCount() const { return kOutputs; }
  ONNXTensorElementDataType GetOutputType(size_t i) const {
    return i == kPresentCache ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const {
    return i == kOutput ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }

  static OrtStatusPtr InferOutputShapes(const OrtCustomOp* op, OrtShapeInferContext* context) noexcept;
};

}  // namespace sparamx
