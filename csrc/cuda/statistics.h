// SPDX-License-Identifier: Apache-2.0
// Launcher of the statistics kernels, one instance per dtype and file so that they compile apart.
#pragma once

#include "launch.h"
#include "statistics.cuh"

namespace kvc::gpu {

template <typename T, bool kCodes>
void launch_statistics(const Launch& launch, const Tensor& like, StatisticsParams p,
                       int64_t requests, int64_t most_keys, int64_t head_size);

}  // namespace kvc::gpu
