// SPDX-License-Identifier: Apache-2.0
// Causal attention of rows with several query tokens over paged keys, on the tensor cores. A block
// takes up to 128 (token, query head) pairs of one KV head, so the G query heads share every key.
// 16-bit types only: fp32 rows of any length go through the decode kernel.
#pragma once

#include "code_tile.cuh"
#include "page_cursor.cuh"

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
  bool aligned;      // of the queries, 16 bytes may be loaded at once
  bool aligned_out;  // pairs of elements of the result may be stored at once
};

// Rows are (token, query head) pairs. A warp has kTiles * 16 of them: two tiles use what is read of
// a key twice, but need all of its registers; see launch_prefill().
template <typename T, int kHeadSize, int kTiles>
struct PrefillShape {
  static constexpr int kMostTiles = kHeadSize > 128 ? 1 : 2;
  static constexpr int kWarpRows = 16 * kTiles, kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = 32;  // at once; no more than a page of codes has
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

// What a warp holds: of rows lane / 4 + 8 i of its m-th tile of 16, maxima, sums and results.
template <typename T, int kHeadSize, int kFormat, int kTiles>
class PrefillWarp {
  using Shape = PrefillShape<T, kHeadSize, kTiles>;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kQueryStride = Shape::kQueryStride, kKeyStride = Shape::kKeyStride;

