// SPDX-License-Identifier: Apache-2.0
// From the probabilities of a chunk of query rows for some keys to the statistics of each key.
#pragma once

#include <type_traits>

#include "../channels.h"
#include "gpu.cuh"

namespace kvc::gpu {

// Where a chunk of query rows and a tile of keys meet. Row q * group + g is query q, member g.
struct ChunkRows {
  int group;      // G
  int seen;       // query q of the chunk sees keys [0, seen + q * stride]
  int stride;     // tokens from one query to the next
  int queries;    // queries in the chunk
  int first_key;  // key of column 0

  __device__ __forceinline__ bool visible(int row, int column) const {
    return first_key + column <= seen + row / group * stride;
  }
  // Spares the divisions in most tiles.
  __device__ __forceinline__ bool all_visible(int columns) const {
    return first_key + columns - 1 <= seen;
  }
};

// The least x with x / group >= 1 / visible in fp32. Comparing sums with it instead of dividing
// each gives the same answer, because rounded division is monotone.
__device__ __forceinline__ float low_threshold(int visible, int group) {
  const float mean = 1.f / visible;
  float x = mean * group;
  while (x / group >= mean) x = __uint_as_float(__float_as_uint(x) - 1);
  while (x / group < mean) x = __uint_as_float(__float_as_uint(x) + 1);
  return x;
}

// A warp-uniform branch: the mask is an argument of the kernel.
__device__ __forceinline__ bool has_channel(uint32_t channels, Channel channel) {
  return channels >> channel & 1;
}

// Sums over the query rows for one key per thread. Thread `key` of the first kKeys keeps SUM,
// SUM_SQUARES, LOW_COUNT, MEAN_SQUARES and LAST, thread kKeys + key HEAD_SUM_SQUARES, ENTROPY and
// MAXIMUM; further threads idle. The rarer channels have loops of their own, so that they cost
// nothing where they are not asked for.
class ChannelSums {
 public:
  // weights [kRows][kStride], zero in rows without a query; thresholds per query of the chunk;
  // head_sums [G][kKeys] carries sums over q from chunk to chunk.
  template <int kRows, int kKeys, int kStride>
  __device__ __forceinline__ void add(uint32_t channels, const float* weights,
                                      const float* thresholds, const ChunkRows& view,
                                      float* head_sums, bool first, bool last) {
    const auto run = [&](auto group) {
      constexpr int kGroup = decltype(group)::value;
      add_group<kRows, kKeys, kStride, kGroup>(channels, weights, thresholds, view, head_sums,
                                               first, last);
    };
    switch (view.group) {  // known group sizes unroll
      case 1:
        return run(std::integral_constant<int, 1>{});
      case 2:
        return run(std::integral_constant<int, 2>{});
      case 4:
        return run(std::integral_constant<int, 4>{});
      case 8:
        return run(std::integral_constant<int, 8>{});
      default:
        return run(std::integral_constant<int, 0>{});
    }
  }

  // The key's selected channels, `plane` floats apart.
  template <int kKeys>
  __device__ __forceinline__ void write(uint32_t channels, float* out, int64_t plane,
                                        int group) const {
    const auto put = [&](Channel channel, float value) {
      if (has_channel(channels, channel))
        out[__popc(channels & ((1u << channel) - 1)) * plane] = value;
    };
    if (threadIdx.x < kKeys) {
      put(kSum, sum_);
      put(kSumSquares, squares_);
      put(kLowCount, static_cast<float>(low_));
      put(kMeanSquares, mean_squares_ / static_cast<float>(group * group));
      put(kLast, last_);
    } else if (threadIdx.x < 2 * kKeys) {
      put(kHeadSumSquares, squares_);
      put(kEntropy, sum_ / kLog2E);
      put(kMaximum, last_);
    }
  }

 private:
  template <int kRows, int kKeys, int kStride, int kGroup>
  __device__ __forceinline__ void add_group(uint32_t channels, const float* weights,
                                            const float* thresholds, const ChunkRows& view,
                                            float* head_sums, bool first, bool last) {
    const int key = threadIdx.x % kKeys, group = kGroup ? kGroup : view.group;
    const int queries = kGroup ? kRows / (kGroup ? kGroup : 1) : view.queries;
    const float* column = weights + key;
    const auto over_group = [&](int q) {
      float sum = 0.f;
#pragma unroll
      for (int g = 0; g < group; ++g) sum += column[(q * group + g) * kStride];
      return sum;
    };
    if (threadIdx.x < kKeys) {
      if (channels & (1u << kSum | 1u << kSumSquares | 1u << kLowCount)) {
        const bool counts = has_channel(channels, kLowCount);
#pragma unroll
        for (int q = 0; q < queries; ++q) {
          float over_heads = 0.f;
#pragma unroll
          for (int g = 0; g < group; ++g) {
            const float p = column[(q * group + g) * kStride];
            over_heads += p;
            squares_ += p * p;
          }
          sum_ += over_heads;
          if (counts) {
            const bool visible =
                view.first_key + key <= view.seen + q * view.stride && q < view.queries;
            low_ += visible && over_heads < thresholds[q];
          }
        }
      }
      if (has_channel(channels, kMeanSquares)) {
#pragma unroll
        for (int q = 0; q < queries; ++q) {
          const float over_heads = over_group(q);
          mean_squares_ += over_heads * over_heads;
        }
      }
      if (has_channel(channels, kLast) && last && view.queries > 0) {
        last_ = over_group(view.queries - 1);
      }
    } else if (threadIdx.x < 2 * kKeys) {
      if (has_channel(channels, kHeadSumSquares)) {
#pragma unroll
        for (int g = 0; g < group; ++g) {
          float over_queries = first ? 0.f : head_sums[g * kKeys + key];
#pragma unroll
          for (int q = 0; q < queries; ++q) over_queries += column[(q * group + g) * kStride];
          if (last) {
            squares_ += over_queries * over_queries;
          } else {
            head_sums[g * kKeys + key] = over_queries;
          }
        }
      }
      if (has_channel(channels, kEntropy)) {
#pragma unroll
        for (int row = 0; row < queries * group; ++row) {
          const float p = column[row * kStride];
          // The bound keeps a vanishing p, which the logarithm would flush to 0, from NaN.
          sum_ -= p * __log2f(fmaxf(p, 1e-37f));
        }
      }
      if (has_channel(channels, kMaximum)) {
#pragma unroll
        for (int row = 0; row < queries * group; ++row) {
          const float p = column[row * kStride];
          if (p > last_ || p != p) last_ = p;  // NaN stays
        }
      }
    }
  }

  // ENTROPY in base 2, HEAD_SUM_SQUARES and MAXIMUM share registers with SUM, SUM_SQUARES and LAST.
  float sum_ = 0.f, squares_ = 0.f, mean_squares_ = 0.f, last_ = 0.f;
  int low_ = 0;
};

}  // namespace kvc::gpu
