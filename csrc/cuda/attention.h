// SPDX-License-Identifier: Apache-2.0
// Launchers of the attention kernels, one instance per dtype and file so that they compile apart.
#pragma once

#include "decode_share.cuh"
#include "launch.h"
#include "prefill.cuh"

namespace kvc::gpu {

template <typename T, int kFormat>
void launch_decode(const Launch& launch, const Tensor& like, DecodeParams p, int64_t head_size);

template <typename T, int kFormat>
void launch_prefill(const Launch& launch, const PrefillParams& p, int64_t head_size,
                    int64_t tokens);

}  // namespace kvc::gpu
