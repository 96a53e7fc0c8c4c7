// SPDX-License-Identifier: Apache-2.0
// Heads that are cut by the border of a worker's share leave partial sums. A block adds up those
// that meet within it; combine_kernel those that span blocks.
#pragma once

#include "decode_work.cuh"

namespace kvc::gpu {

// Up to four columns of a pass: weighted values and weights relative to a running maximum
// (base 2), held by one warp.
template <int kHeadSize>
class PartialSum {
 public:
  static constexpr int kHeads = 4, kVectors = ceil_div(kHeadSize, 4 * kWarp);

  // Adds the first `count` columns in `rows`.
  __device__ __forceinline__ void add(const Partials& rows, int64_t row, int count) {
    float2 stat[kHeads];
    float4 x[kHeads][kVectors];  // all loads before the first use
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const int64_t at = row + min(g, count - 1);
      stat[g] = __ldcg(rows.stats + at);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        x[g][v] = __ldcg(reinterpret_cast<const float4*>(rows.out + at * kHeadSize) +
                         min(v * kWarp + lane(), kHeadSize / 4 - 1));
      }
    }
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      const float top = fmaxf(max_[g], stat[g].x);
      const float old = rescale(max_[g], top), fresh = rescale(stat[g].x, top);
      max_[g] = top;
      sum_[g] = sum_[g] * old + stat[g].y * fresh;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        out_[g][v].x = out_[g][v].x * old + x[g][v].x * fresh;
        out_[g][v].y = out_[g][v].y * old + x[g][v].y * fresh;
        out_[g][v].z = out_[g][v].z * old + x[g][v].z * fresh;
        out_[g][v].w = out_[g][v].w * old + x[g][v].w * fresh;
      }
    }
  }

  // Calls f(i, d, x) with four values of column i from head dimension d on.
  template <typename F>
  __device__ __forceinline__ void values(int count, F&& f) const {
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int d = (v * kWarp + lane()) * 4;
        if (g < count && d < kHeadSize) f(g, d, out_[g][v]);
      }
    }
  }
  __device__ __forceinline__ float2 stats(int g) const { return make_float2(max_[g], sum_[g]); }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }

  float max_[kHeads] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity}, sum_[kHeads] = {};
  float4 out_[kHeads][kVectors] = {};
};

// How a worker's stretch of the line ends; by warp, in shared memory.
struct StretchEnds {
  int query_row, head;  // of the last pass
  int flags;
  int behind;  // units of the last pass behind the stretch
  int tokens;  // of the last pass
};
// The stretch begins within a head; that head goes on behind it; its last head begins in it and
// goes on behind it.
enum EndFlags { kHasFirst = 1, kFirstGoesOn = 2, kHasLast = 4 };

template <typename T>
__device__ __forceinline__ T* out_row(const DecodeParams& p, int query_row, int head, int c) {
  return static_cast<T*>(p.out) + query_row * p.out_stride_t +
         static_cast<int64_t>(head) * p.group * p.out_stride_h +
         column_offset(p, c, p.out_stride_t, p.out_stride_h);
}

template <typename T>
__device__ __forceinline__ void store_four(T* target, float4 x, float factor) {
  target[0] = from_float<T>(x.x * factor);
  target[1] = from_float<T>(x.y * factor);
  target[2] = from_float<T>(x.z * factor);
  target[3] = from_float<T>(x.w * factor);
}

