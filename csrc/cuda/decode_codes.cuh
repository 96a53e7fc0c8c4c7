// SPDX-License-Identifier: Apache-2.0
// Decode attention to packed pages that hold codes. A unit of decode work is 16 rows of a page's
// bytes, in which a 16-bit format has 16 keys and codes have 16 * m: row i holds keys m * i to
// m * i + m - 1. So nothing but the arithmetic of a unit knows about codes (decode_work.cuh).
#pragma once

#include "codes.cuh"
#include "decode_math.cuh"

namespace kvc::gpu {

// Keys of int4 that a warp takes at once. 64 in eight warps of 214 registers are better for long
// heads than 32 in eleven warps of 168, and worse for short ones.
constexpr int int4_keys_together(int head_size, int tiles) {
  return head_size == 128 && tiles == 1 ? 64 : 32;
}

// The products see codes only, int4's with what Operands adds, which is taken off their sums: of
// keys with all else, of values after every step, as long sums of it would leave little of the
// codes. The query carries the scales of K (or the logits' factor does, where there is one scale)
// and int4's rotation, since q . H k = H q . k; the result gets the scales of V and is turned back
// when the last codes are done.
template <typename T, int kHeadSize, int kTiles, int kFormat>
class CodedDecode : public TensorDecode<T, kHeadSize, kTiles> {
 public:
  using Base = TensorDecode<T, kHeadSize, kTiles>;
  using Base::kStride;
  static constexpr int kRow = key_bytes(kFormat, kHeadSize);  // of one key

  // After start(), where the stretch begins with codes; `scales` [A, S] in shared memory.
  __device__ __forceinline__ void enter_codes(uint32_t scales, float scale_log2) {
    if constexpr (kFormat == kFp8) {
      const uint32_t both = load_shared(scales);
      factor_[0][0] = scale_log2 * scale_float(both & 0xFFFF) * Code::kFactor;
      of_values_[0][0] = both >> 16;
    } else {
      enter_channels(scales, scale_log2);
    }
  }

  // The 16 * m keys of a unit.
  __device__ __forceinline__ void step_codes(uint32_t unit, float cap) {
#pragma unroll 1
    for (int i = 0; i < kUnits; i += kTogether) step_keys(unit + i * kRow, cap);
  }

  // Goes on with 16-bit keys, or with finish().
  __device__ __forceinline__ void leave_codes() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float sum[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[i] = lanes_sum<16, 4>(this->sum_[n][i]);
#pragma unroll
      for (int d = 0; d < kHeadSize / 16; ++d) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t of_value =
              of_values_[kFormat == kInt4 ? d : 0][kFormat == kInt4 ? half : 0];
          const float scale = scale_float(of_value & 0xFFFF) * (Code::kFactor / Code::times(half));
          const float zero = kFormat == kInt4 ? scale_float(of_value >> 16) : 0.f;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& out = this->out_[d][n][half * 2 + i];
            out = out * scale + zero * sum[i];
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if constexpr (kFormat == kInt4) this->query_[d][n][half] = unscaled_[d][n][half];
        }
      }
      if constexpr (kFormat == kInt4) {
#pragma unroll
        for (int i = 0; i < 2; ++i) turn_back(n, i);
      }
    }
  }

 private:
  using Code = Operands<T, kFormat>;
  using Type = typename Code::Type;
  static constexpr int kUnits = blocks_per_page(kFormat);  // of 16 keys, which lie kRow apart
  static constexpr int kTogether =
      kFormat == kInt4 ? int4_keys_together(kHeadSize, kTiles) / 16 : 2;
  static constexpr int kTogetherChannels = rotated_together(kHeadSize);
  static constexpr int kKeyChunk = kRow / 8, kValueChunk = kRow / 16;  // bytes of a lane

  __device__ __forceinline__ void enter_channels(uint32_t scales, float scale_log2) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float q[kHeadSize / 4];  // channel bits 0, 3 and further of place bits 0, 1, ...
#pragma unroll
      for (int i = 0; i < kHeadSize / 8; ++i) {
        uint32_t& query = this->query_[i / 2][n][i % 2];
        unscaled_[i / 2][n][i % 2] = query;
        const float2 pair = pair_floats(query, T{});
        q[2 * i] = pair.x;
        q[2 * i + 1] = pair.y;
      }
      rotate_registers<kHeadSize / 4, 1, 2>(q);
