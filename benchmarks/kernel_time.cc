// Runs packed matrices one after the other in the library's own runtime, without ONNX Runtime, and says how long they
// took. For one level's kernel or for the one that the table of choice.cc picks. Plain C functions for ctypes.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime/choice.h"
#include "runtime/cpu.h"
#include "runtime/matmul.h"

namespace {

constexpr const char* kActivationNames[sparamx::kActivationTypes] = {"fp32", "bf16", "int8"};

constexpr int kSpins = 2000;

// Threads that spin between the loops of one timing, as ONNX Runtime's do between the nodes of a model, and sleep
// between timings, so that they disturb nothing else that is timed in turn.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int index = 1; index < threads; ++index) threads_.emplace_back([this] { Work(); });
  }

  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void Begin() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      awake_ = true;
    }
    wake_.notify_all();
  }

  void End() { awake_ = false; }

  static void For(void* host, size_t count, void (*body)(void* user, size_t i), void* user) {
    Pool& pool = *static_cast<Pool*>(host);
    pool.body_ = body;
    pool.user_ = user;
    pool.count_ = count;
    pool.next_ = 0;
    pool.running_ = static_cast<int>(pool.threads_.size());
    pool.loop_.fetch_add(1);
    pool.TakeItems();
    for (int spins = 0; pool.running_ != 0; ++spins) Pause(spins);
  }

  // Memory for one product, aligned to 64 bytes; stays until more is asked for.
  void* Scratch(size_t bytes) {
    if (bytes + 64 > scratch_bytes_) {
      scratch_bytes_ = bytes + 64;
      scratch_.reset(new uint8_t[scratch_bytes_]());
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch_.get()) + 63) / 64 * 64);
  }

 private:
  // On a busy machine whom we wait for may need this very CPU.
  static void Pause(int spins) {
    if (spins < kSpins)
      __builtin_ia32_pause();
    else
      std::this_thread::yield();
  }

  void TakeItems() {
    for (size_t i = next_++; i < count_; i = next_++) body_(user_, i);
  }

  void Work() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return stop_ || awake_; });
        if (stop_) return;
      }
      for (int spins = 0; awake_; ++spins) {
        const uint64_t loop = loop_;
        if (loop == seen) {
          Pause(spins);
          continue;
        }
        spins = 0;
        seen = loop;
        TakeItems();
        --running_;
      }
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> awake_{false};
  bool stop_ = false;

  void (*body_)(void*, size_t) = nullptr;
  void* user_ = nullptr;
  size_t count_ = 0;
  std::atomic<size_t> next_{0};
  std::atomic<uint64_t> loop_{0};
  std::atomic<int> running_{0};

  std::unique_ptr<uint8_t[]> scratch_;
  size_t scratch_bytes_ = 0;
};

void Say(const std::string& message, char* error, size_t error_size) {
  const size_t length = std::min(message.size(), error_size - 1);
  std::memcpy(error, message.data(), length);
  error[length] = '\0';
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void* kernel_pool_create(int threads) {
  return new Pool(threads);
}
__attribute__((visibility("default"))) void kernel_pool_destroy(void* pool) {
  delete static_cast<Pool*>(pool);
}

// A product with the matrix of `blob`, which must stay. `level` null: the kernel of choice.cc for each M; else the own
// kernel of that level for these activations ("" for the weight type's default), whatever choice.cc says. Null, with
// the reason in `error`, where that cannot be.
__attribute__((visibility("default"))) void* kernel_create(const void* blob, uint64_t bytes, const char* level,
                                                           const char* activations, char* error, size_t error_size) {
  auto product = std::make_unique<sparamx::MatMul>();
  sparamx::MatMul::Options options;
  options.isa = level;
  if (level != nullptr) {
    const auto* data = static_cast<const uint8_t*>(blob);
    sparamx::PackedView view;
    sparamx::Status status = sparamx::Parse(data, bytes, &view);
    const sparamx::Level* found = nullptr;
    if (status.ok()) status = sparamx::ChooseLevel(level, &found);
    if (!status.ok()) return Say(status.message, error, error_size), nullptr;
    int index = static_cast<int>(sparamx::DefaultActivations(view.type));
    for (int i = 0; i < sparamx::kActivationTypes; ++i)
      if (std::strcmp(activations, kActivationNames[i]) == 0) index = i;
    options.kernel = &found->kernels[static_cast<int>(view.type)][index];
    if (options.kernel->path == nullptr) return Say("this level has no such kernel", error, error_size), nullptr;
  }
  const sparamx::Status status = product->Init(static_cast<const uint8_t*>(blob), bytes, options);
  if (!status.ok()) return Say(status.message, error, error_size), nullptr;
  return product.release();
}

__attribute__((visibility("default"))) void kernel_destroy(void* product) {
  delete static_cast<sparamx::MatMul*>(product);
}

// The name of the kernel that runs M = rows.
__attribute__((visibility("default"))) const char* kernel_path(void* product, uint64_t rows) {
  return static_cast<sparamx::MatMul*>(product)->path(rows);
}

// Seconds of Y[rows, N] = X[rows, K] W for each of `count` products of one shape, one after the other.
__attribute__((visibility("default"))) double kernel_run(void* pool, void* const* products, uint64_t count,
                                                         uint64_t rows, const float* x, float* y) {
  Pool& threads = *static_cast<Pool*>(pool);
  const sparamx::ParallelFor parallel = {Pool::For, pool};
  auto product = [&](uint64_t i) { return static_cast<const sparamx::MatMul*>(products[i]); };
  void* scratch = count == 0 ? nullptr : threads.Scratch(product(0)->ScratchBytes(rows));
  threads.Begin();
  Pool::For(pool, 0, nullptr, nullptr);  // returns when everyone is awake
  const auto start = std::chrono::steady_clock::now();
  void* const outputs[] = {y};
  for (uint64_t i = 0; i < count; ++i) product(i)->Run(x, rows, nullptr, outputs, scratch, parallel);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  threads.End();
  return seconds.count();
}
}