// Adds up the chain of partial sums that begins with this warp's last head (kind 1), or, for warp
// 0, with the head that the block before left (kind 0). Chains that stay within the block become
// output, others a partial sum of the block.
template <typename T, int kHeadSize>
__device__ __forceinline__ void merge_chain(const DecodeParams& p, const StretchEnds* ends,
                                            int kind, int block_units) {
  using Sum = PartialSum<kHeadSize>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t worker = static_cast<int64_t>(blockIdx.x) * warps + warp;
  bool goes_on = kind == 1 || (ends[warp].flags & kFirstGoesOn);
  int end = warp + 1;
  for (; goes_on && end < warps && (ends[end].flags & kHasFirst); ++end) {
    goes_on = ends[end].flags & kFirstGoesOn;
  }
  const StretchEnds last = ends[warp];
  if (kind == 1 && goes_on && lane == 0) {
    p.cut[blockIdx.x] = make_int4(last.query_row, last.head,
                                  ceil_div(ends[end - 1].behind, block_units), last.tokens);
  }
  for (int first = 0; first < p.columns; first += Sum::kHeads) {
    const int count = min(p.columns - first, Sum::kHeads);
    Sum sum;
    sum.add(p.of_workers, (worker * 2 + kind) * p.columns + first, count);
#pragma unroll 2
    for (int i = warp + 1; i < end; ++i) {
      sum.add(p.of_workers, (worker + i - warp) * 2 * p.columns + first, count);
    }
    if (kind == 1 && !goes_on) {
      const float* sinks = p.logits.of_head(last.head, p.group);
      // The last pass of a row may have fewer tokens than others.
      sum.values(min(count, last.tokens * p.group - first), [&](int i, int d, float4 x) {
        const float2 stat = sum.stats(i);
        store_four(out_row<T>(p, last.query_row, last.head, first + i) + d, x,
                   1.f / (stat.y + sink_weight(sinks, column_head(p, first + i), stat.x)));
      });
      continue;
    }
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * 2 + kind) * p.columns + first;
    sum.values(count, [&](int g, int d, float4 x) {
      *reinterpret_cast<float4*>(p.of_blocks.out + (row + g) * kHeadSize + d) = x;
    });
#pragma unroll
    for (int g = 0; g < Sum::kHeads; ++g) {
      if (lane == 0 && g < count) p.of_blocks.stats[row + g] = sum.stats(g);
    }
  }
}

// One block per block of the decode kernel: if that one left a head unfinished, adds up what it
// and its followers have of it. The warps split the followers.
template <typename T, int kHeadSize, int kThreads>
__global__ void __launch_bounds__(kThreads) combine_kernel(DecodeParams p) {
  using Sum = PartialSum<kHeadSize>;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ float4 outs[kWarps][Sum::kHeads][kHeadSize / 4];
  __shared__ float2 stats[kWarps][Sum::kHeads];
  let_next_kernel_start();
  wait_for_kernel_before();
  const int4 cut = p.cut[blockIdx.x];
  if (cut.x < 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float* sinks = p.logits.of_head(cut.y, p.group);
  for (int first = 0; first < cut.w * p.group; first += Sum::kHeads) {
    const int count = min(cut.w * p.group - first, Sum::kHeads);
    Sum sum;
#pragma unroll 2
    for (int i = warp; i <= cut.z; i += kWarps) {
      // The first stretch is the one that begins the head; the others came first to their blocks.
      sum.add(p.of_blocks,
              ((static_cast<int64_t>(blockIdx.x) + i) * 2 + (i == 0)) * p.columns + first, count);
    }
    sum.values(count, [&](int g, int d, float4 x) { outs[warp][g][d / 4] = x; });
#pragma unroll
    for (int g = 0; g < Sum::kHeads; ++g) {
      if (lane == 0) stats[warp][g] = sum.stats(g);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * kHeadSize; i += kThreads) {
      const int g = i / kHeadSize, d = i % kHeadSize;
      float top = -kInfinity, weight = 0.f, x = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, stats[w][g].x);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float scale = rescale(stats[w][g].x, top);
        weight += stats[w][g].y * scale;
        x += reinterpret_cast<const float*>(outs[w][g])[d] * scale;
      }
      weight += sink_weight(sinks, column_head(p, first + g), top);
      out_row<T>(p, cut.x, cut.y, first + g)[d] = from_float<T>(x / weight);
    }
    __syncthreads();
  }
}

}  // namespace kvc::gpu
