// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "attention.h"
#include "decode.cuh"

namespace kvc::gpu {

// Blocks of the decode kernel that run at once on this device. Asked once: the answer is the same
// for every call, and the grid of a captured graph must be.
template <typename T, int kHeadSize, int kTiles>
int decode_blocks(const Launch& launch) {
  using Shape = DecodeShape<T, kHeadSize>;
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];
  KVC_CHECK(launch.device() < kMostDevices, "more than ", kMostDevices, " devices");
  std::atomic<int>& blocks = known[launch.device()];
  if (blocks == 0) {
    const auto kernel = decode_kernel<T, kHeadSize, kTiles>;
    launch.reserve_shared(kernel, Shape::kShared);
    int per_processor = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_processor, kernel, Shape::kWarps * kWarp, Shape::kShared));
    KVC_CHECK(per_processor > 0, "the decode kernel does not fit this device");
    blocks = per_processor * launch.attribute(cudaDevAttrMultiProcessorCount);
  }
  return blocks;
}

template <typename T, int kHeadSize, int kTiles>
void launch_decode_shape(const Launch& launch, const Tensor& like, DecodeParams p) {
  using Shape = DecodeShape<T, kHeadSize>;
  constexpr int kCombineThreads = 256;
  const int blocks = decode_blocks<T, kHeadSize, kTiles>(launch);
  const int64_t workers = static_cast<int64_t>(blocks) * Shape::kWarps;
  KVC_CHECK((p.num_requests + 1 + kWarp) * sizeof(int) <= Shape::kShared,
            "too many requests in a batch: ", p.num_requests);
  const Tensor scratch = torch::stable::new_empty(
      like, {workers * (4 + 2 * p.group * (2 + kHeadSize))}, ScalarType::Float);
  p.cut = static_cast<int4*>(scratch.mutable_data_ptr());
  p.partial_out = reinterpret_cast<float*>(p.cut + workers);  // 16-byte aligned, as cut is
  p.partial_stats = reinterpret_cast<float2*>(p.partial_out + workers * 2 * p.group * kHeadSize);
  decode_kernel<T, kHeadSize, kTiles>
      <<<blocks, Shape::kWarps * kWarp, Shape::kShared, launch.stream()>>>(p);

  cudaLaunchAttribute early{};  // combine_kernel waits by itself for the decode kernel
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(workers));
  config.blockDim = dim3(kCombineThreads);
  config.stream = launch.stream();
  config.attrs = &early;
  config.numAttrs = launch.attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, combine_kernel<T, kHeadSize, kCombineThreads>, p));
}

template <typename T>
void launch_decode(const Launch& launch, const Tensor& like, DecodeParams p, int64_t head_size) {
  dispatch_head_size(head_size, [&](auto size) {
    constexpr int kHeadSize = decltype(size)::value;
    if (p.group <= 8) {
      launch_decode_shape<T, kHeadSize, 1>(launch, like, p);
    } else {
      launch_decode_shape<T, kHeadSize, 2>(launch, like, p);
    }
  });
}

template <typename T>
void launch_prefill(const Launch& launch, const PrefillParams& p, int64_t head_size,
                    int64_t tokens) {
  dispatch_head_size(head_size, [&](auto size) {
    constexpr int kHeadSize = decltype(size)::value;
    using Shape = PrefillShape<T, kHeadSize>;
    const auto kernel = prefill_kernel<T, kHeadSize>;
    launch.reserve_shared(kernel, Shape::kShared);
    const dim3 grid(static_cast<unsigned>(tokens / (Shape::kRows / p.group) + p.num_requests),
                    p.num_heads);
    kernel<<<grid, Shape::kThreads, Shape::kShared, launch.stream()>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace kvc::gpu
