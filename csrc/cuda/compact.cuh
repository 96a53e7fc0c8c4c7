// SPDX-License-Identifier: Apache-2.0
// compact_pages: gather the kept K/V of every head into its new pages, one warp per new page.
#pragma once

#include "../paged_layout.h"
#include "gpu.cuh"

namespace kvc::gpu {

struct CompactParams {
  PagedRows rows;             // before this compression
  void* pages;                // [P, B, words], or [P, T, words] of what else is stored by key
  const int32_t* kept_pages;  // [R, L * H]
  const int32_t* kept_first;  // [R, L * H] exclusive prefix sum over R, L, H
  const int32_t* kept_keys;   // [K, T]
  const int32_t* new_blocks;  // [R, >= C]
  int64_t new_blocks_stride;
  int64_t num_kept;      // K, new pages in all
  int32_t num_requests;  // R
  int32_t words;         // per key, 2 * D * element size / 16 of K and V
};

// Last index in `first[0, n)` (ascending) with first[index] <= page. The warp tests 32 places at a
// time, so 32768 heads take three dependent loads instead of fifteen.
__device__ __forceinline__ int find_head(const int32_t* first, int n, int64_t page) {
  const int lane = threadIdx.x % kWarp;
  int begin = 0;
  while (n > 1) {
    const int step = ceil_div(n, kWarp);
    const int probe = lane * step;
    const bool below = probe < n && first[begin + probe] <= page;
    const int hit = max(0, __popc(__ballot_sync(kAllLanes, below)) - 1) * step;
    begin += hit;
    n = min(step, n - hit);
  }
  return begin;
}

constexpr int kInFlight = 8;  // loads per lane before the stores

// Word: 16 bytes, or 4 where a key has only one number.
template <int kThreads, typename Word>
__global__ void __launch_bounds__(kThreads) compact_pages_kernel(CompactParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t page = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (page >= p.num_kept) return;
  const int slots = p.rows.slots, page_keys = p.rows.block_size * p.rows.page_blocks;
  const int index = find_head(p.kept_first, p.num_requests * slots, page);
  const int first = p.kept_first[index];
  // Rows of kept_keys that no head owns exist only if num_kept_pages was wrong: nothing to copy.
  if (page < first || page >= first + p.kept_pages[index]) return;
  const int request = index / slots;
  const HeadPages head = head_pages(p.rows, request, index % slots);
  const int base = p.kept_first[request * slots];
  const int32_t target = packed_page_id(p.new_blocks + request * p.new_blocks_stride,
                                        static_cast<int32_t>(page - base), slots);
  Word* pages = static_cast<Word*>(p.pages);
  Word* out = pages + static_cast<int64_t>(target) * page_keys * p.words;
  const int32_t* keys = p.kept_keys + page * page_keys;
  for (int row = 0; row < page_keys; row += kWarp) {
    const int rows = min(kWarp, page_keys - row);
    // Lane i finds where key i of the page lies now; the copy then runs over whole rows.
    int64_t from = 0;
    if (lane < rows) {
      const HeadPages::Place place = head.place(keys[row + lane]);
      from = static_cast<int64_t>(head.page_id(place.page)) * page_keys + place.within;
    }
    Word* target_rows = out + static_cast<int64_t>(row) * p.words;
    const int count = rows * p.words;
    for (int i = lane; i < ceil_div(count, kWarp) * kWarp; i += kInFlight * kWarp) {
      // All loads before the first store: the compiler may not move them, both go to `pages`.
      Word words[kInFlight];
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int word = i + k * kWarp;
        const int64_t source = __shfl_sync(kAllLanes, from, min(word / p.words, rows - 1));
        if (word < count) words[k] = __ldcs(pages + source * p.words + word % p.words);
      }
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
        const int word = i + k * kWarp;
        if (word < count) target_rows[word] = words[k];
      }
    }
  }
}

}  // namespace kvc::gpu