#pragma unroll
      for (int i = 0; i < kHeadSize / 4; ++i) q[i] = rotate_lanes(rotate_lanes(q[i], 1), 2);
      rotate_registers<kHeadSize / 4, 2, kTogetherChannels / 4>(q);
      float offset = 0.f, most = 0.f;  // q . zero; of column n * 8 + lane / 4, as all here
#pragma unroll
      for (int i = 0; i < kHeadSize / 8; ++i) {
        const uint32_t at = scales + (i * 8 + lane % 4 * 2) * 2;
        const float2 scale = pair_floats(load_shared(at), __nv_bfloat16{});
        const float2 zero = pair_floats(load_shared(at + 4 * kHeadSize), __nv_bfloat16{});
        offset += q[2 * i] * zero.x + q[2 * i + 1] * zero.y;
        q[2 * i] *= scale.x;
        q[2 * i + 1] *= scale.y;
        most = fmaxf(most, fmaxf(fabsf(q[2 * i]), fabsf(q[2 * i + 1])));
      }
      // A power of two with which the column's largest number is from 2^13 up to 2^14, so that all
      // have their place in fp16.
      most = lanes_max<2, 1>(most);
      const int exponent = min(max(267 - static_cast<int>(__float_as_uint(most) >> 23), 14), 240);
      const float unit = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
      const float inverse = __uint_as_float(static_cast<uint32_t>(254 - exponent) << 23);
      float added = 0.f;
#pragma unroll
      for (int i = 0; i < kHeadSize / 8; ++i) {
        const float times = unit / Code::times(i % 2);
        uint32_t& query = this->query_[i / 2][n][i % 2];
        query = pack<Type>(q[2 * i] * times, q[2 * i + 1] * times);
        const float2 rounded = pair_floats(query, Type{});
        added += Code::added(i % 2) * (rounded.x + rounded.y);
      }
      offset = lanes_sum<2, 1>(offset - added * inverse) * scale_log2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int from = lane % 4 * 8 + i * 4;
        offset_[n][i] = __shfl_sync(kAllLanes, offset, from);
        factor_[n][i] = __shfl_sync(kAllLanes, inverse, from) * scale_log2;
      }
    }
#pragma unroll
    for (int d = 0; d < kHeadSize / 16; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t at = scales + (kHeadSize + d * 16 + half * 8 + lane / 4) * 2;
        of_values_[d][half] = load_shared_half(at) | load_shared_half(at + 4 * kHeadSize) << 16;
      }
    }
  }

  // Values were stored rotated. Lane / 4 holds channel bits 0 to 2.
  __device__ __forceinline__ void turn_back(int n, int i) {
    float x[kHeadSize / 8];
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) {
      x[j] = this->out_[j / 2][n][j % 2 * 2 + i];
#pragma unroll
      for (int bit = 4; bit < kWarp; bit *= 2) x[j] = rotate_lanes(x[j], bit);
    }
    rotate_registers<kHeadSize / 8, 1, kTogetherChannels / 8>(x);
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) this->out_[j / 2][n][j % 2 * 2 + i] = x[j];
  }

  // 16 keys in rows kStride apart from `keys` on, and the 16 behind each.
  __device__ __forceinline__ void step_keys(uint32_t keys, float cap) {
    const int lane = threadIdx.x % kWarp;
    float logits[kTogether][kTiles][4] = {};
    const uint32_t k_lane = keys + lane / 4 * kStride + lane % 4 * kKeyChunk;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      Chunk<kKeyChunk> low, high;
      low.load(k_lane + u * kRow);
      high.load(k_lane + u * kRow + 8 * kStride);
#pragma unroll
      for (int k = 0; k < kHeadSize / 16; ++k) {
        const int word = k * 2 / Code::kPairs, j = k * 2 % Code::kPairs;
        const uint32_t tile[4] = {Code::pair(low.words[word], j), Code::pair(high.words[word], j),
                                  Code::pair(low.words[word], j + 1),
                                  Code::pair(high.words[word], j + 1)};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          multiply_add<Type>(logits[u][n], tile, this->query_[k][n][0], this->query_[k][n][1]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        float& x = logits[u][i / 4][i % 4];
        x = kFormat == kInt4 ? x * factor_[i / 4][i % 2] + offset_[i / 4][i % 2]
                             : x * factor_[0][0];
      }
    }
    if (cap != 0.f) {
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {
          logits[u][i / 4][i % 4] = soft_cap(logits[u][i / 4][i % 4], cap);
        }
      }
    }
    uint32_t weights[kTogether][kTiles][2];
    bool moved = false;
    float scales[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float p[kTogether][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = -kInfinity;
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
#pragma unroll
          for (int half = 0; half < 2; ++half) top = fmaxf(top, logits[u][n][i + half * 2]);
        }
        top = fmaxf(this->max_[n][i], lanes_max<16, 4>(top));
        const float origin = top == -kInfinity ? 0.f : top;
        scales[n][i] = exp2_fast(this->max_[n][i] - origin);
        moved |= top != this->max_[n][i];
        this->max_[n][i] = top;
        float sum = this->sum_[n][i] * scales[n][i];
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            p[u][i + half * 2] = exp2_fast(logits[u][n][i + half * 2] - origin);
            sum += p[u][i + half * 2];
          }
        }
        this->sum_[n][i] = sum;
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        weights[u][n][0] = transpose_tile(pack<Type>(p[u][0], p[u][1]));
        weights[u][n][1] = transpose_tile(pack<Type>(p[u][2], p[u][3]));
      }
    }
    if (__any_sync(kAllLanes, moved)) {  // seldom after the first keys
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int d = 0; d < kHeadSize / 16; ++d) {
#pragma unroll
          for (int i = 0; i < 4; ++i) this->out_[d][n][i] *= scales[n][i % 2];
        }
      }
    }
    const uint32_t v_lane = keys + kRow / 2 + lane % 4 * 2 * kStride + lane / 4 * kValueChunk;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      Chunk<kValueChunk> values[4];  // of keys 2 c, 2 c + 1, 2 c + 8, 2 c + 9
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i].load(v_lane + u * kRow + (i % 2 + i / 2 * 8) * kStride);
      }
