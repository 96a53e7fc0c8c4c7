// SPDX-License-Identifier: Apache-2.0
// How decode work is shared. All keys of all (request, token, KV head) form one line of 16-key
// units; every warp of the grid takes an equal stretch of it, whatever the lengths of the heads
// are. A head that is cut by a border leaves partial sums, which combine_kernel adds up.
#pragma once

#include "../paged_layout.h"
#include "gpu.cuh"

namespace kvc::gpu {

constexpr int kUnit = 16;  // keys

struct DecodeParams {
  PagedRows rows;
  const void* query;           // [>= T, H * G, D]
  const void* pages;           // [P, B, 2 * D]
  void* out;                   // like query
  const int32_t* query_start;  // [R + 1]
  float* partial_out;          // [workers, 2, G, D] of a head's later stretch, and of its first
  float2* partial_stats;       // [workers, 2, G] maximum (base 2) and sum
  int4* cut;                   // [workers] query row, KV head, workers that follow; -1: none
  int64_t query_stride_t, query_stride_h, out_stride_t, out_stride_h;
  int32_t num_requests;  // R
  int32_t num_heads;     // H
  int32_t group;         // G
  int32_t layer;
  int32_t most_tokens;  // rows with more query tokens are left to the prefill kernel
  int32_t least_units;  // smallest stretch, so that short batches are not cut too fine
  int32_t head_size, element_size;
  float scale_log2;  // scale * log2(e): softmax in base 2
  bool aligned;      // pairs of query elements may be loaded at once
};

// Query tokens of a row that decode serves.
__device__ __forceinline__ int decode_tokens(const DecodeParams& p, int r) {
  const int tokens = p.query_start[r + 1] - p.query_start[r];
  return tokens <= p.most_tokens && p.rows.seq_lens[r] > 0 ? max(tokens, 0) : 0;
}

// The heads of a request in the layer at hand, looked up one by one.
struct RequestHeads {
  HeadPages head;         // what counting keys needs of it
  const int32_t* packed;  // [H], null if the request is not packed
  int seq_len;

  __device__ __forceinline__ int units(int h) {
    if (packed != nullptr) head.packed = packed[h];
    return ceil_div(max(head.num_keys(seq_len), 0), kUnit);
  }
};

__device__ __forceinline__ RequestHeads request_heads(const DecodeParams& p, int r, int slot) {
  RequestHeads heads{};
  heads.head.block_size = p.rows.block_size;
  heads.seq_len = p.rows.seq_lens[r];
  if (slot >= 0) {
    heads.head.covered = p.rows.covered[slot];
    heads.packed =
        p.rows.num_pages + static_cast<int64_t>(slot) * p.rows.slots + p.layer * p.num_heads;
  }
  return heads;
}

// Units of all requests, as an exclusive prefix sum in `sums` [R]; returns the total.
template <int kThreads>
__device__ __forceinline__ int sum_units(const DecodeParams& p, int* sums, int* warps) {
  // Several requests per thread at a time, so that their loads overlap: with keys and values
  // passing through the L2 cache, each of the dependent loads takes about a microsecond.
  constexpr int kTogether = 6;
  for (int start = threadIdx.x; start < p.num_requests; start += kTogether * kThreads) {
    RequestHeads heads[kTogether];
    int tokens[kTogether], units[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int r = min(start + i * kThreads, p.num_requests - 1);
      const int slot = p.rows.state_slot[r];
      tokens[i] = decode_tokens(p, r);
      heads[i] = request_heads(p, r, tokens[i] > 0 ? slot : -1);
      units[i] = 0;
    }
#pragma unroll 8
    for (int h = 0; h < p.num_heads; ++h) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) units[i] += heads[i].units(h);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int r = start + i * kThreads;
      if (r < p.num_requests) sums[r] = units[i] * tokens[i];
    }
  }
  __syncthreads();
  const int per_thread = ceil_div(p.num_requests, kThreads);
  const int begin = min(threadIdx.x * per_thread, p.num_requests);
  const int end = min(begin + per_thread, p.num_requests);
  int mine = 0, total;
  for (int r = begin; r < end; ++r) mine += sums[r];
  int before = block_exclusive_sum<kThreads>(mine, warps, &total);
  for (int r = begin; r < end; ++r) {
    const int units = sums[r];
    sums[r] = before;
    before += units;
  }
  __syncthreads();
  return total;
}

// The request that holds unit `at`: the last with sums[r] <= at (requests without units share
// their successor's sum, so it has units).
__device__ __forceinline__ int find_request(const int* sums, int num_requests, int at) {
  int low = 0, high = num_requests;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (sums[middle] <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace kvc::gpu
