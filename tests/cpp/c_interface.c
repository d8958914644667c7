/* A C program that packs, checks, describes, unpacks and multiplies through the exported functions.
 *
 * Usage: c_interface [LEVEL]. LEVEL is the instruction-set level that must be chosen on this CPU; without it, every
 * level that the CPU has is used. Ends with 0 if everything is right.
 */
#include <math.h>
#include <sparamx_onnx/sparamx.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kMaxM = 5 };

static char error[256];

static void fail(const char* what, const char* detail) {
  fprintf(stderr, "failed: %s: %s\n", what, detail);
  exit(1);
}

static void expect_ok(int status, const char* what) {
  if (status != SPARAMX_OK) fail(what, error);
}

/* Numbers that bf16 holds exactly, so that every weight type can be compared with the same sum. */
static float small_number(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)((int)(*state >> 24) - 128) / 64.0f;
}

static void check_product(const void* blob, uint64_t blob_size, const float* w, uint64_t k, uint64_t n, const char* isa,
                          const char* expected_level, uint32_t threads) {
  float* x = malloc(kMaxM * k * sizeof(float));
  float* bias = malloc(n * sizeof(float));
  float* y = malloc(kMaxM * n * sizeof(float));
  char path[64];
  uint32_t state = 7;
  uint64_t m, row, col, i;
  if (!x || !bias || !y) fail("malloc", "out of memory");
  for (i = 0; i < kMaxM * k; ++i) x[i] = small_number(&state);
  for (i = 0; i < n; ++i) bias[i] = small_number(&state);

  for (m = 1; m <= kMaxM; m += kMaxM - 1) {
    memset(y, 0xff, kMaxM * n * sizeof(float));
    expect_ok(sparamx_matmul(blob, blob_size, x, m, bias, SPARAMX_EPILOGUE_RELU, isa, threads, y, path, sizeof path,
                             error, sizeof error),
              "sparamx_matmul");
    if (expected_level && strncmp(path, expected_level, strlen(expected_level)) != 0) fail("level that ran", path);
    for (row = 0; row < m; ++row) {
      for (col = 0; col < n; ++col) {
        double sum = bias[col];
        double magnitude = fabs(sum);
        for (i = 0; i < k; ++i) {
          sum += (double)x[row * k + i] * w[i * n + col];
          magnitude += fabs((double)x[row * k + i] * w[i * n + col]);
        }
        if (sum < 0) sum = 0;
        /* `!(a <= b)` so that a NaN fails too. */
        if (!(fabs(y[row * n + col] - sum) <= 1e-6 * magnitude)) fail("product", path);
      }
    }
  }
  free(y);
  free(bias);
  free(x);
}

static void check_matrix(uint64_t k, uint64_t n, uint32_t weight_type, uint32_t form, const char* expected_level) {
  static const char* const levels[] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_vbmi2", "avx512_bf16", "amx"};
  float* w = malloc(k * n * sizeof(float));
  float* back = malloc(k * n * sizeof(float));
  sparamx_matrix matrix;
  sparamx_pack_options options;
  sparamx_description description;
  uint64_t size = 0, nnz = 0, i;
  uint32_t state = (uint32_t)(k * 131 + n);
  size_t level;
  unsigned char* blob;
  if (!w || !back) fail("malloc", "out of memory");
  for (i = 0; i < k * n; ++i) {
    w[i] = (state >> 20) & 1 ? small_number(&state) : 0.0f * small_number(&state);
    nnz += w[i] != 0.0f;
  }
  memset(&matrix, 0, sizeof matrix);
  matrix.data = w;
  matrix.k = k;
  matrix.n = n;
  matrix.stride_k = (int64_t)n;
  matrix.stride_n = 1;
  matrix.source_type = SPARAMX_SOURCE_FP32;
  memset(&options, 0, sizeof options);
  options.weight_type = weight_type;
  options.form = form;
  options.threads = 2;

  expect_ok(sparamx_packed_size(&matrix, &options, &size, error, sizeof error), "sparamx_packed_size");
  blob = malloc(size);
  if (!blob) fail("malloc", "out of memory");
  expect_ok(sparamx_pack(&matrix, &options, blob, size, error, sizeof error), "sparamx_pack");
  expect_ok(sparamx_validate(blob, size, error, sizeof error), "sparamx_validate");
  expect_ok(sparamx_describe(blob, size, &description, error, sizeof error), "sparamx_describe");
  if (description.k != k || description.n != n || description.nnz != nnz || description.blob_bytes != size ||
      description.weight_type != weight_type || description.form != form) {
    fail("sparamx_describe", "does not describe what was packed");
  }
  expect_ok(sparamx_unpack(blob, size, back, 2, error, sizeof error), "sparamx_unpack");
  for (i = 0; i < k * n; ++i) {
    if (back[i] != w[i]) fail("sparamx_unpack", "gives other numbers than were packed");
  }

  check_product(blob, size, w, k, n, NULL, expected_level, 1);
  check_product(blob, size, w, k, n, NULL, expected_level, 3);
  for (level = 0; level < sizeof levels / sizeof *levels; ++level) {
    char json[8192];
    char supported[64];
    sparamx_cpu_info(json, sizeof json);
    snprintf(supported, sizeof supported, "\"%s\"", levels[level]);
    if (strstr(json, supported) == NULL) fail("sparamx_cpu_info does not name the level", levels[level]);
    if (sparamx_matmul(blob, size, w, 0, NULL, SPARAMX_EPILOGUE_NONE, levels[level], 1, back, NULL, 0, error,
                       sizeof error) == SPARAMX_OK) {
      check_product(blob, size, w, k, n, levels[level], NULL, 2);
    }
  }

  /* A blob that is cut short must be refused, not read past its end. */
  if (sparamx_validate(blob, size - 1, error, sizeof error) != SPARAMX_DAMAGED) fail("sparamx_validate", "a cut blob");
  blob[0] ^= 1;
  if (sparamx_validate(blob, size, error, sizeof error) != SPARAMX_DAMAGED) fail("sparamx_validate", "a wrong magic");
  free(blob);
  free(back);
  free(w);
}

int main(int argc, char** argv) {
  static const uint64_t shapes[][2] = {{1, 1}, {7, 13}, {64, 64}, {129, 50}, {300, 193}};
  static const uint32_t forms[] = {SPARAMX_FORM_SPARSE, SPARAMX_FORM_DENSE};
  static const uint32_t types[] = {SPARAMX_FP32, SPARAMX_BF16};
  const char* expected_level = argc > 1 ? argv[1] : NULL;
  size_t shape, form, type;
  for (shape = 0; shape < sizeof shapes / sizeof *shapes; ++shape) {
    for (form = 0; form < 2; ++form) {
      for (type = 0; type < 2; ++type) {
        check_matrix(shapes[shape][0], shapes[shape][1], types[type], forms[form], expected_level);
      }
    }
  }
  printf("sparamx-onnx %s: ok\n", sparamx_version());
  return 0;
}
