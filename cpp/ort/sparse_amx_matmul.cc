#include "ort/sparse_amx_matmul.h"

#include <exception>
#include <vector>

namespace sparamx {
namespace {

constexpr const char* kEpilogueNames[kEpilogues] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
constexpr const char* kActivationsNames[kActivationTypes] = {"fp32", "bf16", "int8"};

}  // namespace

void SparseAMXMatMulKernel::Fail(const Status& status) const {
  const OrtErrorCode code = status.code == StatusCode::kUnsupported ? ORT_NOT_IMPLEMENTED : ORT_INVALID_ARGUMENT;
  throw Ort::Exception("SparseAMXMatMul node '" + name_ + "': " + status.message, code);
}

SparseAMXMatMulKernel::SparseAMXMatMulKernel(const OrtApi& api, const OrtKernelInfo* raw_info)
    : api_(api), cpu_memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
  const Ort::ConstKernelInfo info(raw_info);
  name_ = info.GetNodeName();
  k_ = IntAttribute(info, "K");
  n_ = IntAttribute(info, "N");
  const std::string epilogue = StringAttribute(info, "epilogue", "none");
  int index = 0;
  while (index < kEpilogues && epilogue != kEpilogueNames[index]) ++index;
  if (index == kEpilogues) Fail(Status::Invalid("unknown epilogue '" + epilogue + "'"));
  options_.epilogue = static_cast<Epilogue>(index);

  const std::string activations = StringAttribute(info, "activations", "auto");
  options_.default_activations = activations == "auto";
  index = 0;
  while (index < kActivationTypes && activations != kActivationsNames[index]) ++index;
  if (index < kActivationTypes)
    options_.activations = static_cast<Activations>(index);
  else if (!options_.default_activations)
    Fail(Status::Invalid("unknown activations '" + activations + "'"));

  int constant = 0;
  const OrtValue* weights = nullptr;
  Ort::ThrowOnError(api.KernelInfoGetConstantInput_tensor(raw_info, SparseAMXMatMul::kW, &constant, &weights));
  constant_weights_ = constant != 0;
  if (!constant_weights_) return;
  const Tensor w = Read(api, weights);
  Status status = matmul_.Init(static_cast<const uint8_t*>(w.data), w.elements, options_);
  if (status.code == StatusCode::kDamaged) status.message = "its packed weight is damaged: " + status.message;
  if (!status.ok()) Fail(status);
  const PackedView& view = matmul_.weights();
  if (view.k != static_cast<uint64_t>(k_) || view.n != static_cast<uint64_t>(n_))
    Fail(Status::Invalid("its packed weight is " + std::to_string(view.k) + " x " + std::to_string(view.n) +
                         ", but its attributes say K = " + std::to_string(k_) + ", N = " + std::to_string(n_)));
}

OrtStatusPtr SparseAMXMatMulKernel::ComputeV2(OrtKernelContext* context) noexcept {
  try {
    Compute(context);
    return nullptr;
  } catch (const Ort::Exception& e) {
    return api_.CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::exception& e) {
    return StatusOf(e);
  }
}

void SparseAMXMatMulKernel::Compute(OrtKernelContext* context) const {
  const OrtValue *x_value = nullptr, *b_value = nullptr;
  size_t inputs = 0;
  Ort::ThrowOnError(api_.KernelContext_GetInputCount(context, &inputs));
  Ort::ThrowOnError(api_.KernelContext_GetInput(context, SparseAMXMatMul::kX, &x_value));
  if (inputs > SparseAMXMatMul::kB)
    Ort::ThrowOnError(api_.KernelContext_GetInput(context, SparseAMXMatMul::kB, &b_value));
  const Tensor x = Read(api_, x_value), bias = Read(api_, b_value);
  if (x.shape.empty() || x.shape.back() != k_)
    Fail(Status::Invalid("X has the shape " + ShapeText(x.shape) +
                         ", but its last dimension must be K = " + std::to_string(k_)));
  if (bias.data != nullptr && (bias.shape.size() != 1 || bias.shape[0] != n_))
    Fail(Status::Invalid("B has the shape " + ShapeText(bias.shape) + ", but it must be [N] = [" + std::to_string(n_) +
                         "]"));

  std::vector<int64_t> y_shape = x.shape;
  y_shape.back() = n_;
  size_t rows = 1;
  for (size_t i = 0; i + 1 < x.shape.size(); ++i) rows *= static_cast<size_t>(x.shape[i]);
  OrtValue* y_value = nullptr;
  void* y = nullptr;
  Ort::ThrowOnError(api_.KernelContext_GetOutput(context, 0, y_shape.data(), y_shape.size(), &y_value));
  Ort::ThrowOnError(api_.GetTensorMutableData(y_value, &y));

  const auto* xs = static_cast<const float*>(x.data);
  const auto* bs = static_cast<const float*>(bias.data);
  if (constant_weights_) return Multiply(context, matmul_, xs, rows, bs, static_cast<float*>(y));
  // Weights that can change between calls (in a subgraph on older runtimes) must be checked at each of them.
  const OrtValue* w_value = nullptr;
  Ort::ThrowOnError(api_.KernelContext_GetInput(context, SparseAMXMatMul::kW, &w_value));
  const Tensor w = Read(api_, w_value);
  MatMul matmul;
  const Status status = matmul.Init(static_cast<const uint8_t*>(w.data), w.elements, options_);
  if (!status.ok()) Fail(status);
  if (matmul.weights().k != static_cast<uint64_t>(k_) || matmul.weights().n != static_cast<uint64_t>(n_))
    Fail(Status::Invalid("its packed weight does not have the K and N of its attributes"));
  Multiply(context, matmul, xs, rows, bs, static_cast<float*>(y));
}

void SparseAMXMatMulKernel::Multiply(OrtKernelContext* context, const MatMul& matmul, const float* x, size_t rows,
                                     const float* bias, float* y) const {
  Host host = {&api_, context};
  Scratch scratch(api_, context, cpu_memory_, matmul.ScratchBytes(rows));
  matmul.Run(x, rows, bias, y, scratch.get(), {Host::ParallelRun, &host});
}

OrtStatusPtr SparseAMXMatMul::CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info,
                                             void** kernel) const noexcept {
  try {
    *kernel = new SparseAMXMatMulKernel(api, info);
    return nullptr;
  } catch (const Ort::Exception& e) {
    return api.CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::exception& e) {
    return StatusOf(e);
  }
}

// Y has X's shape with N for its last dimension. Without this, ONNX Runtime loses the fusions around the node.
Ort::Status SparseAMXMatMul::InferOutputShape(Ort::ShapeInferContext& context) {
  Ort::ShapeInferContext::Shape shape = context.GetInputShape(kX);
  if (shape.empty()) return Ort::Status(nullptr);  // X's rank is not known: neither is Y's
  shape.back() = Ort::ShapeInferContext::SymbolicInteger(context.GetAttrInt("N"));
  return context.SetOutputShape(0, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
}

}  // namespace sparamx
