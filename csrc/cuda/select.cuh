// SPDX-License-Identifier: Apache-2.0
// select_pages without a sort. A page of a head costs at most v exactly if the head has that many
// whole pages of keys with score <= v, so the price at which a group has freed enough is found
// digit by digit from histograms (threshold passes), most significant first. Then every head
// finds its own last evicted key in the same way and writes the others in order. All arithmetic is
// on integers, so atomics do not make the result depend on timing.
#pragma once

#include "select_keys.cuh"

namespace kvc::gpu {

// One head per block. Pass d adds the head's pages to bin d of the group; pass kDigits, with the
// price known, counts the head's pages below and at it.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) threshold_kernel(SelectParams p, int pass) {
  __shared__ int bins[kBins], warps[kThreads / kWarp], below;
  __shared__ int2 found;
  const int slots = p.rows.slots, head = blockIdx.x, request = head / slots, slot = head % slots;
  const int group = request * p.groups + slot / (slots / p.groups);
  const int all_groups = p.num_requests * p.groups;
  uint32_t prefix = 0;
  if (pass > 0) {
    // Every block repeats this for its group; what the first one writes serves the next pass.
    const int2 before = pass == 1 ? make_int2(0, 0) : p.threshold[(pass - 1) * all_groups + group];
    const int64_t row = static_cast<int64_t>(pass - 1) * all_groups + group;
    const int bin = threadIdx.x < kBins ? p.histogram[row * kBins + threadIdx.x] : 0;
    const int2 digit = find_digit(bin, before.y, p.num_freed[group], warps, &found);
    prefix = static_cast<uint32_t>(before.x) << kDigitBits | digit.x;
    if (slot % (slots / p.groups) == 0 && threadIdx.x == 0) {
      p.threshold[pass * all_groups + group] = make_int2(static_cast<int>(prefix), digit.y);
    }
  }
  if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) below = 0;
  __syncthreads();
  const Candidates c = candidates(p, request, slot);
  const int shift = (kDigits - pass) * kDigitBits;  // low bits that are still open
  int cheaper = 0, equal = 0;
  for_each_order<kThreads>(c, [&](uint32_t order) {
    // 64 bits, because shift is 32 in pass 0.
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(order) >> shift);
    cheaper += high < prefix;
    if (high == prefix) {
      if (pass == kDigits) {
        ++equal;
      } else {
        atomicAdd(&bins[order >> (shift - kDigitBits) & (kBins - 1)], 1);
      }
    }
  });
  cheaper = __reduce_add_sync(kAllLanes, cheaper);
  equal = __reduce_add_sync(kAllLanes, equal);
  if (threadIdx.x % kWarp == 0) {
    atomicAdd(&below, cheaper);
    if (equal > 0) atomicAdd(&bins[0], equal);
  }
  __syncthreads();
  const int page_keys = p.page_keys;
  const int evictable = max(0, c.count / page_keys - p.floor_pages);
  if (pass == kDigits) {
    if (threadIdx.x == 0) {
      p.head_pages[head] = make_int2(min(evictable, below / page_keys),
                                     min(evictable, (below + bins[0]) / page_keys));
    }
    return;
  }
  const int bin = threadIdx.x < kBins ? bins[threadIdx.x] : 0;
  int total;
  const int before = below + block_exclusive_sum<kThreads>(bin, warps, &total);
  const int added = min(evictable, (before + bin) / page_keys) - min(evictable, before / page_keys);
  if (threadIdx.x < kBins && added > 0) {
    const int64_t row = static_cast<int64_t>(pass) * all_groups + group;
    atomicAdd(&p.histogram[row * kBins + threadIdx.x], added);
  }
}

