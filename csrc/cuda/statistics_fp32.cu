// SPDX-License-Identifier: Apache-2.0
#include "statistics_launch.cuh"

namespace kvc::gpu {

template void launch_statistics<float, false>(const Launch&, const Tensor&, StatisticsParams,
                                              int64_t, int64_t, int64_t);

}  // namespace kvc::gpu
