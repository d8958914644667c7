#include "ort/sparse_amx_matmul.h"

#include <algorithm>
#include <exception>
#include <vector>

namespace sparamx {
namespace {

// Nodes with so many outputs keep their addresses on the stack.
constexpr size_t kFewOutputs = 8;

constexpr const char* kEpilogueNames[kEpilogues] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
constexpr const char* kActivationsNames[kActivationTypes] = {"fp32", "bf16", "int8"};

}  // namespace

void SparseAMXMatMulKernel::Fail(const Status& status) const {
  FailNode("SparseAMXMatMul", name_, status);
}

SparseAMXMatMulKernel::SparseAMXMatMulKernel(const OrtApi& api, const OrtKernelInfo* raw_info, Element element)
    : api_(api), cpu_memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
  const Ort::ConstKernelInfo info(raw_info);
  name_ = info.GetNodeName();
  options_.element = element;
  ReadAttributes(info);
  has_bias_ = info.GetInputCount() > SparseAMXMatMul::kB && !info.GetInputName(SparseAMXMatMul::kB).empty();
  const auto constant = [&](size_t input) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    Ort::ThrowOnError(api.KernelInfoGetConstantInput_tensor(raw_info, input, &is_constant, &value));
    return Read(api, is_constant != 0 ? value : nullptr);
  };
  const Tensor bias = has_bias_ ? constant(SparseAMXMatMul::kB) : Tensor();
  constant_bias_ = bias.data == nullptr ? nullptr : Bias(bias);
  const Tensor weights = constant(SparseAMXMatMul::kW);
  constant_weights_ = weights.data != nullptr;
  if (constant_weights_) Load(Copied(weights), &matmul_);
}

void SparseAMXMatMulKernel::ReadAttributes(const Ort::ConstKernelInfo& info) {
  k_ = IntAttribute(info, "K");
  n_ = IntAttribute(info, "N");
  for (const std::string& epilogue : Words(StringAttribute(info, "epilogue", "none"))) {
    const size_t index = PlaceOf(epilogue, kEpilogueNames);
    if (index == kEpilogues) Fail(Status::Invalid("unknown epilogue '" + epilogue + "'"));
    options_.epilogues.push_back(static_cast<Epilogue>(index));
  }
  for (const int64_t columns : IntsAttribute(info, "splits")) {
    if (columns <= 0) Fail(Status::Invalid("its split " + std::to_string(columns) + " is not positive"));
    options_.splits.push_back(static_cast<uint64_t>(columns));
  }
  outputs_ = info.GetOutputCount();
  const size_t splits = std::max<size_t>(1, options_.splits.size());
  if (outputs_ != splits)
    Fail(Status::Invalid("it has " + std::to_string(outputs_) + " outputs, but its attribute splits is for " +
                         std::to_string(splits)));
  for (size_t i = 0; i < outputs_; ++i)
    if (info.GetOutputName(i).empty()) Fail(Status::Invalid("its output " + std::to_string(i) + " has no name"));

  const std::string activations = StringAttribute(info, "activations", "auto");
  options_.default_activations = activations == "auto";
  const size_t index = PlaceOf(activations, kActivationsNames);
  if (index < kActivationTypes)
    options_.activations = static_cast<Activations>(index);
  else if (!options_.default_activations)
    Fail(Status::Invalid("unknown activations '" + activations + "'"));
}

// The weights in huge pages, where that is wanted and can be had.
Tensor SparseAMXMatMulKernel::Copied(const Tensor& weights) {
  bool wanted = false;
  const Status status = HugePages::Wanted(&wanted);
  if (!status.ok()) Fail(status);
  Tensor result = weights;
  if (wanted && copy_.Copy(weights.data, weights.elements)) result.data = copy_.data();
  return result;
}

