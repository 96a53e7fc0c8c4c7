// SPDX-License-Identifier: Apache-2.0
// The arithmetic of attention_statistics on one tile: logits of a chunk of query rows against some
// keys, on the tensor cores for 16-bit types and in plain arithmetic for fp32. Both classes have
// the same members.
#pragma once

#include "channel_sums.cuh"

namespace kvc::gpu {

// 32 rows x 64 keys, 128 threads: every warp takes 16 keys.
template <typename T, int kHeadSize>
class TensorLogits {
 public:
  static constexpr int kRows = 32, kKeys = 64;
  static constexpr int kStride = kHeadSize * sizeof(T) + 16;  // odd in 16 bytes: no conflicts

  // Holds the warp's keys in registers, for any number of chunks of queries.
  __device__ __forceinline__ void load_keys(const char* keys) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const uint32_t k_lane =
        shared_address(keys) + (warp * 16 + lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) load_tiles(keys_[k], k_lane + k * 32);
  }

  __device__ __forceinline__ void logits(const char* queries, const Logits& of,
                                         const ChunkRows& view) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t q_lane = shared_address(queries) + lane % 16 * kStride + lane / 16 * 16;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x_[m][0][i] = x_[m][1][i] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t a[4];
        load_tiles(a, q_lane + m * 16 * kStride + k * 32);
        multiply_add<T>(x_[m][0], a, keys_[k][0], keys_[k][1]);
        multiply_add<T>(x_[m][1], a, keys_[k][2], keys_[k][3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) x_[i / 8][i / 4 % 2][i % 4] *= of.factor;
    if (of.cap != 0.f) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        x_[i / 8][i / 4 % 2][i % 4] = soft_cap(x_[i / 8][i / 4 % 2][i % 4], of.cap);
      }
    }
    const bool all_visible = view.all_visible(kKeys);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!all_visible && !view.visible(row(m, i), column(j, i))) x_[m][j][i] = -kInfinity;
        }
      }
    }
  }

  // Adds the tile to maximum and sum of every row; `state` [kRows] belongs to the warp.
  __device__ __forceinline__ void accumulate(float2* state) const {
    float2 next[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float a = fmaxf(x_[m][0][i], x_[m][0][i + 1]);
        const float b = fmaxf(x_[m][1][i], x_[m][1][i + 1]);
        const float2 old = state[row(m, i)];
        const float top = fmaxf(old.x, lanes_max<2, 1>(fmaxf(a, b)));
        const float origin = top == -kInfinity ? 0.f : top;
        const float sum =
            lanes_sum<2, 1>(exp2_fast(x_[m][0][i] - origin) + exp2_fast(x_[m][0][i + 1] - origin) +
                            exp2_fast(x_[m][1][i] - origin) + exp2_fast(x_[m][1][i + 1] - origin));
        next[m][i / 2] = make_float2(top, old.y * exp2_fast(old.x - origin) + sum);
      }
    }
    __syncwarp();  // all lanes have read their rows
    if (threadIdx.x % 4 == 0) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) state[row(m, 2 * i)] = next[m][i];
      }
    }
    __syncwarp();
  }

  // Probabilities, to weights [kRows][kKeys + 8]; state holds maximum and 1 / sum of every row.
  __device__ __forceinline__ void weights(const float2* state, float* weights) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float2 norm = state[row(m, i)];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          *reinterpret_cast<float2*>(weights + row(m, i) * (kKeys + 8) + column(j, i)) =
              make_float2(exp2_fast(x_[m][j][i] - norm.x) * norm.y,
                          exp2_fast(x_[m][j][i + 1] - norm.x) * norm.y);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int row(int m, int i) {
    return m * 16 + threadIdx.x % kWarp / 4 + i / 2 * 8;
  }
  static __device__ __forceinline__ int column(int j, int i) {
    return threadIdx.x / kWarp * 16 + j * 8 + threadIdx.x % 4 * 2 + i % 2;
  }

  uint32_t keys_[kHeadSize / 16][4];
  float x_[2][2][4];
};

// fp32: 16 rows x 32 keys, 128 threads; a warp takes 4 rows, a lane one key.
template <int kHeadSize>
class PlainLogits {
 public:
  static constexpr int kRows = 16, kKeys = 32;
  static constexpr int kStride = kHeadSize * sizeof(float) + 16;

  __device__ __forceinline__ void load_keys(const char* keys) {
    keys_ = keys + threadIdx.x % kWarp * kStride;
  }

  __device__ __forceinline__ void logits(const char* queries, const Logits& of,
                                         const ChunkRows& view) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x_[i] = 0.f;
    for (int d = 0; d < kHeadSize / 4; ++d) {
      const float4 b = *reinterpret_cast<const float4*>(keys_ + d * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(queries + row(i) * kStride + d * 16);
        x_[i] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool visible = view.all_visible(kKeys) || view.visible(row(i), threadIdx.x % kWarp);
      const float x = x_[i] * of.factor;
      x_[i] = !visible ? -kInfinity : of.cap != 0.f ? soft_cap(x, of.cap) : x;
    }
  }

  __device__ __forceinline__ void accumulate(float2* state) const {
    float2 next[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 old = state[row(i)];
      const float top = fmaxf(old.x, lanes_max(x_[i]));
      const float origin = top == -kInfinity ? 0.f : top;
      next[i] = make_float2(
          top, old.y * exp2_fast(old.x - origin) + lanes_sum(exp2_fast(x_[i] - origin)));
    }
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state[row(i)] = next[i];
    }
    __syncwarp();
  }

  __device__ __forceinline__ void weights(const float2* state, float* weights) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 norm = state[row(i)];
      weights[row(i) * (kKeys + 8) + threadIdx.x % kWarp] = exp2_fast(x_[i] - norm.x) * norm.y;
    }
  }

 private:
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / kWarp * 4 + i; }

  const char* keys_;
  float x_[4];
};

template <typename T, int kHeadSize>
struct StatisticsMath {
  using Type = TensorLogits<T, kHeadSize>;
};
template <int kHeadSize>
struct StatisticsMath<float, kHeadSize> {
  using Type = PlainLogits<kHeadSize>;
};

}  // namespace kvc::gpu