 public:
  // `queries`: of the warp, in shared memory. Token i of the tile sees the keys up to seen + i.
  __device__ __forceinline__ PrefillWarp(char* queries, int warp, int group, int seen,
                                         const Logits& logits)
      : queries_(queries), factor_(logits.factor), cap_(logits.cap) {
    const int row = warp * Shape::kWarpRows + threadIdx.x % kWarp / 4;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        limit_[m][i] = seen + (row + m * 16 + i * 8) / group;
        max_[m][i] = -kInfinity;
      }
    }
    first_limit_ = seen + warp * Shape::kWarpRows / group;
    last_limit_ = seen + ((warp + 1) * Shape::kWarpRows - 1) / group;
  }

  // The warp's share of the queries of the block, from `query` on, which has `tokens` tokens.
  __device__ __forceinline__ void read_queries(const PrefillParams& p, const T* query, int warp,
                                               int tokens) {
    const int lane = threadIdx.x % kWarp;
    constexpr int kWords = kHeadSize / 8;
    for (int i = lane; i < Shape::kWarpRows * kWords; i += kWarp) {
      const int row = i / kWords, d = i % kWords * 8;
      const int pair = warp * Shape::kWarpRows + row, token = pair / p.group;
      const T* from = query + token * p.query_stride_t + pair % p.group * p.query_stride_h + d;
      uint4 word = make_uint4(0, 0, 0, 0);
      if (token < tokens && p.aligned) {
        word = __ldg(reinterpret_cast<const uint4*>(from));
      } else if (token < tokens) {
        word = make_uint4(load_pair(from, false), load_pair(from + 2, false),
                          load_pair(from + 4, false), load_pair(from + 6, false));
      }
      *reinterpret_cast<uint4*>(queries_ + row * kQueryStride + d * sizeof(T)) = word;
    }
    __syncwarp();
  }

  // Before keys that are codes: the products see codes only. The query carries the scales of K (or
  // the logits' factor does, where there is one scale) and int4's rotation: q . H k = H q . k.
  __device__ __forceinline__ void enter_codes(const uint16_t* scales) {
    if constexpr (kFormat == kFp8) {
      factor_ *= scale_float(__ldg(scales)) * Unpack<T, kFp8>::kFactor;
    } else {
      constexpr int kCount = kHeadSize / kWarp;
      const int lane = threadIdx.x % kWarp;
      float scale[kCount], zero[kCount];
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        scale[c] = scale_float(__ldg(scales + c * kWarp + lane));
        zero[c] = scale_float(__ldg(scales + 2 * kHeadSize + c * kWarp + lane));
      }
#pragma unroll 1
      for (int row = 0; row < Shape::kWarpRows; ++row) {
        T* query = reinterpret_cast<T*>(queries_ + row * kQueryStride) + lane;
        float q[kCount], along = 0.f;
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          q[c] = to_float(query[c * kWarp]);
#pragma unroll
          for (int bit = 1; bit < kWarp; bit *= 2) q[c] = rotate_lanes(q[c], bit);
        }
        rotate_registers<kCount, 1, rotated_together(kHeadSize) / kWarp>(q);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          along += q[c] * zero[c];
          query[c * kWarp] = from_float<T>(q[c] * scale[c]);
        }
        along = lanes_sum(along) * factor_;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (row == m * 16 + i * 8 + lane / 4) offset_[m][i] = along;
          }
        }
      }
      __syncwarp();
    }
  }

  // Behind the last codes: the result gets the scales and zeros of V and is turned back. For int4
  // the queries must be read again.
  __device__ __forceinline__ void leave_codes(const uint16_t* scales, float factor) {
    const int lane = threadIdx.x % kWarp;
    factor_ = factor;
    if constexpr (kFormat == kFp8) {
      const float scale = scale_float(__ldg(scales + 1)) * Unpack<T, kFp8>::kFactor;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int d = 0; d < kHeadSize / 8; ++d) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out_[m][d][i] *= scale;
        }
      }
    } else {
      const uint32_t* of_values = reinterpret_cast<const uint32_t*>(scales + kHeadSize) + lane % 4;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          offset_[m][i] = 0.f;
          const float sum = lanes_sum<2, 1>(sum_[m][i]);
          float x[kHeadSize / 4];  // channel bits 0, 3 and further; lane % 4 has 1 and 2
#pragma unroll
          for (int d = 0; d < kHeadSize / 8; ++d) {
            const float2 scale = pair_floats(__ldg(of_values + d * 4), __nv_bfloat16{});
            const float2 zero = pair_floats(__ldg(of_values + kHeadSize + d * 4), __nv_bfloat16{});
            x[2 * d] = out_[m][d][2 * i] * scale.x + zero.x * sum;
            x[2 * d + 1] = out_[m][d][2 * i + 1] * scale.y + zero.y * sum;
          }
          rotate_registers<kHeadSize / 4, 1, 2>(x);
#pragma unroll
          for (int c = 0; c < kHeadSize / 4; ++c) x[c] = rotate_lanes(rotate_lanes(x[c], 1), 2);
          rotate_registers<kHeadSize / 4, 2, rotated_together(kHeadSize) / 4>(x);
#pragma unroll
          for (int d = 0; d < kHeadSize / 8; ++d) {
            out_[m][d][2 * i] = x[2 * d];
            out_[m][d][2 * i + 1] = x[2 * d + 1];
          }
        }
      }
    }
  }

  // The kKeys keys at `keys`, of which `first` is the first; those from `end` on are none.
  __device__ __forceinline__ void step(uint32_t keys, int first, int end) {
    if (first > last_limit_) return;
    const int lane = threadIdx.x % kWarp;
    const uint32_t q_lane = shared_address(queries_) + lane % 16 * kQueryStride + lane / 16 * 16;
    float logits[kTiles][kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_tiles(a[m], q_lane + m * 16 * kQueryStride + k * 32);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t b[4];
        load_tiles(b, keys + (j * 16 + lane % 8 + lane / 16 * 8) * kKeyStride + k * 32 +
                          lane / 8 % 2 * 16);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          multiply_add<T>(logits[m][2 * j], a[m], b[0], b[1]);
          multiply_add<T>(logits[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          logits[m][j][i] =
              logits[m][j][i] * factor_ + (kFormat == kInt4 ? offset_[m][i / 2] : 0.f);
        }
      }
    }
    if (cap_ != 0.f) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) logits[m][j][i] = soft_cap(logits[m][j][i], cap_);
        }
      }
    }
    // Of most tiles every row sees every key.
    if (first + kKeys > end || first + kKeys - 1 > first_limit_) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = first + j * 8 + lane % 4 * 2 + i % 2;
            if (key > limit_[m][i / 2] || key >= end) logits[m][j][i] = -kInfinity;
          }
        }
      }
    }
    float origin[kTiles][2], scale[kTiles][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = max_[m][i];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          top = fmaxf(top, fmaxf(logits[m][j][2 * i], logits[m][j][2 * i + 1]));
        }
        top = lanes_max<2, 1>(top);
        origin[m][i] = top == -kInfinity ? 0.f : top;
        scale[m][i] = exp2_fast(max_[m][i] - origin[m][i]);
        moved |= top != max_[m][i];
        max_[m][i] = top;
        sum_[m][i] *= scale[m][i];
      }
    }
    if (__any_sync(kAllLanes, moved)) {  // seldom after the first keys
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int d = 0; d < kHeadSize / 8; ++d) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out_[m][d][i] *= scale[m][i / 2];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        float w[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            w[half][i] = exp2_fast(logits[m][2 * j + half][i] - origin[m][i / 2]);
            sum_[m][i / 2] += w[half][i];
          }
        }
        a[m][0] = pack<T>(w[0][0], w[0][1]), a[m][1] = pack<T>(w[0][2], w[0][3]);
        a[m][2] = pack<T>(w[1][0], w[1][1]), a[m][3] = pack<T>(w[1][2], w[1][3]);
      }
