// SPDX-License-Identifier: Apache-2.0
// Launcher of the echo kernels, one instance per dtype and file so that they compile apart.
#pragma once

#include "echo.cuh"
#include "launch.h"

namespace kvc::gpu {

// Fills p.partial and leaves in p.splits how many shares it has; it is kept alive by the result.
template <typename T>
Tensor launch_echo(const Launch& launch, const Tensor& like, EchoParams* p, int64_t segments,
                   int64_t head_size);

// Shares of the rows: rounds of blocks on the device times what a block costs, its keys about as
// much as a tile of rows.
inline int32_t echo_splits(int64_t units, int64_t slots, int64_t tiles) {
  const auto cost = [&](int64_t splits) {
    const int64_t rounds = (units * splits + slots - 1) / slots;
    return rounds * ((tiles + splits - 1) / splits + 1);
  };
  int32_t best = 1;
  for (int32_t splits = 2; splits <= tiles; ++splits) {
    if (cost(splits) < cost(best)) best = splits;
  }
  return best;
}

}  // namespace kvc::gpu
