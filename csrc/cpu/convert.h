// SPDX-License-Identifier: Apache-2.0
// Between the cache's dtype and fp32, in which everything is computed.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace kvc {

inline void to_float(const Simd&, const float* in, float* out, int64_t count) {
  std::memcpy(out, in, count * sizeof(float));
}
inline void to_float(const Simd& simd, const torch::headeronly::Half* in, float* out,
                     int64_t count) {
  simd.from_half(reinterpret_cast<const uint16_t*>(in), out, count);
}
inline void to_float(const Simd& simd, const torch::headeronly::BFloat16* in, float* out,
                     int64_t count) {
  simd.from_bfloat16(reinterpret_cast<const uint16_t*>(in), out, count);
}

}  // namespace kvc
