// SPDX-License-Identifier: Apache-2.0
// Channels of the attention_statistics op, in the order of its bit mask. What each is:
// kvcompress_vllm/ops/reference.py.
#pragma once

namespace kvc {

enum Channel { kSum, kSumSquares, kHeadSumSquares, kLowCount, kMeanSquares, kEntropy, kLast };
constexpr int kNumChannels = 7;

}  // namespace kvc
