// SPDX-License-Identifier: Apache-2.0
// From the probabilities of a chunk of query rows for some keys to the statistics of each key.
#pragma once

#include <type_traits>

#include "gpu.cuh"

namespace kvc::gpu {

// Where a chunk of query rows and a tile of keys meet. Row q * group + g is query q, member g.
struct ChunkRows {
  int group;      // G
  int seen;       // query q of the chunk sees keys [0, seen + q]
  int queries;    // queries in the chunk
  int first_key;  // key of column 0

  __device__ __forceinline__ bool visible(int row, int column) const {
    return first_key + column <= seen + row / group;
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

// Sums over the query rows for one key per thread. Thread `key` of the first kKeys keeps SUM,
// SUM_SQUARES and LOW_COUNT, thread kKeys + key HEAD_SUM_SQUARES; further threads idle.
class KeyStatistics {
 public:
  // weights [kRows][kStride], zero in rows without a query; thresholds per query of the chunk;
  // head_sums [G][kKeys] carries sums over q from chunk to chunk.
  template <int kRows, int kKeys, int kStride>
  __device__ __forceinline__ void add(const float* weights, const float* thresholds,
                                      const ChunkRows& view, float* head_sums, bool first,
                                      bool last) {
    const auto run = [&](auto group) {
      constexpr int kGroup = decltype(group)::value;
      add_group<kRows, kKeys, kStride, kGroup>(weights, thresholds, view, head_sums, first, last);
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

  // The key's four channels, `plane` floats apart.
  template <int kKeys>
  __device__ __forceinline__ void write(float* out, int64_t plane) const {
    if (threadIdx.x < kKeys) {
      out[0] = sum_;
      out[plane] = squares_;
      out[3 * plane] = static_cast<float>(low_);
    } else if (threadIdx.x < 2 * kKeys) {
      out[2 * plane] = squares_;
    }
  }

 private:
  template <int kRows, int kKeys, int kStride, int kGroup>
  __device__ __forceinline__ void add_group(const float* weights, const float* thresholds,
                                            const ChunkRows& view, float* head_sums, bool first,
                                            bool last) {
    const int key = threadIdx.x % kKeys, group = kGroup ? kGroup : view.group;
    const int queries = kGroup ? kRows / (kGroup ? kGroup : 1) : view.queries;
    const float* column = weights + key;
    if (threadIdx.x < kKeys) {
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
        const bool visible = view.first_key + key <= view.seen + q && q < view.queries;
        low_ += visible && over_heads < thresholds[q];
      }
    } else if (threadIdx.x < 2 * kKeys) {
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
  }

  float sum_ = 0.f, squares_ = 0.f;
  int low_ = 0;
};

}  // namespace kvc::gpu
