// SPDX-License-Identifier: Apache-2.0
// Attention of single query tokens, or of the few of a request that speculates, over paged keys.
// Reads every key of a head once for all its G query heads, and for several tokens. A warp streams
// its stretch of units (decode_work.cuh) through a ring of its own in shared memory; warps never
// wait for each other before all of them are done.
#pragma once

#include "decode_codes.cuh"
#include "decode_partial.cuh"
#include "decode_work.cuh"

namespace kvc::gpu {

// Warps of a block that have registers enough: two to a quarter of the processor may have 255 each,
// three 168, four 128.
constexpr int decode_warps(int head_size, int tiles, int format) {
  if (format == kAuto) return tiles > 2 ? 8 : 16;
  if (head_size * tiles <= 64) return 16;
  if (format == kInt4 && int4_keys_together(head_size, tiles) > 32) return 8;
  return head_size * tiles <= 128 ? 12 : 8;
}

template <typename T, int kHeadSize, int kTiles, int kFormat>
struct DecodeShape {
  static constexpr int kPair = 2 * kHeadSize * sizeof(T);
  static constexpr int kStage = kUnit * (kPair + 16);  // and the query, see DecodeParams
  static constexpr int kScales = decode_scale_bytes(kFormat, kHeadSize);  // behind that
  // Codes keep a warp busy for longer than their loads take: more warps instead of more stages.
  static constexpr int kStages = kFormat == kAuto ? 3 : 2;
  // As many warps as a block may have: what fits into the 227 KB of sm_90. The launcher takes fewer
  // where there is less.
  static constexpr int kFit = (227 << 10) / (kStages * (kStage + kScales));
  static constexpr int kLimit = decode_warps(kHeadSize, kTiles, kFormat);
  static constexpr int kMostWarps = kFit < kLimit ? kFit : kLimit;
};

template <typename T, int kHeadSize, int kTiles, int kFormat>
__global__ void __launch_bounds__(DecodeShape<T, kHeadSize, kTiles, kFormat>::kMostWarps* kWarp)
    decode_kernel(DecodeParams p) {
  using Shape = DecodeShape<T, kHeadSize, kTiles, kFormat>;
  using Math = typename DecodeMath<T, kHeadSize, kTiles, kFormat>::Type;
  constexpr int kStages = Shape::kStages;
  extern __shared__ __align__(16) char shared[];
  __shared__ StretchEnds ends[Shape::kMostWarps];
  __shared__ int sum_of_warp[Shape::kMostWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t worker = static_cast<int64_t>(blockIdx.x) * warps + warp;
  wait_for_kernel_before();
  // combine_kernel may take its place now; it waits there until this grid is done.
  let_next_kernel_start();

  // Every block sums up the lengths for itself: cheaper than a launch that does it for all.
  int* sums = reinterpret_cast<int*>(shared);
  const int total = sum_units(p, sums, sum_of_warp);
  const int share = max(p.least_units, ceil_div(total, static_cast<int>(gridDim.x) * warps));
  const int begin = min(worker * share, static_cast<int64_t>(total));
  const int units = min(share, total - begin);
  const int request = units > 0 ? find_request(sums, p.num_requests, begin) : 0;
  const int skip = units > 0 ? begin - sums[request] : 0;
  __syncthreads();  // the ring overwrites the sums

  WorkCursor cursor;
  int flags = 0;
  if (threadIdx.x == 0) p.cut[blockIdx.x] = make_int4(-1, 0, 0, 0);
  if (units > 0) {
    cursor.seek(p, request, skip, units);
    const int stage_bytes = Shape::kStage + p.query_bytes + Shape::kScales;
    const uint32_t ring = shared_address(shared) + warp * kStages * stage_bytes;
    Math math;
    int loading = 0, reading = 0;
    bool in_codes = false;
    // The first steps only load. One loop for both keeps the loading code, which is long, in one
    // copy.
#pragma unroll 1
    for (int unit = 1 - kStages; unit < units; ++unit) {
      __syncwarp();  // all lanes have left the unit before, whose place is taken
      if (!cursor.done()) {
        cursor.load<kHeadSize, Math::kStride, T, kFormat>(p, ring + loading * stage_bytes,
                                                          Shape::kStage);
      }
      copy_async_commit();
      loading = loading + 1 == kStages ? 0 : loading + 1;
      if (unit < 0) continue;
      copy_async_wait<kStages - 1>();
      __syncwarp();  // the unit is there for all lanes

      const uint32_t stage = ring + reading * stage_bytes;
      reading = reading + 1 == kStages ? 0 : reading + 1;
      StepTask task;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                   : "=r"(task.query_row), "=r"(task.head), "=r"(task.visible), "=r"(task.flags)
                   : "r"(stage + static_cast<uint32_t>(Shape::kPair))
                   : "memory");
      if (task.flags & kFirst) {
        math.start(p, stage + Shape::kStage, query_rows<T>(p, task.query_row, task.head),
                   task.tokens() * p.group);
      }
      if constexpr (kFormat == kAuto) {
        math.step(p, stage, task.visible);
      } else {
        const bool codes = task.flags & kCodes;
        if (codes && (task.flags & kFirst)) {
          math.enter_codes(stage + Shape::kStage + p.query_bytes, p.logits.factor);
        }
        if (in_codes && !codes && !(task.flags & kFirst)) math.leave_codes();
        in_codes = codes;
        if (codes) {
          math.step_codes(stage, p.logits.cap);
        } else {
          math.step(p, stage, task.visible);
        }
        if (codes && (task.flags & kLast)) math.leave_codes();
      }
      if (!(task.flags & kLast)) continue;
      if (task.flags & kWhole) {
        math.finish(p, true, task.tokens() * p.group, p.logits.of_head(task.head, p.group),
                    [&](int c, int d, float x) {
                      out_row<T>(p, task.query_row, task.head, c)[d] = from_float<T>(x);
                    });
      } else {
        const bool begins = task.flags & kBeginsHead;
        flags |= begins ? kHasLast : kHasFirst;
        const int64_t row = (worker * 2 + begins) * p.columns;
        math.finish(p, false, p.columns, nullptr, [&](int c, int d, float x) {
          p.of_workers.out[(row + c) * kHeadSize + d] = x;
        });
        math.statistics(p.columns, [&](int c, float max, float sum) {
          p.of_workers.stats[row + c] = make_float2(max, sum);
        });
      }
    }
  }
  if (lane == 0) {
    StretchEnds end{0, 0, 0, 0, 0};
    if (units > 0) {
      end = {cursor.query_row(), cursor.head(), flags, cursor.units_behind(), cursor.tokens(p)};
      if (end.behind > 0 && !(flags & kHasLast)) end.flags |= kFirstGoesOn;
    }
    ends[warp] = end;
  }
  __syncthreads();
  if (flags & kHasLast) merge_chain<T, kHeadSize>(p, ends, 1, share * warps);
  if (warp == 0 && (flags & kHasFirst)) merge_chain<T, kHeadSize>(p, ends, 0, share * warps);
  fill_keyless<T>(p, worker, static_cast<int64_t>(gridDim.x) * warps, kHeadSize);
}

}  // namespace kvc::gpu
