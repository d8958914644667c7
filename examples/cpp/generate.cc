// Continues a text with a converted decoder, from C++: generate MODEL.onnx LIBRARY.so NEW_TOKENS TOKEN...
//
// Tokens are numbers, as a tokenizer gives them. The most likely next one is taken again and again, and printed. The
// model is one that optimum, torch or onnxruntime-genai's builder exports: input_ids, attention_mask, perhaps
// position_ids, and past_key_values.N.key and .value, whose new state comes out as present.N.key and .value.
//
// All that differs from any other ONNX Runtime program is the line that registers the library.

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace {

const std::string kPast = "past_key_values";

// The whole number that somebody wrote for `what`.
int64_t Number(const std::string& what, const std::string& text) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const std::from_chars_result read = std::from_chars(text.data(), end, value);
  if (read.ec != std::errc() || read.ptr != end)
    throw std::runtime_error(what + " must be a whole number of 64 bits, not '" + text + "'");
  return value;
}

// Numbers per head where the model leaves them open, as onnxruntime-genai's builder does; HEAD_SIZE says otherwise.
int64_t OpenHeadSize() {
  const char* text = std::getenv("HEAD_SIZE");
  return text == nullptr ? 64 : Number("HEAD_SIZE", text);
}

class Decoder {
 public:
  Decoder(Ort::Session& session) : session_(session) {
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
      inputs_.emplace_back(session.GetInputNameAllocated(i, allocator_).get());
      if (inputs_.back().rfind(kPast, 0) != 0) continue;
      // The cache of a text that has not begun: one text, heads, no position, numbers per head.
      const Ort::TypeInfo type = session.GetInputTypeInfo(i);
      std::vector<int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();
      if (shape.size() != 4 || shape[1] < 1) throw std::runtime_error(inputs_.back() + " is no cache of known heads");
      shape[0] = 1;
      shape[2] = 0;
      if (shape[3] < 1) shape[3] = OpenHeadSize();
      cache_.emplace(inputs_.back(), Ort::Value::CreateTensor<float>(allocator_, shape.data(), shape.size()));
    }
    for (size_t i = 0; i < session.GetOutputCount(); ++i)
      outputs_.emplace_back(session.GetOutputNameAllocated(i, allocator_).get());
  }

  // Takes tokens that follow those of the calls before; the most likely token after the last of them.
  int64_t Next(std::vector<int64_t> tokens) {
    std::vector<int64_t> positions(tokens.size());
    for (int64_t& position : positions) position = length_++;
    std::vector<int64_t> mask(static_cast<size_t>(length_), 1);

    std::vector<const char*> input_names, output_names;
    std::vector<Ort::Value> inputs;
    for (const std::string& name : inputs_) {
      input_names.push_back(name.c_str());
      if (name == "input_ids")
        inputs.push_back(Row(tokens));
      else if (name == "attention_mask")
        inputs.push_back(Row(mask));
      else if (name == "position_ids")
        inputs.push_back(Row(positions));
      else if (cache_.count(name) != 0)
        inputs.push_back(std::move(cache_.at(name)));
      else
        throw std::runtime_error("the model has an input that this program does not know: " + name);
    }
    for (const std::string& name : outputs_) output_names.push_back(name.c_str());
    std::vector<Ort::Value> outputs = session_.Run(Ort::RunOptions{nullptr}, input_names.data(), inputs.data(),
                                                   inputs.size(), output_names.data(), output_names.size());

    int64_t token = -1;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::string& name = outputs_[i];
      if (name.rfind("present", 0) == 0) {
        cache_.insert_or_assign(kPast + name.substr(std::string("present").size()), std::move(outputs[i]));
      } else if (name == "logits") {
        // One text, a row for each token (or for the last one alone), a number for each token that may follow.
        const std::vector<int64_t> shape = outputs[i].GetTensorTypeAndShapeInfo().GetShape();
        const int64_t vocabulary = shape.back();
        const float* last = outputs[i].GetTensorData<float>() + (shape[shape.size() - 2] - 1) * vocabulary;
        token = std::max_element(last, last + vocabulary) - last;
      }
    }
    if (token < 0) throw std::runtime_error("the model has no output logits");
    return token;
  }

 private:
  Ort::Value Row(std::vector<int64_t>& values) {
    const int64_t shape[] = {1, static_cast<int64_t>(values.size())};
    return Ort::Value::CreateTensor<int64_t>(memory_, values.data(), values.size(), shape, 2);
  }

  Ort::Session& session_;
  Ort::AllocatorWithDefaultOptions allocator_;
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::vector<std::string> inputs_, outputs_;
  std::map<std::string, Ort::Value> cache_;
  int64_t length_ = 0;
};

void Generate(const char* model, const char* library, int64_t count, const std::vector<int64_t>& prompt) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "generate");
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary(library);
  Ort::Session session(env, model, options);

  Decoder decoder(session);
  std::vector<int64_t> tokens = prompt;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t next = decoder.Next(std::move(tokens));
    tokens = {next};
    std::printf("%s%lld", i == 0 ? "" : " ", static_cast<long long>(next));
    std::fflush(stdout);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: [HEAD_SIZE=N] generate MODEL.onnx LIBRARY.so NEW_TOKENS TOKEN...\n");
    return 2;
  }
  try {
    std::vector<int64_t> prompt;
    for (int i = 4; i < argc; ++i) prompt.push_back(Number("TOKEN " + std::to_string(i - 3), argv[i]));
    Generate(argv[1], argv[2], Number("NEW_TOKENS", argv[3]), prompt);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "generate: %s\n", error.what());
    return 1;
  }
  return 0;
}
