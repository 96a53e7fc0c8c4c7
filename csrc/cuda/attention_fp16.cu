// SPDX-License-Identifier: Apache-2.0
#include "attention_launch.cuh"

namespace kvc::gpu {

template void launch_decode<__half, kAuto>(const Launch&, const Tensor&, DecodeParams, int64_t);

}  // namespace kvc::gpu
