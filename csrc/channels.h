// SPDX-License-Identifier: Apache-2.0
// Channels of attention_statistics, of key_statistics and, last, what echo_scores stored: one
// numbering, bits of the ops' masks. What each is: kvcompress_vllm/ops/reference.
#pragma once

#include <cstdint>

namespace kvc {

enum Channel {
  kSum,
  kSumSquares,
  kHeadSumSquares,
  kLowCount,
  kMeanSquares,
  kEntropy,
  kLast,
  kMaximum,
  kNorm,
  kLikeness,
  kValueNorm
};
constexpr int kNumAttentionChannels = kNorm;

// The bits that each op knows.
constexpr int64_t kAttentionChannels = (1 << kNumAttentionChannels) - 1;
constexpr int64_t kKeyChannels = 1 << kNorm | 1 << kLikeness | 1 << kValueNorm;

// How many channels a mask selects.
inline int64_t count_channels(int64_t channels) {
  int64_t count = 0;
  for (; channels; channels &= channels - 1) ++count;
  return count;
}

}  // namespace kvc
