// SPDX-License-Identifier: Apache-2.0
// Causal attention of rows with several query tokens over paged keys, on the tensor cores. A block
// takes 64 (token, query head) pairs of one KV head, so the G query heads share every key.
// 16-bit types only: fp32 rows of any length go through the decode kernel.
#pragma once

#include "mixed_tile.cuh"

namespace kvc::gpu {

struct PrefillParams {
  PagedRows rows;
  const void* query;           // [>= T, H * G, D]
  const void* pages;           // [P, B, 2 * D]
  void* out;                   // like query
  const int32_t* query_start;  // [R + 1]
  int64_t query_stride_t, query_stride_h, out_stride_t, out_stride_h;
  int32_t num_requests;  // R
  int32_t num_heads;     // H
  int32_t group;         // G
  int32_t layer;
  int32_t least_tokens;  // rows with fewer query tokens are left to the decode kernel
  Logits logits;
  bool aligned;  // pairs of elements may be loaded and stored at once
};

template <typename T, int kHeadSize>
struct PrefillShape {
  static constexpr int kRows = 64, kWarps = kRows / 16, kThreads = kWarps * kWarp;
  static constexpr int kKeys = kHeadSize > 128 ? 32 : 64;
  static constexpr int kQueryStride = kHeadSize * sizeof(T) + 16;
  static constexpr int kKeyStride = 2 * kHeadSize * sizeof(T) + 16;
  static constexpr int kStage = kKeys * kKeyStride;
  static constexpr int kShared = kRows * kQueryStride + 2 * kStage;
  static_assert(kShared <= 99 << 10);
};

// The request of query tile `tile`. Request r owns the tiles from query_start[r] / tokens + r on:
// at least as many as it needs, and found without a sum over the requests before it.
__device__ __forceinline__ int tile_request(const PrefillParams& p, int tile, int tokens) {
  int low = 0, high = p.num_requests;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.query_start[middle] / tokens + middle <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// kCodes: packed pages hold codes.
template <typename T, int kHeadSize, bool kCodes>
__global__ void __launch_bounds__(PrefillShape<T, kHeadSize>::kThreads)
    prefill_kernel(PrefillParams p) {
  using Shape = PrefillShape<T, kHeadSize>;
  constexpr int kKeys = Shape::kKeys, kThreads = Shape::kThreads;
  constexpr int kKeyStride = Shape::kKeyStride, kQueryStride = Shape::kQueryStride;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tile_tokens = Shape::kRows / p.group;
  const int r = tile_request(p, blockIdx.x, tile_tokens), h = blockIdx.y;
  const int query_begin = p.query_start[r], query_tokens = p.query_start[r + 1] - query_begin;
  const int first_token = (blockIdx.x - query_begin / tile_tokens - r) * tile_tokens;
  const int seq_len = p.rows.seq_lens[r];
  if (query_tokens < p.least_tokens || first_token >= query_tokens || seq_len <= 0) return;
  const int tokens = min(tile_tokens, query_tokens - first_token);
  const HeadPages head = head_pages(p.rows, r, p.layer * p.num_heads + h);
  const int num_keys = head.num_keys(seq_len);
  // Token i of the tile sees keys [0, seen + i].
  const int seen = num_keys - query_tokens + first_token;
  const int tiles = ceil_div(min(num_keys, seen + tokens), kKeys);

  const uint32_t queries = shared_address(shared), ring = queries + Shape::kRows * kQueryStride;
  PageIds ids;
  ids.reset(head, num_keys);
  const auto load = [&](int tile) {
    constexpr int kPair = 2 * kHeadSize * sizeof(T);
    if constexpr (kCodes) {
      load_mixed_tile<T, kHeadSize, kKeys, kKeyStride, kThreads, true>(
          shared + Shape::kRows * kQueryStride + tile % 2 * Shape::kStage,
          static_cast<const char*>(p.pages), head, tile * kKeys, num_keys);
    } else {
      copy_keys<kKeys, kPair / 16, kKeyStride, kPair, kThreads>(
          ring + tile % 2 * Shape::kStage, static_cast<const char*>(p.pages), head, &ids,
          tile * kKeys, num_keys, threadIdx.x);
      copy_async_commit();
    }
  };
  if (tiles > 0) load(0);

  const T* query = static_cast<const T*>(p.query) + (query_begin + first_token) * p.query_stride_t +
                   static_cast<int64_t>(h) * p.group * p.query_stride_h;
  for (int i = threadIdx.x; i < Shape::kRows * kHeadSize / 2; i += kThreads) {
    const int row = i / (kHeadSize / 2), d = i % (kHeadSize / 2) * 2, token = row / p.group;
    const T* from = query + token * p.query_stride_t + row % p.group * p.query_stride_h + d;
    *reinterpret_cast<uint32_t*>(shared + row * kQueryStride + d * sizeof(T)) =
        token < tokens ? load_pair(from, p.aligned) : 0;
  }

  float out[kHeadSize / 8][4] = {};
  float max[2] = {-kInfinity, -kInfinity}, sum[2] = {};
  const int row = warp * 16 + lane / 4;                                     // and row + 8
  const int limit[2] = {seen + row / p.group, seen + (row + 8) / p.group};  // last visible key
  const uint32_t q_lane = queries + (warp * 16 + lane % 16) * kQueryStride + lane / 16 * 16;
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tiles) load(tile + 1);
    const uint32_t keys = ring + tile % 2 * Shape::kStage;

    float logits[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) {
      uint32_t a[4];
      load_tiles(a, q_lane + k * 32);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        load_tiles(b, keys + (j * 16 + lane % 8 + lane / 16 * 8) * kKeyStride + k * 32 +
                          lane / 8 % 2 * 16);
        multiply_add<T>(logits[2 * j], a, b[0], b[1]);
        multiply_add<T>(logits[2 * j + 1], a, b[2], b[3]);
      }
    }

#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[j][i] *= p.logits.factor;
    }
    if (p.logits.cap != 0.f) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[j][i] = soft_cap(logits[j][i], p.logits.cap);
      }
    }
    float top[2] = {max[0], max[1]};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = tile * kKeys + j * 8 + lane % 4 * 2 + i % 2;
        logits[j][i] = key <= limit[i / 2] ? logits[j][i] : -kInfinity;
        top[i / 2] = fmaxf(top[i / 2], logits[j][i]);
      }
    }
    float scale[2], origin[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = lanes_max<2, 1>(top[i]);
      origin[i] = top[i] == -kInfinity ? 0.f : top[i];
      scale[i] = exp2_fast(max[i] - origin[i]);
      max[i] = top[i];
      sum[i] *= scale[i];
    }
