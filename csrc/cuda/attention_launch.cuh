// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "attention.h"
#include "decode.cuh"

namespace kvc::gpu {

// A grid of the decode kernel that runs at once on this device.
struct DecodeGrid {
  int blocks, warps, shared;
};

// Asked once per number of columns: the answer is the same for every call, and the grid of a
// captured graph must be.
template <typename T, int kHeadSize, int kTiles, int kFormat>
DecodeGrid decode_grid(const Launch& launch, int columns, int query_bytes) {
  using Shape = DecodeShape<T, kHeadSize, kTiles, kFormat>;
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices][8 * kTiles + 1];
  KVC_CHECK(launch.device() < kMostDevices, "more than ", kMostDevices, " devices");
  const int per_warp = Shape::kStages * (Shape::kStage + query_bytes + Shape::kScales);
  // 1 KB for what is not dynamic.
  const int room = launch.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024;
  const int warps = std::min(room / per_warp, Shape::kMostWarps);
  KVC_CHECK(warps > 0, "this head size does not fit the shared memory of this device");
  std::atomic<int>& blocks = known[launch.device()][columns];
  if (blocks == 0) {
    const auto kernel = decode_kernel<T, kHeadSize, kTiles, kFormat>;
    launch.reserve_shared(kernel, room);
    int per_processor = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel,
                                                                 warps * kWarp, warps * per_warp));
    KVC_CHECK(per_processor > 0, "the decode kernel does not fit this device");
    blocks = per_processor * launch.attribute(cudaDevAttrMultiProcessorCount);
  }
  return {blocks, warps, warps * per_warp};
}

// Where the results of `count` workers or blocks lie in scratch memory; returns its end.
inline float* place_partials(float* scratch, int64_t count, int columns, int head_size,
                             Partials* partials) {
  partials->out = scratch;
  partials->stats = reinterpret_cast<float2*>(scratch + count * 2 * columns * head_size);
  return scratch + count * 2 * columns * (head_size + 2);
}

template <typename T, int kHeadSize, int kTiles, int kFormat>
void launch_decode_shape(const Launch& launch, const Tensor& like, DecodeParams p) {
  constexpr int kCombineThreads = 256;
  p.query_bytes = sizeof(T) == 2 && kTiles <= 2 ? p.columns * kHeadSize * 2 : 0;
  const auto [blocks, warps, shared] =
      decode_grid<T, kHeadSize, kTiles, kFormat>(launch, p.columns, p.query_bytes);
  const int64_t workers = static_cast<int64_t>(blocks) * warps;
  KVC_CHECK(p.num_requests * sizeof(int) <= static_cast<size_t>(shared),
            "too many requests in a batch: ", p.num_requests);
  const Tensor scratch = torch::stable::new_empty(
      like, {blocks * 4 + (workers + blocks) * 2 * p.columns * (2 + kHeadSize)}, ScalarType::Float);
  p.cut = static_cast<int4*>(scratch.mutable_data_ptr());
  float* place = reinterpret_cast<float*>(p.cut + blocks);  // 16-byte aligned, as cut is
  place = place_partials(place, workers, p.columns, kHeadSize, &p.of_workers);
  place_partials(place, blocks, p.columns, kHeadSize, &p.of_blocks);
  launch.chained(decode_kernel<T, kHeadSize, kTiles, kFormat>, blocks, warps * kWarp, shared, p);
  launch.chained(combine_kernel<T, kHeadSize, kCombineThreads>, blocks, kCombineThreads, 0, p);
}

// Tiles of eight columns that the registers of a warp have room for: of larger heads, and where
// codes are read, fewer.
template <typename T, int kHeadSize, int kFormat>
constexpr int decode_tiles() {
  return sizeof(T) == 2 && kFormat == kAuto && kHeadSize <= 128 ? 3 : 2;
}

// `p.width`: query tokens of a row that a pass is to serve, if it can.
template <typename T, int kFormat>
void launch_decode(const Launch& launch, const Tensor& like, DecodeParams p, int64_t head_size) {
  dispatch_head_size(head_size, [&](auto size) {
    constexpr int kHeadSize = decltype(size)::value;
    // Refused before: the others have no codes.
    if constexpr (kHeadSize % head_size_multiple(kFormat) == 0) {
      constexpr int kMostTiles = decode_tiles<T, kHeadSize, kFormat>();
      // As few passes as there can be, with as many tokens each as the others.
      const int tokens = sizeof(T) == 2 ? p.width : 1;
      const int most = std::max(1, 8 * kMostTiles / p.group);
      const int passes = (tokens + most - 1) / most;
      p.width = (tokens + passes - 1) / passes;
      p.columns = p.width * p.group;
      p.of_columns = p.width > 1 ? (1024 + p.group - 1) / p.group : 0;
      if (p.columns <= 8) {
        launch_decode_shape<T, kHeadSize, 1, kFormat>(launch, like, p);
      } else if (p.columns <= 16) {
        launch_decode_shape<T, kHeadSize, 2, kFormat>(launch, like, p);
      } else if constexpr (kMostTiles > 2) {
        launch_decode_shape<T, kHeadSize, 3, kFormat>(launch, like, p);
      }
    }
  });
}

template <typename T, int kFormat>
void launch_prefill(const Launch& launch, const PrefillParams& p, int64_t head_size,
                    int64_t tokens) {
  dispatch_head_size(head_size, [&](auto size) {
    constexpr int kHeadSize = decltype(size)::value;
    if constexpr (kHeadSize % head_size_multiple(kFormat) == 0) {  // others are refused before
      const auto run = [&](auto count) {
        constexpr int kTiles = decltype(count)::value;
        using Shape = PrefillShape<T, kHeadSize, kTiles>;
        const auto kernel = prefill_kernel<T, kHeadSize, kFormat, kTiles>;
        launch.reserve_shared(kernel, Shape::kShared);
        const int64_t tiles = tokens / (Shape::kRows / p.group) + p.num_requests;
        const dim3 grid(static_cast<unsigned>(tiles), p.num_heads);
        kernel<<<grid, Shape::kThreads, Shape::kShared, launch.stream()>>>(p);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      using Largest = PrefillShape<T, kHeadSize, PrefillShape<T, kHeadSize, 1>::kMostTiles>;
      // Blocks of more rows are fewer: only where each processor still gets two.
      const int64_t blocks = tokens / (Largest::kRows / p.group) * p.num_heads;
      if (blocks >= 2 * launch.attribute(cudaDevAttrMultiProcessorCount)) {
        run(std::integral_constant<int, Largest::kMostTiles>{});
      } else {
        run(std::integral_constant<int, 1>{});
      }
    }
  });
}

}  // namespace kvc::gpu
