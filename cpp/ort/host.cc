#include "ort/host.h"

#include <atomic>
#include <new>

#include "format/layout.h"

namespace sparamx {

namespace {

// Whether an attribute is there, by what reading it gave. One of another type must not pass for none; only the text
// tells the two apart.
bool IsThere(const Ort::ConstKernelInfo& info, const char* name, OrtStatus* read) {
  const Ort::Status status(read);
  if (status.IsOK()) return true;
  if (status.GetErrorMessage().find("type don't match") == std::string::npos) return false;
  throw Ort::Exception(
      "node '" + info.GetNodeName() + "': its attribute " + name + " is not of the type that it must be",
      ORT_INVALID_ARGUMENT);
}

}  // namespace

// ONNX Runtime 1.21 and 1.22 count the terminator as part of a string.
std::string StringAttribute(const Ort::ConstKernelInfo& info, const char* name, const char* absent) {
  size_t size = 0;
  IsThere(info, name, Ort::GetApi().KernelInfoGetAttribute_string(info, name, nullptr, &size));
  if (size == 0) return absent;
  std::string value(size, '\0');
  Ort::ThrowOnError(Ort::GetApi().KernelInfoGetAttribute_string(info, name, value.data(), &size));
  return value.c_str();
}

int64_t IntAttribute(const Ort::ConstKernelInfo& info, const char* name) {
  int64_t value = 0;
  if (!IsThere(info, name, Ort::GetApi().KernelInfoGetAttribute_int64(info, name, &value)))
    throw Ort::Exception("node '" + info.GetNodeName() + "': it lacks the attribute " + name, ORT_INVALID_ARGUMENT);
  return value;
}

int64_t IntAttribute(const Ort::ConstKernelInfo& info, const char* name, int64_t absent) {
  int64_t value = 0;
  return IsThere(info, name, Ort::GetApi().KernelInfoGetAttribute_int64(info, name, &value)) ? value : absent;
}

float FloatAttribute(const Ort::ConstKernelInfo& info, const char* name, float absent) {
  float value = 0;
  return IsThere(info, name, Ort::GetApi().KernelInfoGetAttribute_float(info, name, &value)) ? value : absent;
}

namespace {

// `read` is a call of ONNX Runtime's that fills a buffer or, given none, says how many integers there are.
template <typename Read>
std::vector<int64_t> Integers(const Read& read) {
  size_t count = 0;
  const Ort::Status status(read(nullptr, &count));
  std::vector<int64_t> values(count);
  if (count != 0) Ort::ThrowOnError(read(values.data(), &count));
  return values;
}

}  // namespace

std::vector<int64_t> IntsAttribute(const Ort::ConstKernelInfo& info, const char* name) {
  return Integers([&](int64_t* out, size_t* count) {
    return Ort::GetApi().KernelInfoGetAttributeArray_int64(info, name, out, count);
  });
}

std::vector<std::string> Words(const std::string& list) {
  std::vector<std::string> words(list.empty() ? 0 : 1);
  for (const char c : list) {
    if (c == ',')
      words.emplace_back();
    else
      words.back() += c;
  }
  return words;
}

void FailNode(const char* op, const std::string& node, const Status& status) {
  const OrtErrorCode code = status.code == StatusCode::kUnsupported ? ORT_NOT_IMPLEMENTED : ORT_INVALID_ARGUMENT;
  throw Ort::Exception(std::string(op) + " node '" + node + "': " + status.message, code);
}

Tensor Read(const OrtApi& api, const OrtValue* value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Ort::ThrowOnError(api.GetTensorTypeAndShape(value, &raw));
  const Ort::TensorTypeAndShapeInfo info(raw);
  size_t rank = 0;
  Ort::ThrowOnError(api.GetDimensionsCount(raw, &rank));
  tensor.shape = Shape(rank);
  Ort::ThrowOnError(api.GetDimensions(raw, tensor.shape.begin(), rank));
  Ort::ThrowOnError(api.GetTensorElementType(raw, &tensor.type));
  Ort::ThrowOnError(api.GetTensorShapeElementCount(raw, &tensor.elements));
  void* data = nullptr;
  Ort::ThrowOnError(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  // An empty tensor may have no address, but it is there.
  static const char empty = 0;
  tensor.data = data == nullptr ? &empty : data;
  return tensor;
}

Tensor ReadInput(const OrtApi& api, const OrtKernelContext* context, size_t input) {
  const OrtValue* value = nullptr;
  Ort::ThrowOnError(api.KernelContext_GetInput(context, input, &value));
  return Read(api, value);
}

void* MakeOutput(const OrtApi& api, OrtKernelContext* context, size_t output, const Shape& shape) {
  OrtValue* value = nullptr;
  Ort::ThrowOnError(api.KernelContext_GetOutput(context, output, shape.begin(), shape.size(), &value));
  void* data = nullptr;
  if (value != nullptr) Ort::ThrowOnError(api.GetTensorMutableData(value, &data));
  return data;
}

std::string ShapeText(const Shape& shape) {
  std::string text;
  for (const int64_t length : shape) text += (text.empty() ? "" : ", ") + std::to_string(length);
  return "[" + text + "]";
}

namespace {

// For an unknown length that has no name. ONNX Runtime takes an unnamed one for a length of -1, and then refuses models
// whose Reshape has a -1 of its own; two lengths of one name it takes for equal, so each gets another.
std::string NewName() {
  static std::atomic<uint64_t> count{0};
  return "sparamx_length_" + std::to_string(count++);
}

}  // namespace

void InferredShape::SetLength(size_t dimension, int64_t length) {
  lengths[dimension] = length;
  names[dimension] = length < 0 ? NewName() : "";
}

InferredShape InferredInputShape(OrtShapeInferContext* context, size_t input) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
  Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, input, &info));
  size_t rank = 0;
  Ort::ThrowOnError(api.GetDimensionsCount(info, &rank));
  InferredShape shape = {std::vector<int64_t>(rank), std::vector<std::string>(rank),
                         ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED};
  Ort::ThrowOnError(api.GetTensorElementType(info, &shape.type));
  if (rank == 0) return shape;
  std::vector<const char*> names(rank);
  Ort::ThrowOnError(api.GetDimensions(info, shape.lengths.data(), rank));
  Ort::ThrowOnError(api.GetSymbolicDimensions(info, names.data(), rank));
  for (size_t i = 0; i < rank; ++i) {
    const bool is_unnamed = shape.lengths[i] < 0 && *names[i] == 0;
    shape.names[i] = is_unnamed ? NewName() : names[i];
  }
  return shape;
}

