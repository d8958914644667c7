// Streaming reads, the yardstick of memory-bound kernels: how fast do these threads read these bytes if they do nothing
// else? Two loops, because the simplest one is not the fastest: `plain` reads each thread's part front to back and
// leaves the rest to the hardware; `prefetched` reads two halves of the part side by side and prefetches a little ahead
// in each, which bridges the gaps that the hardware's prefetchers leave at every 4 KiB page. Plain C functions for
// ctypes; x86-64, C++17.

#include <immintrin.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

enum Loop { kPlain = 0, kPrefetched = 1 };

// Measured best on Sapphire Rapids among 1, 4 and 8 KiB; nothing is gained further ahead.
constexpr std::size_t kPrefetchBytes = 1024;
constexpr std::size_t kStep = 512;

struct Part {
  const char* begin;
  std::size_t bytes;
};

template <int kStreams, bool kPrefetch>
__attribute__((target("avx512f"))) std::uint64_t ReadAvx512(Part part) {
  __m512i sum[8];
  for (auto& s : sum) s = _mm512_setzero_si512();
  const std::size_t stream = part.bytes / kStreams / kStep * kStep;
  for (std::size_t i = 0; i < stream; i += kStep) {
    for (int s = 0; s < kStreams; ++s) {
      const char* p = part.begin + s * stream + i;
      for (int j = 0; j < 8; ++j) {
        if (kPrefetch) _mm_prefetch(p + kPrefetchBytes + 64 * j, _MM_HINT_T1);
        sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(p + 64 * j));
      }
    }
  }
  alignas(64) std::uint64_t lanes[8];
  std::uint64_t result = 0;
  for (const auto& s : sum) {
    _mm512_store_si512(lanes, s);
    for (const std::uint64_t lane : lanes) result ^= lane;
  }
  for (std::size_t i = kStreams * stream; i < part.bytes; ++i) result ^= static_cast<unsigned char>(part.begin[i]);
  return result;
}

template <int kStreams, bool kPrefetch>
__attribute__((target("avx2"))) std::uint64_t ReadAvx2(Part part) {
  __m256i sum[8];
  for (auto& s : sum) s = _mm256_setzero_si256();
  const std::size_t stream = part.bytes / kStreams / kStep * kStep;
  for (std::size_t i = 0; i < stream; i += kStep) {
    for (int s = 0; s < kStreams; ++s) {
      const char* p = part.begin + s * stream + i;
      for (int j = 0; j < 16; ++j) {
        if (kPrefetch && j % 2 == 0) _mm_prefetch(p + kPrefetchBytes + 32 * j, _MM_HINT_T1);
        sum[j % 8] = _mm256_xor_si256(sum[j % 8], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * j)));
      }
    }
  }
  alignas(32) std::uint64_t lanes[4];
  std::uint64_t result = 0;
  for (const auto& s : sum) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), s);
    for (const std::uint64_t lane : lanes) result ^= lane;
  }
  for (std::size_t i = kStreams * stream; i < part.bytes; ++i) result ^= static_cast<unsigned char>(part.begin[i]);
  return result;
}

std::uint64_t Read(Part part, int loop) {
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  if (has_avx512) return loop == kPlain ? ReadAvx512<1, false>(part) : ReadAvx512<2, true>(part);
  return loop == kPlain ? ReadAvx2<1, false>(part) : ReadAvx2<2, true>(part);
}

// The caller reads the first part, one thread each of the others. Between calls the threads sleep: they must not
// disturb what is timed in turn with them.
class Pool {
 public:
  explicit Pool(int threads) : parts_(threads), sums_(threads) {
    for (int index = 1; index < threads; ++index) threads_.emplace_back([this, index] { Work(index); });
  }

  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  std::uint64_t ReadAll(const char* data, std::size_t bytes, int loop) {
    const std::size_t count = parts_.size();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t begin = bytes / count * i, end = i + 1 == count ? bytes : bytes / count * (i + 1);
        parts_[i] = Part{data + begin, end - begin};
      }
      loop_ = loop;
      running_ = static_cast<int>(count) - 1;
      ++round_;
    }
    wake_.notify_all();
    sums_[0] = Read(parts_[0], loop);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    std::uint64_t result = 0;
    for (const std::uint64_t sum : sums_) result ^= sum;
    return result;
  }

 private:
  void Work(int index) {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      const Part part = parts_[index];
      const int loop = loop_;
      lock.unlock();
      const std::uint64_t sum = Read(part, loop);
      lock.lock();
      sums_[index] = sum;
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Part> parts_;
  std::vector<std::uint64_t> sums_;
  std::vector<std::thread> threads_;
  std::uint64_t round_ = 0;
  int running_ = 0, loop_ = kPlain;
  bool stop_ = false;
};

}  // namespace

extern "C" {

void* stream_pool_create(int threads) {
  return new Pool(threads);
}
void stream_pool_destroy(void* pool) {
  delete static_cast<Pool*>(pool);
}

// Reads every byte once; the result depends on all of them, so that no read can be left out. `loop` is one of Loop.
std::uint64_t stream_read(void* pool, const void* data, std::uint64_t bytes, int loop) {
  return static_cast<Pool*>(pool)->ReadAll(static_cast<const char*>(data), bytes, loop);
}
}
