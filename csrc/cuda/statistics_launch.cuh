// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "statistics.h"

namespace kvc::gpu {

template <typename T, int kHeadSize, bool kCodes>
void launch_statistics_shape(const Launch& launch, const Tensor& like, StatisticsParams p,
                             int64_t requests, int64_t most_keys) {
  using Shape = StatisticsShape<T, kHeadSize>;
  using Math = typename Shape::Math;
  const int chunks = ceil_div(p.window, Math::kRows / p.group);
  const int fixed = Shape::kStages * Shape::kStage + Shape::kWeights + Shape::state_bytes(chunks) +
                    Shape::threshold_bytes(chunks) + (chunks > 1 ? Shape::head_bytes(p.group) : 0);
  const int limit = launch.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p.resident = fixed + Shape::query_bytes(chunks) <= limit;
  const int shared = fixed + Shape::query_bytes(p.resident ? chunks : 1);
  const auto first = statistics_kernel<T, kHeadSize, true, kCodes>;
  const auto second = statistics_kernel<T, kHeadSize, false, kCodes>;
  launch.reserve_shared(first, shared);
  launch.reserve_shared(second, shared);
  const int64_t heads = requests * p.rows.slots;
  const int64_t splits = launch.num_splits(second, Shape::kThreads, shared, heads,
                                           most_keys / (8 * Math::kKeys));  // eight tiles or more
  const Tensor partial =
      torch::stable::new_empty(like, {heads * splits * p.window * p.group * 2}, ScalarType::Float);
  p.partial = static_cast<float2*>(partial.mutable_data_ptr());
  const dim3 grid(static_cast<unsigned>(splits), p.rows.slots, static_cast<unsigned>(requests));
  first<<<grid, Shape::kThreads, shared, launch.stream()>>>(p);
  second<<<grid, Shape::kThreads, shared, launch.stream()>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, bool kCodes>
void launch_statistics(const Launch& launch, const Tensor& like, StatisticsParams p,
                       int64_t requests, int64_t most_keys, int64_t head_size) {
  dispatch_head_size(head_size, [&](auto size) {
    launch_statistics_shape<T, decltype(size)::value, kCodes>(launch, like, p, requests, most_keys);
  });
}

}  // namespace kvc::gpu
