// SPDX-License-Identifier: Apache-2.0
// Attention of single query tokens over paged keys. Reads every key of a head once for all its G
// query heads. A warp streams its stretch of units (decode_work.cuh) through a ring of its own in
// shared memory; warps never wait for each other.
#pragma once

#include "decode_math.cuh"
#include "decode_work.cuh"

namespace kvc::gpu {

__device__ __forceinline__ float4 scaled(float4 a, float b) {
  return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}

// Shapes chosen so that a block fits in 99 KB, the limit of sm_86 and sm_89, and two fit on sm_90.
template <typename T, int kHeadSize>
struct DecodeShape {
  static constexpr int kStage = kUnit * (2 * kHeadSize * sizeof(T) + 16);
  static constexpr int kWarps = kStage > 20 << 10   ? 1
                                : kStage > 10 << 10 ? 2
                                : kStage > 6 << 10  ? 6
                                                    : 4;
  static constexpr int kStages = kStage > 10 << 10 ? 3 : kStage > 6 << 10 ? 2 : 5;
  static constexpr int kShared = kWarps * kStages * kStage;
  static_assert(kShared <= 99 << 10);
};

template <typename T, int kHeadSize, int kTiles>
__global__ void __launch_bounds__(DecodeShape<T, kHeadSize>::kWarps* kWarp)
    decode_kernel(DecodeParams p) {
  using Shape = DecodeShape<T, kHeadSize>;
  using Math = typename DecodeMath<T, kHeadSize, kTiles>::Type;
  constexpr int kStages = Shape::kStages;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Workers go round the blocks, so that a short batch uses every multiprocessor.
  const int worker = warp * gridDim.x + blockIdx.x, workers = gridDim.x * Shape::kWarps;

  // Every block sums up the lengths for itself: cheaper than a launch that does it for all.
  int* sums = reinterpret_cast<int*>(shared);
  const int total = sum_units<Shape::kWarps * kWarp>(p, sums + kWarp, sums);
  const int share = max(p.least_units, ceil_div(total, workers));
  const int begin = min(static_cast<int64_t>(worker) * share, static_cast<int64_t>(total));
  const int units = min(share, total - begin);
  const int request = units > 0 ? find_request(sums + kWarp, p.num_requests, begin) : 0;
  const int skip = units > 0 ? begin - sums[kWarp + request] : 0;
  __syncthreads();  // the ring overwrites the sums
#if __CUDA_ARCH__ >= 900
  // combine_kernel may take its place now; it waits there until this grid is done.
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
  if (units == 0) {
    if (lane == 0) p.cut[worker] = make_int4(-1, 0, 0, 0);
    return;
  }

  WorkCursor cursor;
  cursor.seek(p, request, skip, units);
  const uint32_t ring = shared_address(shared) + warp * kStages * Shape::kStage;
  Math math;
  int loading = 0, reading = 0;
  // The first steps only load. One loop for both keeps the loading code, which is long, in one
  // copy.
#pragma unroll 1
  for (int unit = 1 - kStages; unit < units; ++unit) {
    copy_async_wait<kStages - 2>();
    __syncwarp();  // the unit is there for all lanes, and all have left the one before it
    if (!cursor.done()) {
      cursor.load<kHeadSize, Math::kStride, T>(p, ring + loading * Shape::kStage);
    }
    copy_async_commit();
    loading = loading + 1 == kStages ? 0 : loading + 1;
    if (unit < 0) continue;

    const uint32_t stage = ring + reading * Shape::kStage;
    reading = reading + 1 == kStages ? 0 : reading + 1;
    StepTask task;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(task.query_row), "=r"(task.head), "=r"(task.visible), "=r"(task.flags)
                 : "r"(stage + static_cast<uint32_t>(2 * kHeadSize * sizeof(T)))
                 : "memory");
    const int64_t first_head = static_cast<int64_t>(task.head) * p.group;
    if (task.flags & kFirst) {
      math.start(static_cast<const T*>(p.query) + task.query_row * p.query_stride_t +
                     first_head * p.query_stride_h,
                 p.query_stride_h, p.group, p.aligned);
    }
    math.step(stage, task.visible, p.scale_log2);
    if (!(task.flags & kLast)) continue;
    if (task.flags & kWhole) {
      T* out =
          static_cast<T*>(p.out) + task.query_row * p.out_stride_t + first_head * p.out_stride_h;
      math.finish(true, p.group,
                  [&](int g, int d, float x) { out[g * p.out_stride_h + d] = from_float<T>(x); });
    } else {
      const int64_t row =
          (static_cast<int64_t>(worker) * 2 + (task.flags & kBeginsHead ? 1 : 0)) * p.group;
      math.finish(false, p.group,
                  [&](int g, int d, float x) { p.partial_out[(row + g) * kHeadSize + d] = x; });
      math.statistics(p.group, [&](int g, float max, float sum) {
        p.partial_stats[row + g] = make_float2(max, sum);
      });
    }
  }
  if (lane == 0) {
    const int behind = cursor.units_behind();
    p.cut[worker] = behind > 0
                        ? make_int4(cursor.query_row(), cursor.head(), ceil_div(behind, share), 0)
                        : make_int4(-1, 0, 0, 0);
  }
}

