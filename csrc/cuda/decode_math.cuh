// SPDX-License-Identifier: Apache-2.0
// Attention of the columns of a pass (decode_share.cuh) to 16 keys at a time, by one warp: on the
// tensor cores for 16-bit types, in plain arithmetic for fp32, where a pass has one token. Both
// classes have the same members.
#pragma once

#include "decode_work.cuh"

namespace kvc::gpu {

// Transposed products, S^T = K Q^T and O^T = V^T P^T: keys and head dimensions fill the 16 rows of
// the matrix instruction, and the columns of a pass are its 8 (16 in two tiles, 24 in three).
template <typename T, int kHeadSize, int kTiles>
class TensorDecode {
 public:
  static constexpr int kStride = 2 * kHeadSize * sizeof(T) + 16;  // odd in 16 bytes: no conflicts

  // `staged`: the columns, [columns, D] in shared memory; with three tiles there is no room, and
  // they come from `query`, where the caches have them.
  __device__ __forceinline__ void start(const DecodeParams& p, uint32_t staged, const T* query,
                                        int columns) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int c = n * 8 + lane / 4;
      if constexpr (kTiles > 2) {
        const T* row =
            query + column_offset(p, c, p.query_stride_t, p.query_stride_h) + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < kHeadSize / 16; ++k) {
          query_[k][n][0] = c < columns ? load_pair(row + k * 16, p.aligned) : 0;
          query_[k][n][1] = c < columns ? load_pair(row + k * 16 + 8, p.aligned) : 0;
        }
      } else {
        const uint32_t row = staged + (c * kHeadSize + lane % 4 * 2) * static_cast<int>(sizeof(T));
#pragma unroll
        for (int k = 0; k < kHeadSize / 16; ++k) {
          query_[k][n][0] = c < columns ? load_shared(row + k * 32) : 0;
          query_[k][n][1] = c < columns ? load_shared(row + k * 32 + 16) : 0;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      max_[n][0] = max_[n][1] = -kInfinity;
      sum_[n][0] = sum_[n][1] = 0.f;
#pragma unroll
      for (int d = 0; d < kHeadSize / 16; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[d][n][i] = 0.f;
      }
    }
  }

  // The 16 K/V pairs at `keys`, of which the first `visible` count for the first token, and one
  // more for each behind it.
  __device__ __forceinline__ void step(const DecodeParams& p, uint32_t keys, int visible) {
    const Logits& of = p.logits;
    const int lane = threadIdx.x % kWarp;
    float logits[2][kTiles][4] = {};  // two sums, to halve the chain of dependent products
    const uint32_t k_lane = keys + lane % 16 * kStride + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) {
      uint32_t tile[4];
      load_tiles(tile, k_lane + k * 32);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        multiply_add<T>(logits[k % 2][n], tile, query_[k][n][0], query_[k][n][1]);
      }
    }
    float x[kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = (logits[0][n][i] + logits[1][n][i]) * of.factor;
    }
    if (of.cap != 0.f) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] = soft_cap(x[n][i], of.cap);
      }
    }
    if (visible < kUnit) {  // only the last units of a head
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int later = (n * 8 + lane % 4 * 2 + i) * p.of_columns >> 10;
          if (lane / 4 >= visible + later) x[n][i] = -kInfinity;
          if (lane / 4 + 8 >= visible + later) x[n][i + 2] = -kInfinity;
        }
      }
    }
    uint32_t weights[kTiles][2];
    bool moved = false;
    float scales[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float share[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x0 = x[n][i], x1 = x[n][i + 2];
        const float top = fmaxf(max_[n][i], lanes_max<16, 4>(fmaxf(x0, x1)));
        const float origin = top == -kInfinity ? 0.f : top;
        scales[n][i] = exp2_fast(max_[n][i] - origin);
        moved |= top != max_[n][i];
        max_[n][i] = top;
        share[i] = exp2_fast(x0 - origin);
        share[i + 2] = exp2_fast(x1 - origin);
        sum_[n][i] = sum_[n][i] * scales[n][i] + share[i] + share[i + 2];
      }
      weights[n][0] = transpose_tile(pack<T>(share[0], share[1]));
      weights[n][1] = transpose_tile(pack<T>(share[2], share[3]));
    }
    if (__any_sync(kAllLanes, moved)) {  // seldom after the first keys
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int d = 0; d < kHeadSize / 16; ++d) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out_[d][n][i] *= scales[n][i % 2];
        }
      }
    }
    const uint32_t v_lane =
        keys + kHeadSize * sizeof(T) + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 16;
#pragma unroll
    for (int d = 0; d < kHeadSize / 16; ++d) {
      uint32_t tile[4];
      load_tiles_transposed(tile, v_lane + d * 32);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        multiply_add<T>(out_[d][n], tile, weights[n][0], weights[n][1]);
      }
    }
  }

  // Calls f(c, d, x) for the parts of out [columns, D] that this lane holds: divided by the sum and
  // the head's sinks if `divide`, else as they are. Afterwards statistics() holds for every lane.
  template <typename F>
  __device__ __forceinline__ void finish(const DecodeParams& p, bool divide, int columns,
                                         const float* sinks, F&& f) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum_[n][i] = lanes_sum<16, 4>(sum_[n][i]);
        const int c = n * 8 + lane % 4 * 2 + i;
        if (c >= columns) continue;
        const int g = column_head(p, c);
        const float factor = divide ? 1.f / (sum_[n][i] + sink_weight(sinks, g, max_[n][i])) : 1.f;