std::vector<int64_t> InferredInts(const OrtShapeInferContext* context, const char* name) {
  const OrtApi& api = Ort::GetApi();
  const OrtOpAttr* attribute = nullptr;
  const Ort::Status absent(api.ShapeInferContext_GetAttribute(context, name, &attribute));
  if (attribute == nullptr) return {};
  int64_t value = 0;
  size_t size = 0;
  const Ort::Status not_one(api.ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof value, &size));
  if (not_one.IsOK()) return {value};
  return Integers([&](int64_t* out, size_t* count) {
    size_t bytes = *count * sizeof(int64_t);
    OrtStatus* status = api.ReadOpAttr(attribute, ORT_OP_ATTR_INTS, out, bytes, &bytes);
    *count = bytes / sizeof(int64_t);
    return status;
  });
}

std::string InferredString(const OrtShapeInferContext* context, const char* name) {
  const OrtApi& api = Ort::GetApi();
  const OrtOpAttr* attribute = nullptr;
  const Ort::Status absent(api.ShapeInferContext_GetAttribute(context, name, &attribute));
  if (attribute == nullptr) return {};
  size_t size = 0;
  const Ort::Status too_small(api.ReadOpAttr(attribute, ORT_OP_ATTR_STRING, nullptr, 0, &size));
  std::string value(size + 1, '\0');
  Ort::ThrowOnError(api.ReadOpAttr(attribute, ORT_OP_ATTR_STRING, value.data(), value.size(), &size));
  return value.c_str();  // ONNX Runtime 1.21 and 1.22 count the terminator as part of a string
}

void InferOutput(OrtShapeInferContext* context, size_t output, const InferredShape& shape,
                 ONNXTensorElementDataType type) {
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&raw));
  const Ort::TensorTypeAndShapeInfo info(raw);
  Ort::ThrowOnError(api.SetTensorElementType(raw, type));
  Ort::ThrowOnError(api.SetDimensions(raw, shape.lengths.data(), shape.lengths.size()));
  std::vector<const char*> names;  // ONNX Runtime copies them
  for (const std::string& name : shape.names) names.push_back(name.c_str());
  Ort::ThrowOnError(api.SetSymbolicDimensions(raw, names.data(), names.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, output, raw));
}

void Host::ParallelRun(void* host, size_t count, void (*body)(void*, size_t), void* user) {
  const Host& self = *static_cast<const Host*>(host);
  OrtStatus* status = self.api->KernelContext_ParallelFor(self.context, body, count, 0, user);
  if (status == nullptr) return;
  self.api->ReleaseStatus(status);  // refused before it began: nothing has run yet
  for (size_t i = 0; i < count; ++i) body(user, i);
}

Scratch::Scratch(const OrtApi& api, OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes)
    : Scratch(api) {
  if (bytes <= kOnStack) return;
  Ort::ThrowOnError(api.KernelContext_GetAllocator(context, memory, &allocator_));
  allocated_ = allocator_->Alloc(allocator_, bytes + 64);
  if (allocated_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() {
  if (allocated_ != nullptr) allocator_->Free(allocator_, allocated_);
  if (allocator_ != nullptr) api_.ReleaseAllocator(allocator_);
}

void* Scratch::get() {
  if (allocated_ == nullptr) return stack_;
  return reinterpret_cast<void*>(RoundUp(reinterpret_cast<uintptr_t>(allocated_), 64));
}

}  // namespace sparamx