// One block per worker: if a head's first stretch ends that worker's share, adds up its stretches.
// Warps split the query heads, then the stretches.
template <typename T, int kHeadSize, int kThreads>
__global__ void __launch_bounds__(kThreads) combine_kernel(DecodeParams p) {
  constexpr int kWarps = kThreads / kWarp, kVectors = ceil_div(kHeadSize, 4 * kWarp);
  constexpr int kTogether = 8;  // stretches in flight per warp
  __shared__ float4 outs[kWarps][kHeadSize / 4];
  __shared__ float2 stats[kWarps];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
  const int worker = blockIdx.x, group = p.group;
  const int4 cut = p.cut[worker];
  if (cut.x < 0) return;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int together = min(group, kWarps);  // query heads at a time
  const int parts = kWarps / together;      // warps per query head
  const int part = warp / together, stretches = cut.z + 1;
  for (int first = 0; first < group; first += together) {
    const int g = first + warp % together;
    const int mine = g < group && part < parts ? ceil_div(stretches - part, parts) : 0;
    // The first stretch is the one that begins the head; the others came first to their workers.
    const auto row = [&](int i) {
      return (static_cast<int64_t>(worker + i) * 2 + (i == 0)) * group + g;
    };
    float max = -kInfinity, sum = 0.f;
    float4 out[kVectors] = {};
    for (int begin = 0; begin < mine; begin += kWarp) {
      const int count = min(mine - begin, kWarp);
      float2 stat = make_float2(-kInfinity, 0.f);
      if (lane < count) stat = p.partial_stats[row((begin + lane) * parts + part)];
      const float top = fmaxf(max, lanes_max(stat.x));
      const float weight = rescale(stat.x, top), old = rescale(max, top);
      max = top;
      sum = sum * old + lanes_sum(stat.y * weight);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) out[v] = scaled(out[v], old);
      for (int i = 0; i < count; i += kTogether) {
        float4 x[kTogether][kVectors];  // all loads before the first use
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const float4* from = reinterpret_cast<const float4*>(
              p.partial_out + row((begin + min(i + k, count - 1)) * parts + part) * kHeadSize);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int d = min(v * kWarp + lane, kHeadSize / 4 - 1);
            x[k][v] = __ldcg(from + d);
          }
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const float w = __shfl_sync(kAllLanes, weight, min(i + k, kWarp - 1));
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            out[v].x += i + k < count ? w * x[k][v].x : 0.f;
            out[v].y += i + k < count ? w * x[k][v].y : 0.f;
            out[v].z += i + k < count ? w * x[k][v].z : 0.f;
            out[v].w += i + k < count ? w * x[k][v].w : 0.f;
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if ((v * kWarp + lane) * 4 < kHeadSize) outs[warp][v * kWarp + lane] = out[v];
    }
    if (lane == 0) stats[warp] = make_float2(max, sum);
    __syncthreads();
    for (int i = threadIdx.x; i < together * kHeadSize; i += kThreads) {
      const int h = i / kHeadSize, d = i % kHeadSize;
      if (first + h >= group) continue;
      float top = -kInfinity, weight = 0.f, x = 0.f;
      for (int j = 0; j < parts; ++j) top = fmaxf(top, stats[j * together + h].x);
      for (int j = 0; j < parts; ++j) {
        const int other = j * together + h;
        const float scale = rescale(stats[other].x, top);
        weight += stats[other].y * scale;
        x += reinterpret_cast<const float*>(outs[other])[d] * scale;
      }
      T* out_row = static_cast<T*>(p.out) + cut.x * p.out_stride_t +
                   (static_cast<int64_t>(cut.y) * group + first + h) * p.out_stride_h;
      out_row[d] = from_float<T>(x / weight);
    }
    __syncthreads();
  }
}

}  // namespace kvc::gpu