#pragma unroll
      for (int d = 0; d < kHeadSize / 16; ++d) {
        uint32_t b[4];
        load_tiles_transposed(b, keys + (j * 16 + lane % 16) * kKeyStride + kHeadSize * sizeof(T) +
                                     d * 32 + lane / 16 * 16);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          multiply_add<T>(out_[m][2 * d], a[m], b[0], b[1]);
          multiply_add<T>(out_[m][2 * d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // `out`: of the first token of the block and query head 0 of the KV head.
  __device__ __forceinline__ void write(const PrefillParams& p, T* out, int warp, int tokens,
                                        const float* sinks) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int pair = warp * Shape::kWarpRows + m * 16 + i * 8 + lane / 4;
        const int token = pair / p.group, g = pair % p.group;
        const float weights = lanes_sum<2, 1>(sum_[m][i]);
        if (token >= tokens) continue;
        const float inverse = 1.f / (weights + sink_weight(sinks, g, max_[m][i]));
        T* target = out + token * p.out_stride_t + g * p.out_stride_h + lane % 4 * 2;
#pragma unroll
        for (int d = 0; d < kHeadSize / 8; ++d) {
          const float x = out_[m][d][2 * i] * inverse, y = out_[m][d][2 * i + 1] * inverse;
          if (p.aligned_out) {
            *reinterpret_cast<uint32_t*>(target + d * 8) = pack<T>(x, y);
          } else {
            target[d * 8] = from_float<T>(x);
            target[d * 8 + 1] = from_float<T>(y);
          }
        }
      }
    }
  }

 private:
  char* queries_;
  float factor_;  // of the products, base 2
  const float cap_;
  int limit_[kTiles][2];          // last visible key
  int first_limit_, last_limit_;  // least and greatest of the warp's
  float max_[kTiles][2], sum_[kTiles][2] = {};
  float out_[kTiles][kHeadSize / 8][4] = {};
  float offset_[kTiles][2] = {};  // q . zero, base 2, where keys are codes
};