#pragma unroll
    for (int d = 0; d < kHeadSize / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[d][i] *= scale[i / 2];
    }
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      float w[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w[half][i] = exp2_fast(logits[2 * j + half][i] - origin[i / 2]);
          sum[i / 2] += w[half][i];
        }
      }
      const uint32_t a[4] = {pack<T>(w[0][0], w[0][1]), pack<T>(w[0][2], w[0][3]),
                             pack<T>(w[1][0], w[1][1]), pack<T>(w[1][2], w[1][3])};
#pragma unroll
      for (int d = 0; d < kHeadSize / 16; ++d) {
        uint32_t b[4];
        load_tiles_transposed(b, keys + (j * 16 + lane % 16) * kKeyStride + kHeadSize * sizeof(T) +
                                     d * 32 + lane / 16 * 16);
        multiply_add<T>(out[2 * d], a, b[0], b[1]);
        multiply_add<T>(out[2 * d + 1], a, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = (row + i * 8) / p.group, g = (row + i * 8) % p.group;
    const float weights = lanes_sum<2, 1>(sum[i]);
    if (token >= tokens) continue;
    const float total = weights + sink_weight(p.logits.of_head(h, p.group), g, max[i]);
    T* target = static_cast<T*>(p.out) +
                static_cast<int64_t>(query_begin + first_token + token) * p.out_stride_t +
                (static_cast<int64_t>(h) * p.group + g) * p.out_stride_h + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < kHeadSize / 8; ++d) {
      target[d * 8] = from_float<T>(out[d][2 * i] / total);
      target[d * 8 + 1] = from_float<T>(out[d][2 * i + 1] / total);
    }
  }
}

}  // namespace kvc::gpu
