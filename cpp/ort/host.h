// What an operator asks of ONNX Runtime: its attributes, tensors, threads and scratch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

#include "format/packed_format.h"

namespace sparamx {

// The oldest runtime that has all that this library calls.
constexpr uint32_t kApiVersion = 21;
static_assert(ORT_API_VERSION >= kApiVersion, "build against the ONNX Runtime 1.21 headers or newer ones");

// Absent attributes take the default.
std::string StringAttribute(const Ort::ConstKernelInfo& info, const char* name, const char* absent);
int64_t IntAttribute(const Ort::ConstKernelInfo& info, const char* name);
int64_t IntAttribute(const Ort::ConstKernelInfo& info, const char* name, int64_t absent);
float FloatAttribute(const Ort::ConstKernelInfo& info, const char* name, float absent);

// Of a list of integers; empty where it is absent.
std::vector<int64_t> IntsAttribute(const Ort::ConstKernelInfo& info, const char* name);

// "a,b" as {"a", "b"}; no word where there is no text.
std::vector<std::string> Words(const std::string& list);

// The place of a word in a list of names, or the list's length where it is in none.
template <class Names>
size_t PlaceOf(const std::string& word, const Names& names) {
  return static_cast<size_t>(std::find(std::begin(names), std::end(names), word) - std::begin(names));
}

// Throws the status as the node's own.
[[noreturn]] void FailNode(const char* op, const std::string& node, const Status& status);

// Lengths of dimensions; as many as there usually are without an allocation.
class Shape {
 public:
  Shape() = default;
  explicit Shape(size_t rank) : rank_(rank), many_(rank > kInline ? rank : 0) {}

  size_t size() const { return rank_; }
  bool empty() const { return rank_ == 0; }
  int64_t* begin() { return rank_ > kInline ? many_.data() : few_; }
  const int64_t* begin() const { return rank_ > kInline ? many_.data() : few_; }
  const int64_t* end() const { return begin() + rank_; }
  const int64_t& operator[](size_t i) const { return begin()[i]; }
  int64_t& back() { return begin()[rank_ - 1]; }
  const int64_t& back() const { return begin()[rank_ - 1]; }

 private:
  static constexpr size_t kInline = 6;
  size_t rank_ = 0;
  int64_t few_[kInline] = {};
  std::vector<int64_t> many_;
};

std::string ShapeText(const Shape& shape);

// A tensor in the kernel's hands; `data` is null for an absent optional input.
struct Tensor {
  const void* data = nullptr;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Shape shape;
  size_t elements = 0;
};

Tensor Read(const OrtApi& api, const OrtValue* value);
Tensor ReadInput(const OrtApi& api, const OrtKernelContext* context, size_t input);
// The numbers of an output of this shape, to be written; null where nobody takes it.
void* MakeOutput(const OrtApi& api, OrtKernelContext* context, size_t output, const Shape& shape);

// A shape where ONNX Runtime infers shapes: -1 stands for a length that is not known, and has a name. (The headers' own
// class for this is no use: that of 1.21 writes -2 for a dimension with a name, which newer runtimes refuse.)
struct InferredShape {
  std::vector<int64_t> lengths;  // none: the rank is not known
  std::vector<std::string> names;
  ONNXTensorElementDataType type;

  void SetLength(size_t dimension, int64_t length);
};

// These throw where ONNX Runtime refuses.
InferredShape InferredInputShape(OrtShapeInferContext* context, size_t input);
// An attribute that is an integer or a list of them; empty where it is absent.
std::vector<int64_t> InferredInts(const OrtShapeInferContext* context, const char* name);
// Likewise a string.
std::string InferredString(const OrtShapeInferContext* context, const char* name);
void InferOutput(OrtShapeInferContext* context, size_t output, const InferredShape& shape,
                 ONNXTensorElementDataType type);

// ONNX Runtime's threads, for one call: the callback of runtime's ParallelFor.
struct Host {
  const OrtApi* api;
  const OrtKernelContext* context;
  static void ParallelRun(void* host, size_t count, void (*body)(void*, size_t), void* user);
};

// The session's allocator, for one call; aligned to 64 bytes.
class Scratch {
 public:
  // Throws where there is no memory.
  Scratch(const OrtApi& api, OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get();

 private:
  // Scratch up to this size is taken from the stack: a call of the allocator costs more than a small product.
  static constexpr size_t kOnStack = 16 * 1024;

  // What the other constructor took is given back where that one throws, as it comes after this one.
  explicit Scratch(const OrtApi& api) : api_(api) {}

  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* allocated_ = nullptr;
  alignas(64) uint8_t stack_[kOnStack];
};

// What `body` throws as a status; null where it throws nothing.
template <class Body>
OrtStatus* StatusOf(const OrtApi& api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& e) {
    return api.CreateStatus(e.GetOrtErrorCode(), e.what());
  } catch (const std::exception& e) {
    return api.CreateStatus(ORT_FAIL, e.what());
  }
}

}  // namespace sparamx
