// SPDX-License-Identifier: Apache-2.0
// How decode work is shared. All keys of all (request, pass, KV head) form one line of 16-key
// units; every warp of the grid takes an equal stretch of it, whatever the lengths of the heads
// are. A pass is what reads the keys of a head once: for one query token, or for several at once of
// a request that speculates. Its columns are (token, query head) pairs. What is left of heads that
// are cut by a border: decode_partial.cuh.
#pragma once

#include "../paged_layout.h"
#include "gpu.cuh"

namespace kvc::gpu {

constexpr int kUnit = 16;  // keys, or in packed pages what has their bytes

// Unnormalized results of stretches of a head, two rows of columns per worker or block: of the head
// that it found begun, and of the one that it began and left unfinished.
struct Partials {
  float* out;     // [workers, 2, columns, D]
  float2* stats;  // [workers, 2, columns] maximum (base 2) and sum
};

struct DecodeParams {
  PagedRows rows;
  const void* query;           // [>= T, H * G, D]
  const void* pages;           // [P, B, 2 * D]
  void* out;                   // like query
  const int32_t* query_start;  // [R + 1]
  Partials of_workers;         // by warp
  Partials of_blocks;          // by block
  int4* cut;                   // [blocks] query row (-1: none), KV head, blocks that follow, tokens
  int64_t query_stride_t, query_stride_h, out_stride_t, out_stride_h;
  int32_t num_requests;  // R
  int32_t num_heads;     // H
  int32_t group;         // G
  int32_t layer;
  int32_t most_tokens;  // rows with more query tokens are left to the prefill kernel
  int32_t width;        // query tokens of a pass, at most
  int32_t columns;      // width * G
  int32_t of_columns;   // column * of_columns >> 10 is its token; 0 with a width of 1
  int32_t least_units;  // smallest stretch, so that short batches are not cut too fine
  int32_t query_bytes;  // of the columns in a stage, 0 if they are not staged
  Logits logits;
  bool aligned;        // query rows may be copied 16 bytes at once
  bool aligned_pages;  // num_pages may be loaded four heads at once
};

// Query tokens of a row that decode serves.
__device__ __forceinline__ int decode_tokens(const DecodeParams& p, int r) {
  const int tokens = p.query_start[r + 1] - p.query_start[r];
  return tokens <= p.most_tokens && p.rows.seq_lens[r] > 0 ? max(tokens, 0) : 0;
}

// 16-key units of all heads of request r in the layer at hand.
__device__ __forceinline__ int request_units(const DecodeParams& p, int r, int slot) {
  const int seq_len = p.rows.seq_lens[r];
  HeadPages head{};
  head.block_size = p.rows.block_size;
  head.page_blocks = 1;  // in rows of a page, see decode_work.cuh
  const auto units = [&](int packed) {
    head.packed = packed;
    return ceil_div(max(head.num_keys(seq_len), 0), kUnit);
  };
  if (slot < 0) return p.num_heads * units(0);
  head.covered = p.rows.covered[slot];
  const int32_t* packed =
      p.rows.num_pages + static_cast<int64_t>(slot) * p.rows.slots + p.layer * p.num_heads;
  int sum = 0;
  if (p.aligned_pages) {
#pragma unroll 2
    for (int h = 0; h < p.num_heads; h += 4) {
      const int4 four = *reinterpret_cast<const int4*>(packed + h);
      sum += units(four.x) + units(four.y) + units(four.z) + units(four.w);
    }
  } else {
#pragma unroll 4
    for (int h = 0; h < p.num_heads; ++h) sum += units(packed[h]);
  }
  return sum;
}

// Units of all requests, as an exclusive prefix sum in `sums` [R]; returns the total. `warps` holds
// an int per warp.
__device__ __forceinline__ int sum_units(const DecodeParams& p, int* sums, int* warps) {
  // Several requests per thread at a time, so that their loads overlap: each of the dependent
  // loads takes up to a microsecond.
  constexpr int kTogether = 4;
  const int threads = blockDim.x;
  for (int start = threadIdx.x; start < p.num_requests; start += kTogether * threads) {
    int tokens[kTogether], slot[kTogether], units[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int r = min(start + i * threads, p.num_requests - 1);
      tokens[i] = decode_tokens(p, r);
      slot[i] = p.rows.state_slot[r];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int r = start + i * threads;
      units[i] = r < p.num_requests && tokens[i] > 0 ? request_units(p, r, slot[i]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int r = start + i * threads;
      if (r < p.num_requests) sums[r] = units[i] * ceil_div(tokens[i], p.width);
    }
  }
  __syncthreads();
  const int per_thread = ceil_div(p.num_requests, threads);
  const int begin = min(threadIdx.x * per_thread, p.num_requests);
  const int end = min(begin + per_thread, p.num_requests);
  int mine = 0, total;
  for (int r = begin; r < end; ++r) mine += sums[r];
  int before = block_exclusive_sum(mine, threads / kWarp, warps, &total);
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
