// A parallel loop for packing and unpacking, which run outside any ONNX Runtime session.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace sparamx {

// Calls body(i) once for each i in [0, count) from up to `threads` threads (0: one per core); items are claimed one by
// one. What body throws is thrown here, when every thread has ended; items may then be left out.
template <typename Body>
void ForEach(size_t count, unsigned threads, const Body& body) {
  if (threads == 0) threads = std::thread::hardware_concurrency();
  if (threads > count) threads = static_cast<unsigned>(count);
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr failure;
  auto work = [&] {
    try {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      if (!failed.exchange(true)) failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (unsigned t = 1; t < threads; ++t) helpers.emplace_back(work);
  } catch (...) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace sparamx
