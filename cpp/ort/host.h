// What an operator asks of ONNX Runtime: its attributes, tensors, threads and scratch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace sparamx {

// The oldest runtime that has all that this library calls.
constexpr uint32_t kApiVersion = 21;
static_assert(ORT_API_VERSION >= kApiVersion, "build against the ONNX Runtime 1.21 headers or newer ones");

// Absent attributes take the default.
std::string StringAttribute(const Ort::ConstKernelInfo& info, const char* name, const char* absent);
int64_t IntAttribute(const Ort::ConstKernelInfo& info, const char* name);
int64_t IntAttribute(const Ort::ConstKernelInfo& info, const char* name, int64_t absent);
float FloatAttribute(const Ort::ConstKernelInfo& info, const char* name, float absent);

// A tensor in the kernel's hands; `data` is null for an absent optional input.
struct Tensor {
  const void* data = nullptr;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::vector<int64_t> shape;
  size_t elements = 0;
};

Tensor Read(const OrtApi& api, const OrtValue* value);

std::string ShapeText(const std::vector<int64_t>& shape);

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

  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* allocated_ = nullptr;
  alignas(64) uint8_t stack_[kOnStack];
};

OrtStatus* StatusOf(const std::exception& e);

}  // namespace sparamx