#pragma unroll
      for (int half = 0; half < kValueChunk / 2; ++half) {
        const uint32_t left = halves(values[0], values[1], half);
        const uint32_t right = halves(values[2], values[3], half);
#pragma unroll
        for (int j = 0; j < Code::kPairs; j += 2) {
          const uint32_t tile[4] = {Code::pair(left, j), Code::pair(left, j + 1),
                                    Code::pair(right, j), Code::pair(right, j + 1)};
          const int d = (half * Code::kPairs + j) / 2;
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            multiply_add<Type>(this->out_[d][n], tile, weights[u][n][0], weights[u][n][1]);
          }
        }
      }
    }
    if constexpr (kFormat == kInt4) {
      constexpr uint32_t kOnes[4] = {0x3C003C00u, 0x3C003C00u, 0x3C003C00u, 0x3C003C00u};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        float sums[4] = {};  // of the weights as they were multiplied, the same in all rows
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          multiply_add<Type>(sums, kOnes, weights[u][n][0], weights[u][n][1]);
        }
#pragma unroll
        for (int d = 0; d < kHeadSize / 16; ++d) {
#pragma unroll
          for (int i = 0; i < 4; ++i) this->out_[d][n][i] -= Code::added(i / 2) * sums[i];
        }
      }
    }
  }

  // The query as it was; another name than the base's, which `this->` would find second.
  uint32_t unscaled_[kFormat == kInt4 ? kHeadSize / 16 : 1][kTiles][2];
  uint32_t of_values_[kFormat == kInt4 ? kHeadSize / 16 : 1][2];  // zero and scale of V
  // Of the products, base 2; of int4 for columns 2 * (lane % 4) and the next.
  float factor_[kFormat == kInt4 ? kTiles : 1][2];
  float offset_[kFormat == kInt4 ? kTiles : 1][2];  // q . zero less what Operands adds
};

template <typename T, int kHeadSize, int kTiles, int kFormat>
struct DecodeMath {
  using Type = CodedDecode<T, kHeadSize, kTiles, kFormat>;
};
template <typename T, int kHeadSize, int kTiles>
struct DecodeMath<T, kHeadSize, kTiles, kAuto> {
  using Type = TensorDecode<T, kHeadSize, kTiles>;
};
template <int kHeadSize, int kTiles>
struct DecodeMath<float, kHeadSize, kTiles, kAuto> {
  using Type = PlainDecode<kHeadSize, kTiles>;
};

}  // namespace kvc::gpu
