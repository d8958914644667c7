#include "capi/sparamx.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "format/for_each.h"
#include "format/packed_format.h"
#include "runtime/choice.h"
#include "runtime/matmul.h"

namespace {

using sparamx::Status;
using sparamx::StatusCode;

// Cut to the buffer's size and terminated; there may be no buffer.
void CopyText(const std::string& text, char* out, size_t size) {
  if (out == nullptr || size == 0) return;
  const size_t length = std::min(text.size(), size - 1);
  std::memcpy(out, text.data(), length);
  out[length] = '\0';
}

// No C++ exception may cross the C interface.
template <typename Body>
int Guarded(char* error, size_t error_size, const Body& body) {
  Status status;
  try {
    status = body();
  } catch (const std::bad_alloc&) {
    status.code = StatusCode::kOutOfMemory;
    status.message = "out of memory";
  }
  CopyText(status.message, error, error_size);
  return static_cast<int>(status.code);
}

Status Damaged(const Status& status) {
  if (status.ok()) return status;
  return {status.code, "the packed weight cannot be used: " + status.message};
}

Status ReadArguments(const sparamx_matrix* m, const sparamx_pack_options* o, sparamx::SourceMatrix* source,
                     sparamx::PackOptions* options) {
  if (m == nullptr || o == nullptr) return Status::Invalid("matrix and options must not be null");
  if (m->source_type > SPARAMX_SOURCE_BF16)
    return Status::Invalid("unknown source type " + std::to_string(m->source_type));
  if (o->weight_type > SPARAMX_INT4) return Status::Invalid("unknown weight type " + std::to_string(o->weight_type));
  if (o->form > SPARAMX_FORM_DENSE) return Status::Invalid("unknown form " + std::to_string(o->form));
  if (o->scale_type > SPARAMX_SCALE_INT8) return Status::Invalid("unknown scale type " + std::to_string(o->scale_type));
  *source = {m->data, m->k, m->n, m->stride_k, m->stride_n, static_cast<sparamx::SourceType>(m->source_type)};
  options->type = static_cast<sparamx::WeightType>(o->weight_type);
  options->form = static_cast<sparamx::Form>(o->form);
  options->scale_type = static_cast<sparamx::ScaleType>(o->scale_type);
  options->group_size = o->group_size;
  options->threads = o->threads;
  options->scales = o->scales;
  return {};
}

struct Threads {
  unsigned count;
  static void Run(void* host, size_t count, void (*body)(void*, size_t), void* user) {
    sparamx::ForEach(count, static_cast<Threads*>(host)->count, [&](size_t i) { body(user, i); });
  }
};

}  // namespace

extern "C" {

const char* sparamx_version(void) {
  return SPARAMX_VERSION;
}

int sparamx_packed_size(const sparamx_matrix* matrix, const sparamx_pack_options* options, uint64_t* size, char* error,
                        size_t error_size) {
  return Guarded(error, error_size, [&] {
    sparamx::SourceMatrix source;
    sparamx::PackOptions pack;
    const Status status = ReadArguments(matrix, options, &source, &pack);
    return status.ok() ? sparamx::PackedSize(source, pack, size) : status;
  });
}

int sparamx_pack(const sparamx_matrix* matrix, const sparamx_pack_options* options, void* blob, uint64_t blob_size,
                 char* error, size_t error_size) {
  return Guarded(error, error_size, [&] {
    sparamx::SourceMatrix source;
    sparamx::PackOptions pack;
    const Status status = ReadArguments(matrix, options, &source, &pack);
    return status.ok() ? sparamx::Pack(source, pack, static_cast<uint8_t*>(blob), blob_size) : status;
  });
}

int sparamx_validate(const void* blob, uint64_t blob_size, char* error, size_t error_size) {
  return Guarded(error, error_size, [&] {
    sparamx::PackedView view;
    return Damaged(sparamx::Parse(static_cast<const uint8_t*>(blob), blob_size, &view));
  });
}

int sparamx_describe(const void* blob, uint64_t blob_size, sparamx_description* description, char* error,
                     size_t error_size) {
  return Guarded(error, error_size, [&] {
    sparamx::PackedView v;
    const Status status = sparamx::Parse(static_cast<const uint8_t*>(blob), blob_size, &v);
    if (!status.ok()) return Damaged(status);
    *description = {v.k,
                    v.n,
                    v.nnz,
                    blob_size,
                    sparamx::kFormatVersion,
                    static_cast<uint32_t>(v.type),
                    static_cast<uint32_t>(v.form),
                    static_cast<uint32_t>(v.scale_type),
                    v.group_size,
                    static_cast<uint32_t>(sparamx::kRunK)};
    return status;
  });
}

int sparamx_unpack(const void* blob, uint64_t blob_size, float* dense, uint32_t threads, char* error,
                   size_t error_size) {
  return Guarded(error, error_size, [&] {
    sparamx::PackedView view;
    const Status status = sparamx::Parse(static_cast<const uint8_t*>(blob), blob_size, &view);
    if (status.ok()) sparamx::Unpack(view, dense, threads);
    return Damaged(status);
  });
}

int sparamx_matmul(const void* blob, uint64_t blob_size, const float* x, uint64_t m, const float* bias,
                   uint32_t epilogue, const char* isa, uint32_t threads, float* y, char* path, size_t path_size,
                   char* error, size_t error_size) {
  return Guarded(error, error_size, [&] {
    if (epilogue >= sparamx::kEpilogues) return Status::Invalid("unknown epilogue " + std::to_string(epilogue));
    sparamx::MatMul::Options options;
    options.epilogues = {static_cast<sparamx::Epilogue>(epilogue)};
    options.isa = isa;
    sparamx::MatMul matmul;
    const Status status = matmul.Init(static_cast<const uint8_t*>(blob), blob_size, options);
    if (!status.ok()) return Damaged(status);
    const std::unique_ptr<uint8_t[]> scratch(new uint8_t[matmul.ScratchBytes(m) + 64]);
    void* aligned = reinterpret_cast<void*>(sparamx::RoundUp(reinterpret_cast<uintptr_t>(scratch.get()), 64));
    Threads pool = {threads};
    void* const outputs[] = {y};
    matmul.Run(x, m, bias, outputs, aligned, {Threads::Run, &pool});
    CopyText(matmul.path(m), path, path_size);
    return status;
  });
}

size_t sparamx_cpu_info(char* json, size_t size) {
  try {
    const std::string text = sparamx::CpuInfoJson();
    CopyText(text, json, size);
    return text.size();
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

}  // extern "C"
