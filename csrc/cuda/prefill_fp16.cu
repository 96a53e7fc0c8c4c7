// SPDX-License-Identifier: Apache-2.0
#include "attention_launch.cuh"

namespace kvc::gpu {

template void launch_prefill<__half, kAuto>(const Launch&, const PrefillParams&, int64_t, int64_t);
template void launch_prefill<__half, kFp8>(const Launch&, const PrefillParams&, int64_t, int64_t);
template void launch_prefill<__half, kInt4>(const Launch&, const PrefillParams&, int64_t, int64_t);

}  // namespace kvc::gpu
