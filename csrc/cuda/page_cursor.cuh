// SPDX-License-Identifier: Apache-2.0
// How a warp gets the keys of one head into shared memory.
#pragma once

#include "../paged_layout.h"
#include "gpu.cuh"

namespace kvc::gpu {

// Page ids of 32 consecutive pages of a head, one per lane: the divisions and the dependent load
// of a page id are paid once per 32 pages. The next 32 are looked up ahead.
class PageIds {
 public:
  // Forgets what is held; the head may have changed.
  __device__ __forceinline__ void reset(const HeadPages& head, int num_keys) {
    last_ = ceil_div(num_keys, head.block_size) - 1;
    begin_ = -2 * kWarp;
  }

  // The same, with the first pages looked up already.
  __device__ __forceinline__ void reset(const HeadPages& head, int num_keys, int first_ids) {
    last_ = ceil_div(num_keys, head.block_size) - 1;
    begin_ = 0;
    ids_ = first_ids;
    look_ahead(head);
  }

  // What to hand to reset() later: the load may take its time until then.
  static __device__ __forceinline__ int look_up(const HeadPages& head, int num_keys) {
    const int last = ceil_div(num_keys, head.block_size) - 1;
    return last < 0 ? 0 : head.page_id(min(static_cast<int>(threadIdx.x % kWarp), last));
  }

  // Makes pages [first, first + count) available, count <= 32. Called by the whole warp.
  __device__ __forceinline__ void prepare(const HeadPages& head, int first, int count) {
    if (first >= begin_ && min(first + count - 1, last_) < begin_ + kWarp) return;
    ids_ = first == begin_ + kWarp ? ahead_ : page_of_lane(head, first);
    begin_ = first;
    look_ahead(head);
  }

  // Id of page j; pages behind the last one count as the last. Called by the whole warp.
  __device__ __forceinline__ int get(int j) const {
    return __shfl_sync(kAllLanes, ids_, min(j, last_) - begin_);
  }

 private:
  __device__ __forceinline__ int page_of_lane(const HeadPages& head, int first) const {
    return head.page_id(min(first + static_cast<int>(threadIdx.x % kWarp), last_));
  }
  __device__ __forceinline__ void look_ahead(const HeadPages& head) {
    if (begin_ + kWarp <= last_) ahead_ = page_of_lane(head, begin_ + kWarp);
  }

  int ids_ = 0, ahead_ = 0, begin_ = -2 * kWarp, last_ = -1;
};

// Copies keys [first, first + kKeys) of a head, `kWords` 16-byte words of each (K, or K and V),
// into rows of `kStride` bytes at `shared`; rows from num_keys on become zero. `first` is a
// multiple of kKeys. `thread` of `kThreads` takes part; all of a warp must. `policy`: of the L2
// cache, if any.
template <int kKeys, int kWords, int kStride, int kPair, int kThreads, typename... Policy>
__device__ __forceinline__ void copy_keys(uint32_t shared, const char* pages, const HeadPages& head,
                                          PageIds* ids, int first, int num_keys, int thread,
                                          Policy... policy) {
  static_assert(kKeys * kWords % kThreads == 0);
  constexpr int kSteps = kKeys * kWords / kThreads;
  const int shift = __ffs(head.block_size) - 1, mask = head.block_size - 1;
  const int page = first >> shift;
  const int64_t page_bytes = static_cast<int64_t>(head.block_size) * kPair;
  const char* base = pages + (first & mask) * kPair;  // not 0 only if a page holds several units
  ids->prepare(head, page, ceil_div(kKeys, head.block_size));
  // Constants from step to step where a step takes whole rows.
  constexpr bool kWhole = kThreads % kWords == 0;
  const auto row_of = [&](int i) {
    return kWhole ? i * (kThreads / kWords) + thread / kWords : (i * kThreads + thread) / kWords;
  };
  const auto copy_row = [&](int i, const char* from, int row_in_page, bool live) {
    const int word = kWhole ? thread % kWords : (i * kThreads + thread) % kWords;
    copy_async(shared + row_of(i) * kStride + word * 16, from + row_in_page * kPair + word * 16,
               live, policy...);
  };
  // In one page all addresses differ by constants, and in each of two; in one page twice, because
  // most units are whole.
  if (kKeys <= head.block_size && first + kKeys <= num_keys) {
    base += ids->get(page) * page_bytes;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) copy_row(i, base, row_of(i), true);
  } else if (kKeys <= head.block_size) {
    base += ids->get(page) * page_bytes;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) copy_row(i, base, row_of(i), first + row_of(i) < num_keys);
  } else if (kKeys == 2 * head.block_size && first + kKeys <= num_keys) {
    const char* low = base + ids->get(page) * page_bytes;
    const char* high = base + ids->get(page + 1) * page_bytes - kKeys / 2 * kPair;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      copy_row(i, row_of(i) < kKeys / 2 ? low : high, row_of(i), true);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = row_of(i);
      copy_row(i, base + ids->get(page + (row >> shift)) * page_bytes, row & mask,
               first + row < num_keys);
    }
  }
}

}  // namespace kvc::gpu