#pragma unroll
        for (int d = 0; d < kHeadSize / 16; ++d) {
          f(c, d * 16 + lane / 4, out_[d][n][i] * factor);
          f(c, d * 16 + lane / 4 + 8, out_[d][n][i + 2] * factor);
        }
      }
    }
  }

  // Calls f(c, max, sum) once for every column. After finish().
  template <typename F>
  __device__ __forceinline__ void statistics(int columns, F&& f) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = n * 8 + lane % 4 * 2 + i;
        if (lane < 4 && c < columns) f(c, max_[n][i], sum_[n][i]);
      }
    }
  }

 protected:
  uint32_t query_[kHeadSize / 16][kTiles][2];
  float out_[kHeadSize / 16][kTiles][4];
  float max_[kTiles][2], sum_[kTiles][2];  // of columns 2 * (lane % 4) and the next
};

// fp32: two lanes share a key for the logits, every lane owns every 32nd output dimension.
template <int kHeadSize, int kTiles>
class PlainDecode {
 public:
  static constexpr int kStride = 2 * kHeadSize * sizeof(float) + 16;

  // `query` [G, D] stays where it is.
  __device__ __forceinline__ void start(const DecodeParams& p, uint32_t, const float* query,
                                        int columns) {
    query_ = query;
    stride_ = p.query_stride_h;
    group_ = columns;
#pragma unroll
    for (int g = 0; g < kMost; ++g) {
      max_[g] = -kInfinity;
      sum_[g] = 0.f;
#pragma unroll
      for (int d = 0; d < kParts; ++d) out_[g][d] = 0.f;
    }
  }

  __device__ __forceinline__ void step(const DecodeParams& params, uint32_t keys, int visible) {
    const Logits& of = params.logits;
    const int lane = threadIdx.x % kWarp;
    const char* base = static_cast<const char*>(__cvta_shared_to_generic(keys));
    const float* k = reinterpret_cast<const float*>(base + lane / 2 * kStride);
    float logits[kMost] = {};
    for (int d = lane % 2; d < kHeadSize; d += 2) {
      const float key = k[d];
#pragma unroll
      for (int g = 0; g < kMost; ++g) {
        if (g < group_) logits[g] += key * __ldg(query_ + g * stride_ + d);
      }
    }
#pragma unroll
    for (int g = 0; g < kMost; ++g) {
      if (g >= group_) continue;
      float logit = lanes_sum<1, 1>(logits[g]) * of.factor;
      if (of.cap != 0.f) logit = soft_cap(logit, of.cap);
      const float x = lane / 2 < visible ? logit : -kInfinity;
      const float top = fmaxf(max_[g], lanes_max(x));
      const float origin = top == -kInfinity ? 0.f : top;
      const float scale = exp2_fast(max_[g] - origin), p = exp2_fast(x - origin);
      max_[g] = top;
      sum_[g] = sum_[g] * scale + lanes_sum<16, 2>(p);
#pragma unroll
      for (int d = 0; d < kParts; ++d) out_[g][d] *= scale;
#pragma unroll 1  // short code matters more here than speed
      for (int j = 0; j < kUnit; ++j) {
        const float weight = __shfl_sync(kAllLanes, p, 2 * j);
        const float* v = reinterpret_cast<const float*>(base + j * kStride) + kHeadSize + lane;
#pragma unroll
        for (int d = 0; d < kParts; ++d) {
          if (owns(d)) out_[g][d] += weight * v[d * kWarp];
        }
      }
    }
  }

  template <typename F>
  __device__ __forceinline__ void finish(const DecodeParams&, bool divide, int group,
                                         const float* sinks, F&& f) {
#pragma unroll
    for (int g = 0; g < kMost; ++g) {
      if (g >= group) continue;
      const float factor = divide ? 1.f / (sum_[g] + sink_weight(sinks, g, max_[g])) : 1.f;
#pragma unroll
      for (int d = 0; d < kParts; ++d) {
        if (owns(d)) f(g, d * kWarp + static_cast<int>(threadIdx.x % kWarp), out_[g][d] * factor);
      }
    }
  }

  template <typename F>
  __device__ __forceinline__ void statistics(int group, F&& f) const {
#pragma unroll
    for (int g = 0; g < kMost; ++g) {
      if (threadIdx.x % kWarp == 0 && g < group) f(g, max_[g], sum_[g]);
    }
  }

 private:
  static constexpr int kMost = 8 * kTiles, kParts = ceil_div(kHeadSize, kWarp);

  // Whether part d of this lane is within the head.
  static __device__ __forceinline__ bool owns(int d) {
    return kHeadSize % kWarp == 0 || d * kWarp + static_cast<int>(threadIdx.x % kWarp) < kHeadSize;
  }

  const float* query_;
  int64_t stride_;
  int group_;
  float out_[kMost][kParts], max_[kMost], sum_[kMost];
};

}  // namespace kvc::gpu
