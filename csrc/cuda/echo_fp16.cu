// SPDX-License-Identifier: Apache-2.0
#include "echo_launch.cuh"

namespace kvc::gpu {

template Tensor launch_echo<__half>(const Launch&, const Tensor&, EchoParams*, int64_t, int64_t);

}  // namespace kvc::gpu
