/* The C interface of sparamx-onnx: pack, inspect, unpack and multiply packed weights without ONNX Runtime.
 *
 * Every function that returns int returns a sparamx_status; where it is not SPARAMX_OK, `error` (if not NULL) holds one
 * sentence, cut to `error_size` bytes and always terminated. No function keeps a pointer after it returns.
 * The packed format is described byte by byte in docs/format.md.
 */
#ifndef SPARAMX_H
#define SPARAMX_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SPARAMX_EXPORT __attribute__((visibility("default")))
#else
#define SPARAMX_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum sparamx_status {
  SPARAMX_OK = 0,
  SPARAMX_INVALID_ARGUMENT = 1, /* the caller's sizes, names or options make no sense */
  SPARAMX_DAMAGED = 2,          /* the blob contradicts itself or its size */
  SPARAMX_UNSUPPORTED = 3,      /* a newer format, or an instruction set that this CPU lacks */
  SPARAMX_OUT_OF_MEMORY = 4
};

enum sparamx_weight_type { SPARAMX_FP32 = 0, SPARAMX_BF16 = 1, SPARAMX_INT8 = 2, SPARAMX_INT4 = 3 };
enum sparamx_form { SPARAMX_FORM_AUTO = 0, SPARAMX_FORM_SPARSE = 1, SPARAMX_FORM_DENSE = 2 };
enum sparamx_scale_type {
  SPARAMX_SCALE_NONE = 0,
  SPARAMX_SCALE_FP16 = 1,
  SPARAMX_SCALE_FP32 = 2,
  SPARAMX_SCALE_INT8 = 3
};
enum sparamx_source_type { SPARAMX_SOURCE_FP32 = 0, SPARAMX_SOURCE_FP16 = 1, SPARAMX_SOURCE_BF16 = 2 };
enum sparamx_epilogue {
  SPARAMX_EPILOGUE_NONE = 0,
  SPARAMX_EPILOGUE_RELU = 1,
  SPARAMX_EPILOGUE_GELU = 2,      /* exact: x/2 (1 + erf(x/sqrt 2)) */
  SPARAMX_EPILOGUE_GELU_TANH = 3, /* the tanh approximation */
  SPARAMX_EPILOGUE_SILU = 4
};

/* A dense K x N matrix in memory: element (k, n) stands at data[k * stride_k + n * stride_n] (strides in elements). */
typedef struct sparamx_matrix {
  const void* data;
  uint64_t k, n;
  int64_t stride_k, stride_n;
  uint32_t source_type; /* sparamx_source_type */
} sparamx_matrix;

typedef struct sparamx_pack_options {
  uint32_t weight_type; /* sparamx_weight_type */
  uint32_t form;        /* sparamx_form; AUTO takes the smaller of the two */
  uint32_t scale_type;  /* sparamx_scale_type; NONE takes the weight type's default */
  uint32_t group_size;  /* int4: weights along K that share a scale; otherwise 0 */
  uint32_t threads;     /* 0: one per core */
  /* NULL: the packer chooses the scales. Otherwise finite numbers of the scale type, row-major [groups][n] (int8: one
   * group; int4: ceil(k / group_size)): weights that are whole multiples of their scale keep these as their codes. */
  const float* scales;
} sparamx_pack_options;

/* What a blob says of itself (after a successful check). */
typedef struct sparamx_description {
  uint64_t k, n, nnz, blob_bytes;
  uint32_t format_version, weight_type, form, scale_type, group_size, run_k;
} sparamx_description;

SPARAMX_EXPORT const char* sparamx_version(void);

/* The exact size of the blob that sparamx_pack writes. Reads the whole matrix (it counts non-zeros). */
SPARAMX_EXPORT int sparamx_packed_size(const sparamx_matrix* matrix, const sparamx_pack_options* options,
                                       uint64_t* size, char* error, size_t error_size);
/* Packs into `blob`; blob_size must be what sparamx_packed_size gave for the same matrix and options. Deterministic. */
SPARAMX_EXPORT int sparamx_pack(const sparamx_matrix* matrix, const sparamx_pack_options* options, void* blob,
                                uint64_t blob_size, char* error, size_t error_size);
/* Checks everything that the kernels rely on (header, section table, offsets against bitmaps). */
SPARAMX_EXPORT int sparamx_validate(const void* blob, uint64_t blob_size, char* error, size_t error_size);
SPARAMX_EXPORT int sparamx_describe(const void* blob, uint64_t blob_size, sparamx_description* description, char* error,
                                    size_t error_size);
/* Writes the dense matrix, row-major [K, N] fp32. Validates first. */
SPARAMX_EXPORT int sparamx_unpack(const void* blob, uint64_t blob_size, float* dense, uint32_t threads, char* error,
                                  size_t error_size);

/* Y[M, N] = epilogue(X[M, K] W + bias). `isa` names a level as SPARAMX_ISA does, NULL chooses by CPU and shape.
 * `path` (if not NULL) receives the name of the kernel that ran. bias may be NULL. For tests, benchmarks and hosts
 * without ONNX Runtime: starts `threads` threads per call (1: none). */
SPARAMX_EXPORT int sparamx_matmul(const void* blob, uint64_t blob_size, const float* x, uint64_t m, const float* bias,
                                  uint32_t epilogue, const char* isa, uint32_t threads, float* y, char* path,
                                  size_t path_size, char* error, size_t error_size);

/* One JSON document: CPU name, features, every level with "supported" and the reason where not, the level in force and
 * why. Returns the length it needs (without the terminator); writes at most size - 1 bytes and a terminator. */
SPARAMX_EXPORT size_t sparamx_cpu_info(char* json, size_t size);

#ifdef __cplusplus
}
#endif
#endif
