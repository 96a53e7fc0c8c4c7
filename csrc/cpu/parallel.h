// SPDX-License-Identifier: Apache-2.0
// Threads and scratch memory of the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>

namespace kvc {

// Below this many multiplications or copied bytes, waking the other threads costs more than it
// gains, the more so where something else keeps them busy.
constexpr int64_t kWorthThreads = 1 << 18;

// Calls f(next) in every thread; f repeats `while ((item = next()) >= 0)`. Items are handed out one
// at a time because their costs differ (ragged heads, causal tiles); a kernel stays deterministic
// by giving every output to one item. `work` is the size of all items together.
template <typename F>
void parallel_items(int64_t num_items, int64_t work, const F& f) {
  std::atomic<int64_t> counter{0};
  const auto next = [&counter, num_items] {
    const int64_t item = counter.fetch_add(1, std::memory_order_relaxed);
    return item < num_items ? item : int64_t{-1};
  };
  const int64_t threads =
      work < kWorthThreads ? 1 : std::min<int64_t>(num_items, torch::stable::get_num_threads());
  if (threads <= 1) {
    if (num_items > 0) f(next);
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (begin < end) f(next);
  });
}

// Zeroed, cache-line aligned array.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(bytes(count), std::align_val_t{64}))) {
    std::memset(data_, 0, bytes(count));
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() { return data_; }

 private:
  static size_t bytes(int64_t count) { return static_cast<size_t>(count) * sizeof(T) + 64; }
  T* data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace kvc
