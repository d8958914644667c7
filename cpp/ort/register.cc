// The library's entry point for ONNX Runtime.
#include <exception>
#include <mutex>
#include <string>

#include "ort/sparse_amx_attention.h"
#include "ort/sparse_amx_matmul.h"

#if defined(__GNUC__)
#define SPARAMX_ENTRY extern "C" __attribute__((visibility("default")))
#else
#define SPARAMX_ENTRY extern "C"
#endif

namespace {

// An entry of the session's options that says that they have the domain.
constexpr const char* kRegistered = "com.sparamx.registered";

// A status can only be made by the runtime itself, through an api that it knows.
OrtStatus* TooOld(const OrtApiBase* base) {
  const OrtApi* old = base->GetApi(12);
  if (old == nullptr) return nullptr;
  const std::string message =
      std::string("sparamx-onnx needs ONNX Runtime 1.21 or later; this is ") + base->GetVersionString();
  return old->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
}

// The domain of a session's options must live as long as the session, which nobody tells us the end of: one for the
// process.
Ort::CustomOpDomain& Domain() {
  static const sparamx::SparseAMXMatMul matmul(sparamx::Element::kFp32), half_matmul(sparamx::Element::kFp16);
  static const sparamx::SparseAMXAttention attention;
  static Ort::CustomOpDomain* domain = [] {
    auto* made = new Ort::CustomOpDomain("com.sparamx");
    made->Add(&matmul);
    made->Add(&half_matmul);
    made->Add(&attention);
    return made;
  }();
  return *domain;
}

// The headers' classes have one runtime in a process: of another version, it would be given objects that are not its
// own. It is written once, as other threads may be using it already, but for a second copy of the same version.
OrtStatus* SetRuntime(const OrtApiBase* base, const OrtApi* api) {
  static std::mutex mutex;
  static const OrtApi* set = nullptr;
  static std::string version;
  const std::lock_guard<std::mutex> lock(mutex);
  if (set == api) return nullptr;
  if (set != nullptr && version != base->GetVersionString()) {
    const std::string message =
        "sparamx-onnx serves ONNX Runtime " + version + " in this process, and cannot serve another version beside it";
    return api->CreateStatus(ORT_FAIL, message.c_str());
  }
  version = base->GetVersionString();
  Ort::InitApi(api);
  set = api;
  return nullptr;
}

}  // namespace

SPARAMX_ENTRY OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(sparamx::kApiVersion);
  if (api == nullptr) return TooOld(base);
  try {
    if (OrtStatus* status = SetRuntime(base, api)) return status;
    // A second registration would be refused, by newer runtimes only when the session is made: it is a no-op instead.
    int registered = 0;
    if (OrtStatus* status = api->HasSessionConfigEntry(options, kRegistered, &registered)) return status;
    if (registered != 0) return nullptr;
    if (OrtStatus* status = api->AddCustomOpDomain(options, Domain())) return status;
    return api->AddSessionConfigEntry(options, kRegistered, "1");
  } catch (const std::exception& e) {
    return api->CreateStatus(ORT_FAIL, e.what());
  }
}
