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

// Rounds of blocks on the device that are worth their start: `rounds` * `slots` blocks or more, as
// long as each has two tiles of rows.
inline int32_t echo_splits(int64_t units, int64_t slots, int64_t tiles) {
  int32_t splits = 1;
  while (units * splits < 2 * slots && tiles >= 4 * splits) splits *= 2;
  return splits;
}

}  // namespace kvc::gpu
