// SPDX-License-Identifier: Apache-2.0
// From products of queries and keys to logits, in units of log 2.
#pragma once

#include <cstdint>
#include <limits>

#include "simd.h"

namespace kvc {

struct Logits {
  float scale;         // of the products; those of a capped logit are in units of the cap
  float cap;           // 0: none
  const float* sinks;  // by query head, in units of 1; nullptr: none

  Logits(double scale_of_products, double soft_cap, const float* sink_logits)
      : scale(soft_cap == 0 ? static_cast<float>(scale_of_products) * kLog2E
                            : static_cast<float>(scale_of_products / soft_cap)),
        cap(static_cast<float>(soft_cap) * kLog2E),
        sinks(sink_logits) {}

  // The running maximum and sum of a query head before its first key: the sink is like a key whose
  // value is zero.
  float maximum(int64_t head) const {
    return sinks ? sinks[head] * kLog2E : -std::numeric_limits<float>::infinity();
  }
  float sum() const { return sinks ? 1.0f : 0.0f; }
};

}  // namespace kvc
