// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "echo.h"

namespace kvc::gpu {

template <typename T>
Tensor launch_echo(const Launch& launch, const Tensor& like, EchoParams* p, int64_t segments,
                   int64_t head_size) {
  Tensor partial;
  dispatch_head_size(head_size, [&](auto size) {
    constexpr int kHeadSize = decltype(size)::value;
    // fp32 has no tensor cores, and one kernel for all head sizes.
    constexpr bool kPlain = std::is_same_v<T, float>;
    constexpr int kRows = kPlain ? 8 : 64;
    const int64_t units = segments * p->num_heads;
    const int64_t tiles = ceil_div(p->max_segment * p->group, kRows);
    const auto blocks_on_device = [&](auto kernel, int threads, int shared) {
      int per_processor = 0;
      STD_CUDA_CHECK(
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared));
      return int64_t{per_processor} * launch.attribute(cudaDevAttrMultiProcessorCount);
    };
    const auto prepare = [&](int64_t slots) {
      KVC_CHECK(slots > 0, "the echo kernel does not fit this device");
      p->splits = echo_splits(units, slots, tiles);
      partial =
          torch::stable::new_empty(like, {units * p->splits * p->max_segment}, ScalarType::Float);
      p->partial = partial.mutable_data_ptr<float>();
      return dim3(static_cast<unsigned>(segments), p->num_heads, p->splits);
    };
    if constexpr (kPlain) {
      const int shared = 2 * kRows * kHeadSize * sizeof(float);
      const auto kernel = echo_plain_kernel<kRows>;
      launch.reserve_shared(kernel, shared);
      const dim3 grid = prepare(blocks_on_device(kernel, kEchoPlainThreads, shared));
      kernel<<<grid, kEchoPlainThreads, shared, launch.stream()>>>(*p, kHeadSize);
    } else {
      using Shape = EchoShape<T, kHeadSize>;
      const auto kernel = echo_kernel<T, kHeadSize>;
      launch.reserve_shared(kernel, Shape::kShared);
      const dim3 grid = prepare(blocks_on_device(kernel, Shape::kThreads, Shape::kShared));
      kernel<<<grid, Shape::kThreads, Shape::kShared, launch.stream()>>>(*p);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return partial;
}

}  // namespace kvc::gpu
