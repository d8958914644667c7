// The SparseAMXMatMul operator: a thin adapter from ONNX Runtime's custom-op interface to runtime/matmul.h.
#pragma once

#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

#include "ort/host.h"
#include "runtime/huge_pages.h"
#include "runtime/matmul.h"

namespace sparamx {

class SparseAMXMatMulKernel {
 public:
  // Throws Ort::Exception with a sentence that names the node.
  SparseAMXMatMulKernel(const OrtApi& api, const OrtKernelInfo* info, Element element);

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept;

 private:
  void ReadAttributes(const Ort::ConstKernelInfo& info);
  void Load(const Tensor& weights, MatMul* matmul) const;
  Tensor Copied(const Tensor& weights);
  const void* Bias(const Tensor& bias) const;
  void Compute(OrtKernelContext* context) const;
  void Multiply(OrtKernelContext* context, const MatMul& matmul, const void* bias) const;
  [[noreturn]] void Fail(const Status& status) const;

  const OrtApi& api_;
  std::string name_;
  int64_t k_, n_;
  MatMul::Options options_;
  size_t outputs_;
  bool has_bias_;
  HugePages copy_;  // of constant weights, where it is wanted
  MatMul matmul_;   // of constant weights
  bool constant_weights_;
  const void* constant_bias_;  // null where there is none, or where it can change
  Ort::MemoryInfo cpu_memory_;
};

struct SparseAMXMatMul : Ort::CustomOpBase<SparseAMXMatMul, SparseAMXMatMulKernel, true> {
  static constexpr size_t kX = 0, kW = 1, kB = 2, kInputs = 3;

  // X, B and Y are of one type: an operator is registered for each. The interface's version is not that of the headers
  // at hand: an older runtime refuses a newer one.
  explicit SparseAMXMatMul(Element element) : element_(element) {
    OrtCustomOp::version = kApiVersion;
    OrtCustomOp::InferOutputShapeFn = InferOutputShapes;
  }

  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const noexcept;
  const char* GetName() const { return "SparseAMXMatMul"; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return kInputs; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == kW ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : GetOutputType(0);
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i == kB ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  // One output, or one for every number of `splits`.
  size_t GetOutputTypeCount() const { return 1; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
  ONNXTensorElementDataType GetOutputType(size_t) const {
    return element_ == Element::kFp16 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  static OrtStatusPtr InferOutputShapes(const OrtCustomOp* op, OrtShapeInferContext* context) noexcept;

 private:
  Element element_;
};

}  // namespace sparamx
