// Runs a converted model once from C++: run_model MODEL.onnx LIBRARY.so
//
// Float inputs are filled with 0.5, integer inputs with 1, and dimensions that the model leaves open are 4. Prints
// every output's name, shape and sum. All that differs from any other ONNX Runtime program is the line that registers
// the library (`sparamx-onnx info` prints its path).

#include <cstdint>
#include <cstdio>
#include <exception>
#include <numeric>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace {

constexpr int64_t kOpenDimension = 4;

template <typename T>
Ort::Value Filled(Ort::AllocatorWithDefaultOptions& allocator, const std::vector<int64_t>& shape, T value) {
  Ort::Value tensor = Ort::Value::CreateTensor<T>(allocator, shape.data(), shape.size());
  const size_t count = tensor.GetTensorTypeAndShapeInfo().GetElementCount();
  std::fill_n(tensor.GetTensorMutableData<T>(), count, value);
  return tensor;
}

void Run(const char* model, const char* library) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "run_model");
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary(library);
  Ort::Session session(env, model, options);

  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> input_names, output_names;
  std::vector<Ort::Value> inputs;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    input_names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    const Ort::TypeInfo type = session.GetInputTypeInfo(i);
    const auto info = type.GetTensorTypeAndShapeInfo();
    std::vector<int64_t> shape = info.GetShape();
    for (int64_t& dimension : shape)
      if (dimension < 0) dimension = kOpenDimension;
    if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64)
      inputs.push_back(Filled<int64_t>(allocator, shape, 1));
    else
      inputs.push_back(Filled<float>(allocator, shape, 0.5f));
  }
  for (size_t i = 0; i < session.GetOutputCount(); ++i)
    output_names.emplace_back(session.GetOutputNameAllocated(i, allocator).get());

  std::vector<const char*> inputs_c, outputs_c;
  for (const std::string& name : input_names) inputs_c.push_back(name.c_str());
  for (const std::string& name : output_names) outputs_c.push_back(name.c_str());
  const std::vector<Ort::Value> outputs = session.Run(Ort::RunOptions{nullptr}, inputs_c.data(), inputs.data(),
                                                      inputs.size(), outputs_c.data(), outputs_c.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const auto info = outputs[i].GetTensorTypeAndShapeInfo();
    const float* values = outputs[i].GetTensorData<float>();
    std::printf("%s [", output_names[i].c_str());
    for (const int64_t dimension : info.GetShape()) std::printf(" %lld", static_cast<long long>(dimension));
    std::printf(" ] sum %.6f\n", std::accumulate(values, values + info.GetElementCount(), 0.0));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_model MODEL.onnx LIBRARY.so\n");
    return 2;
  }
  try {
    Run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_model: %s\n", error.what());
    return 1;
  }
  return 0;
}