void SparseAMXMatMulKernel::Load(const Tensor& weights, MatMul* matmul) const {
  Status status = matmul->Init(static_cast<const uint8_t*>(weights.data), weights.elements, options_);
  if (status.code == StatusCode::kDamaged) status.message = "its packed weight is damaged: " + status.message;
  if (!status.ok()) Fail(status);
  const PackedView& view = matmul->weights();
  if (view.k != static_cast<uint64_t>(k_) || view.n != static_cast<uint64_t>(n_))
    Fail(Status::Invalid("its packed weight is " + std::to_string(view.k) + " x " + std::to_string(view.n) +
                         ", but its attributes say K = " + std::to_string(k_) + ", N = " + std::to_string(n_)));
}

// The address of a bias that has the right shape.
const void* SparseAMXMatMulKernel::Bias(const Tensor& bias) const {
  if (bias.shape.size() != 1 || bias.shape[0] != n_)
    Fail(Status::Invalid("B has the shape " + ShapeText(bias.shape) + ", but it must be [N] = [" + std::to_string(n_) +
                         "]"));
  return bias.data;
}

OrtStatusPtr SparseAMXMatMulKernel::ComputeV2(OrtKernelContext* context) noexcept {
  return StatusOf(api_, [&] { Compute(context); });
}

void SparseAMXMatMulKernel::Compute(OrtKernelContext* context) const {
  const void* bias = constant_bias_;
  if (has_bias_ && bias == nullptr) bias = Bias(ReadInput(api_, context, SparseAMXMatMul::kB));
  if (constant_weights_) return Multiply(context, matmul_, bias);
  // Weights that can change between calls (in a subgraph on older runtimes) must be checked at each of them.
  MatMul matmul;
  Load(ReadInput(api_, context, SparseAMXMatMul::kW), &matmul);
  Multiply(context, matmul, bias);
}

void SparseAMXMatMulKernel::Multiply(OrtKernelContext* context, const MatMul& matmul, const void* bias) const {
  const Tensor x = ReadInput(api_, context, SparseAMXMatMul::kX);
  if (x.shape.empty() || x.shape.back() != k_)
    Fail(Status::Invalid("X has the shape " + ShapeText(x.shape) +
                         ", but its last dimension must be K = " + std::to_string(k_)));
  size_t rows = 1;
  for (size_t i = 0; i + 1 < x.shape.size(); ++i) rows *= static_cast<size_t>(x.shape[i]);

  void* few[kFewOutputs];
  std::vector<void*> many(outputs_ > kFewOutputs ? outputs_ : 0);
  void** y = many.empty() ? few : many.data();
  Shape shape = x.shape;
  for (size_t i = 0; i < outputs_; ++i) {
    shape.back() = static_cast<int64_t>(matmul.columns(i));
    y[i] = MakeOutput(api_, context, i, shape);
  }
  Host host = {&api_, context};
  Scratch scratch(api_, context, cpu_memory_, matmul.ScratchBytes(rows));
  matmul.Run(x.data, rows, bias, y, scratch.get(), {Host::ParallelRun, &host});
}

OrtStatusPtr SparseAMXMatMul::CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info,
                                             void** kernel) const noexcept {
  return StatusOf(api, [&] { *kernel = new SparseAMXMatMulKernel(api, info, element_); });
}

// Every output has X's shape with its own number of columns for its last dimension. Without this, ONNX Runtime loses
// the fusions around the node.
OrtStatusPtr SparseAMXMatMul::InferOutputShapes(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
  return StatusOf(Ort::GetApi(), [&] {
    InferredShape shape = InferredInputShape(context, kX);
    if (shape.lengths.empty()) return;  // X's rank is not known: neither is Y's
    std::vector<int64_t> columns = InferredInts(context, "splits");
    if (columns.empty()) columns = InferredInts(context, "N");
    for (size_t i = 0; i < columns.size(); ++i) {
      shape.SetLength(shape.lengths.size() - 1, columns[i]);
      InferOutput(context, i, shape, shape.type);
    }
  });
}

}  // namespace sparamx