// As many blocks on a processor as registers are enough for; where it has 100 KB of shared memory,
// that allows fewer.
template <typename T, int kHeadSize, int kFormat, int kTiles>
__global__ void __launch_bounds__(PrefillShape<T, kHeadSize, kTiles>::kThreads,
                                  kHeadSize > 128 || kTiles > 1 ? 2 : 3)
    prefill_kernel(PrefillParams p) {
  using Shape = PrefillShape<T, kHeadSize, kTiles>;
  constexpr int kKeys = Shape::kKeys, kThreads = Shape::kThreads, kKeyStride = Shape::kKeyStride;
  extern __shared__ __align__(16) char shared[];
  const int warp = threadIdx.x / kWarp, tile_tokens = Shape::kRows / p.group;
  const int r = tile_request(p, blockIdx.x, tile_tokens), h = blockIdx.y;
  const int query_begin = p.query_start[r], query_tokens = p.query_start[r + 1] - query_begin;
  const int first_token = (blockIdx.x - query_begin / tile_tokens - r) * tile_tokens;
  const int seq_len = p.rows.seq_lens[r];
  if (query_tokens < p.least_tokens || first_token >= query_tokens || seq_len <= 0) return;
  const int tokens = min(tile_tokens, query_tokens - first_token);
  const HeadPages head = head_pages(p.rows, r, p.layer * p.num_heads + h);
  const int num_keys = head.num_keys(seq_len), seen = num_keys - query_tokens + first_token;

  // Keys that are codes come first, in tiles of their own. Behind them, or from the first key on,
  // all pages are alike.
  //
  //   keys   | codes          | 16 bits: 0 .. num_keys - codes - 1 of `plain` |
  //   tiles  | 0 .. coded - 1 | coded .. tiles - 1                            |
  const int end = min(num_keys, seen + tokens);  // what some token sees
  const int codes = kFormat == kAuto ? 0 : max(0, min(head.packed_keys(), end));
  const int coded = ceil_div(codes, kKeys), tiles = coded + ceil_div(max(0, end - codes), kKeys);
  const HeadPages plain = kFormat == kAuto ? head : head.tail();
  const int plain_keys = num_keys - codes;

  char* const ring = shared + Shape::kRows * Shape::kQueryStride;
  PageIds ids;
  ids.reset(plain, plain_keys);
  const auto copy = [&](int tile) {
    constexpr int kPair = 2 * kHeadSize * sizeof(T);
    copy_keys<kKeys, kPair / 16, kKeyStride, kPair, kThreads>(
        shared_address(ring) + tile % 2 * Shape::kStage, static_cast<const char*>(p.pages), plain,
        &ids, (tile - coded) * kKeys, plain_keys, threadIdx.x);
    copy_async_commit();
  };
  using Codes =
      CodeTile<T, kHeadSize, kFormat == kAuto ? kFp8 : kFormat, kKeys, kKeyStride, kThreads, true>;
  Codes tile_codes(head, static_cast<const char*>(p.pages));
  if (coded > 0) {
    tile_codes.locate(0);
    tile_codes.fetch();
    tile_codes.locate(kKeys);
  } else if (tiles > 0) {
    copy(0);
  }

  const T* query = static_cast<const T*>(p.query) + (query_begin + first_token) * p.query_stride_t +
                   static_cast<int64_t>(h) * p.group * p.query_stride_h;
  PrefillWarp<T, kHeadSize, kFormat, kTiles> mine(
      shared + warp * Shape::kWarpRows * Shape::kQueryStride, warp, p.group, seen, p.logits);
  mine.read_queries(p, query, warp, tokens);
  if (coded > 0) {
    mine.enter_codes(head.scales);
    tile_codes.store(ring);
  }
  const bool live = warp * Shape::kWarpRows < tokens * p.group;
  for (int tile = 0;; ++tile) {
    if (kFormat != kAuto && coded > 0 && tile == coded) {
      mine.leave_codes(head.scales, p.logits.factor);
      if (kFormat == kInt4 && tile < tiles) mine.read_queries(p, query, warp, tokens);
    }
    if (tile == tiles) break;
    copy_async_wait<0>();
    __syncthreads();
    const int next = tile + 1;
    if (next < coded) {
      tile_codes.fetch();
      tile_codes.locate((next + 1) * kKeys);
    } else if (next < tiles) {
      copy(next);
    }
    const bool of_codes = tile < coded;
    if (live) {
      mine.step(shared_address(ring) + tile % 2 * Shape::kStage,
                of_codes ? tile * kKeys : codes + (tile - coded) * kKeys,
                of_codes ? codes : num_keys);
    }
    if (next < coded) tile_codes.store(ring + next % 2 * Shape::kStage);
  }

  T* out = static_cast<T*>(p.out) + (query_begin + first_token) * p.out_stride_t +
           static_cast<int64_t>(h) * p.group * p.out_stride_h;
  mine.write(p, out, warp, tokens, p.logits.of_head(h, p.group));
}

}  // namespace kvc::gpu
