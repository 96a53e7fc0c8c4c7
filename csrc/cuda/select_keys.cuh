// SPDX-License-Identifier: Apache-2.0
// What the passes of select_pages share: parameters, candidate keys as ordered integers, digits.
#pragma once

#include "../paged_layout.h"
#include "gpu.cuh"

namespace kvc::gpu {

constexpr int kDigits = 4, kDigitBits = 8, kBins = 1 << kDigitBits;

struct SelectParams {
  PagedRows rows;              // before this compression; block_table and seq_lens unused
  const float* scores;         // [pages, B]
  const int64_t* page_start;   // [R]
  const int32_t* new_covered;  // [R]
  const int32_t* num_freed;    // [R, A]
  const int32_t* num_recent;   // [R]
  int32_t* histogram;          // [kDigits, R * A, kBins] zeroed; pages that a digit adds
  int2* threshold;             // [kDigits + 1, R * A] price prefix, pages cheaper than it
  int2* head_pages;            // [R, L * H] pages cheaper than the price, pages at most it
  int32_t* lost_pages;         // [R, L * H]
  int32_t* kept_pages;         // [R, L * H] out
  int32_t* kept_first;         // [R, L * H] out
  int32_t* kept_keys;          // [num_kept, T] out
  int64_t num_kept;
  int32_t num_requests;  // R
  int32_t groups;        // A
  int32_t num_sinks, floor_pages;
  int32_t page_keys;  // T
};

// The candidate keys of one head.
struct Candidates {
  const float* scores;  // [count]
  int32_t count;
  int32_t sinks, recent_from;  // keys before and from here on are shielded

  __device__ __forceinline__ bool shielded(int key) const {
    return key < sinks || key >= recent_from;
  }

  // The score as an integer of the same order; NaN counts as +inf and -0 as 0.
  __device__ __forceinline__ uint32_t order(int key) const {
    float score = __ldg(scores + key);
    if (score != score) score = kInfinity;
    const uint32_t bits = __float_as_uint(score + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
};

constexpr int kPerThread = 4;  // loads in flight per thread

// Calls f(order) for every key of the head that is not shielded.
template <int kThreads, typename F>
__device__ __forceinline__ void for_each_order(const Candidates& c, F&& f) {
  for (int start = threadIdx.x; start < c.count; start += kThreads * kPerThread) {
    uint32_t order[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int key = start + i * kThreads;
      order[i] = key < c.count ? c.order(key) : 0;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int key = start + i * kThreads;
      if (key < c.count && !c.shielded(key)) f(order[i]);
    }
  }
}

__device__ __forceinline__ Candidates candidates(const SelectParams& p, int request, int slot) {
  const HeadPages head = head_pages(p.rows, request, slot);
  const int new_covered = p.new_covered[request];
  Candidates c;
  c.scores = p.scores + (p.page_start[request] + head.first_candidate(new_covered)) *
                            static_cast<int64_t>(p.rows.block_size);
  c.count = head.candidate_pages(new_covered) * p.rows.block_size;
  c.sinks = p.num_sinks;
  c.recent_from = c.count - p.num_recent[request];
  return c;
}

// The first digit at which `sum` plus the bins up to it reaches `wanted` (the last digit if none
// does), and the sum of the bins before it. Called by kBins or more threads.
__device__ __forceinline__ int2 find_digit(int bin, int sum, int wanted, int* warps, int2* found) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int inclusive = lanes_inclusive_sum(bin);
  if (lane == kWarp - 1 && warp < kBins / kWarp) warps[warp] = inclusive;
  __syncthreads();
  if (threadIdx.x < kBins) {
    for (int i = 0; i < warp; ++i) sum += warps[i];
    const int up_to = sum + inclusive, before = up_to - bin;
    const int digit = threadIdx.x;
    const bool last = digit == kBins - 1;
    if ((digit == 0 || before < wanted) && (up_to >= wanted || last)) {
      *found = make_int2(digit, before);
    }
  }
  __syncthreads();
  return *found;
}

}  // namespace kvc::gpu