// One block: deals the pages that cost exactly the price in (layer, head, page) order, and lays
// the kept pages out. `ties` [R * L * H] is scratch.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) deal_kernel(SelectParams p, int32_t* ties) {
  __shared__ int warps[kThreads / kWarp];
  const int slots = p.rows.slots, heads = p.num_requests * slots, per_group = slots / p.groups;
  int tie_sum = 0, kept_sum = 0;
  for (int start = 0; start < heads; start += kThreads) {
    const int head = start + threadIdx.x;
    const bool live = head < heads;
    const int2 pages = live ? p.head_pages[head] : make_int2(0, 0);
    int total;
    const int before = tie_sum + block_exclusive_sum<kThreads>(pages.y - pages.x, warps, &total);
    tie_sum += total;
    if (live) ties[head] = before;
    __syncthreads();  // a group's first head is in this round or an earlier one
    int kept = 0;
    if (live) {
      const int group = head / per_group;
      const int first_head = group * per_group;
      const int cheaper = p.threshold[kDigits * p.num_requests * p.groups + group].y;
      const int dealt = p.num_freed[group] - cheaper - (before - ties[first_head]);
      const int lost = pages.x + min(max(dealt, 0), pages.y - pages.x);
      const int request = head / slots;
      kept = head_pages(p.rows, request, head % slots).candidate_pages(p.new_covered[request]) /
                 p.rows.page_blocks -
             lost;
      p.lost_pages[head] = lost;
      p.kept_pages[head] = kept;
    }
    const int first = kept_sum + block_exclusive_sum<kThreads>(kept, warps, &total);
    kept_sum += total;
    if (live) p.kept_first[head] = first;
    __syncthreads();
  }
}

// One head per block: finds the last evicted key and writes the others in order.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) keep_kernel(SelectParams p) {
  __shared__ int bins[kBins], warps[kThreads / kWarp];
  __shared__ int2 found;
  const int slots = p.rows.slots, head = blockIdx.x;
  const Candidates c = candidates(p, head / slots, head % slots);
  const int evicted = p.lost_pages[head] * p.page_keys;
  uint32_t last = 0;  // the highest evicted score; grows by a digit per round
  int below = 0;      // keys below it
  for (int shift = 32; evicted > 0 && shift > 0; shift -= kDigitBits) {
    if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
    __syncthreads();
    for_each_order<kThreads>(c, [&](uint32_t order) {
      if (static_cast<uint64_t>(order) >> shift == last) {
        atomicAdd(&bins[order >> (shift - kDigitBits) & (kBins - 1)], 1);
      }
    });
    __syncthreads();
    const int bin = threadIdx.x < kBins ? bins[threadIdx.x] : 0;
    const int2 digit = find_digit(bin, below, evicted, warps, &found);
    last = last << kDigitBits | digit.x;
    below = digit.y;
    __syncthreads();
  }
  const int equal_evicted = evicted - below;  // of the keys at `last`, in key order
  const int64_t first = static_cast<int64_t>(p.kept_first[head]) * p.page_keys;
  const int64_t room = p.num_kept * p.page_keys;
  int above_sum = 0, equal_sum = 0;
  for (int start = 0; start < c.count; start += kThreads * kPerThread) {
    const int begin = start + threadIdx.x * kPerThread;
    // Per key: 1 above the threshold or shielded, 1 << 16 equal to it. A round has fewer than
    // 2^16 keys, so both counts go through one prefix sum.
    int kind[kPerThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int key = begin + i;
      kind[i] = 0;
      if (key < c.count) {
        const uint32_t order = c.order(key);
        const bool open = evicted > 0 && !c.shielded(key);
        kind[i] = !open || order > last ? 1 : order == last ? 1 << 16 : 0;
      }
      sum += kind[i];
    }
    int total;
    int before = block_exclusive_sum<kThreads>(sum, warps, &total);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int above = above_sum + (before & 0xffff), equal = equal_sum + (before >> 16);
      if (kind[i] == 1 || (kind[i] > 1 && equal >= equal_evicted)) {
        const int64_t place = first + above + max(0, equal - equal_evicted);
        if (place < room) p.kept_keys[place] = begin + i;
      }
      before += kind[i];
    }
    above_sum += total & 0xffff;
    equal_sum += total >> 16;
    __syncthreads();
  }
}

}  // namespace kvc::gpu
