// SPDX-License-Identifier: Apache-2.0
#include "attention_launch.cuh"

namespace kvc::gpu {

template void launch_prefill<__nv_bfloat16, kAuto>(const Launch&, const PrefillParams&, int64_t,
                                                   int64_t);
template void launch_prefill<__nv_bfloat16, kFp8>(const Launch&, const PrefillParams&, int64_t,
                                                  int64_t);
template void launch_prefill<__nv_bfloat16, kInt4>(const Launch&, const PrefillParams&, int64_t,
                                                   int64_t);

}  // namespace kvc::gpu
