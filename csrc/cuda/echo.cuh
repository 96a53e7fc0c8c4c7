// SPDX-License-Identifier: Apache-2.0
// echo_scores: what the repetition of a segment would pay to its keys. One block takes a share of
// the query rows of one (segment, KV head). For every 64 rows, the logits of the repeated queries
// stay in registers, [64, 256] over the block, until the sums of all rows are known; so each
// product is computed once. Logarithms of probabilities are compared, and a second kernel takes the
// maximum over the shares and one exponential per key.
#pragma once

#include <type_traits>

#include "../paged_layout.h"
#include "gpu.cuh"

namespace kvc::gpu {

struct EchoParams {
  PagedRows rows;
  const void* query;        // [>= T, H * G, D]
  const void* pages;        // [P, B, 2 * D]
  const int32_t* segments;  // [S, 4] row, first position, end, token
  const float2* rotation;   // [n] cosine and sine
  float* partial;           // [S, H, splits, max_segment] log2 of the highest probability
  float* scores;            // [P, B]
  int64_t query_stride_t, query_stride_h;
  int32_t num_heads;    // H
  int32_t group;        // G
  int32_t layer;        // of the state tables
  int32_t max_segment;  // at most kEchoKeys
  int32_t num_sinks;    // at most kEchoSinks
  int32_t pairs;        // n
  int32_t splits;       // shares of the rows
  float scale_log2;     // scale * log2(e)
  bool interleaved;     // pairs of neighbours
  bool aligned;         // queries may be loaded 16 bytes at once
};

constexpr int kEchoKeys = 256, kEchoSinks = 8, kEchoThreads = 256;

// The larger; NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// One (segment, KV head).
struct EchoUnit {
  HeadPages head;
  int32_t n;      // keys of the segment
  int32_t first;  // where they begin among the keys that the head holds
  int32_t sinks;
  int32_t token;  // of the first query

  __device__ __forceinline__ EchoUnit(const EchoParams& p, int segment, int h) {
    const int32_t* s = p.segments + 4 * static_cast<int64_t>(segment);
    head = head_pages(p.rows, s[0], p.layer * p.num_heads + h);
    n = min(s[2] - s[1], p.max_segment);
    first = s[1] + (head.packed - head.covered) * head.block_size;
    sinks = min(p.num_sinks, first + n);
    token = s[3];
  }

  // Element of the page pool, in keys, at which the head's key `held` lies.
  __device__ __forceinline__ int64_t place(int held) const {
    return static_cast<int64_t>(head.page_id(held / head.block_size)) * head.block_size +
           held % head.block_size;
  }
};

__device__ __forceinline__ float* echo_partial(const EchoParams& p, int segment, int h, int split) {
  return p.partial +
         ((static_cast<int64_t>(segment) * p.num_heads + h) * p.splits + split) * p.max_segment;
}

// x of a pair after the turn is x * cos - y * sin, y is y * cos + x * sin. Not contracted: the
// result is rounded to 16 bits, on the same side as everywhere.
__device__ __forceinline__ float2 turn(float x, float y, float2 by) {
  return make_float2(__fsub_rn(__fmul_rn(x, by.x), __fmul_rn(y, by.y)),
                     __fadd_rn(__fmul_rn(y, by.x), __fmul_rn(x, by.y)));
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, 4);
  return __half22float2(pair);
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

template <typename T, int kHeadSize>
struct EchoShape {
  static constexpr int kRows = 64;
  // Keys are held by parts of the head where whole ones would not fit every device.
  static constexpr int kPart = kHeadSize <= 128 ? kHeadSize : kHeadSize == 256 ? 64 : kHeadSize / 2;
  static constexpr int kParts = kHeadSize / kPart;
  static constexpr int kKeyStride = kPart * sizeof(T) + 16;  // odd in 16 bytes: no conflicts
  static constexpr int kQueryStride = kHeadSize * sizeof(T) + 16;
  static constexpr int kKeyWarps = 4;  // side by side over the keys; two more rows of warps below
  static constexpr int kStates = kKeyWarps * kRows * sizeof(float2);
  static constexpr int kShared =
      (kEchoKeys + kEchoSinks) * kKeyStride + kRows * kQueryStride + kStates;
  static_assert(kPart % 16 == 0 && kPart * kParts == kHeadSize);
  static_assert(kStates >= 2 * kEchoKeys * sizeof(float));
  static_assert(kShared <= 97 << 10);  // what sm_86 has, less what is not dynamic
};

// Rows [64 * tile, 64 * tile + 64) of the unit, row i * G + g being query i of member g.
template <typename T, int kHeadSize>
__device__ __forceinline__ void load_echo_queries(const EchoParams& p, const EchoUnit& unit, int h,
                                                  int tile, char* shared) {
  using Shape = EchoShape<T, kHeadSize>;
  constexpr int kWords = kHeadSize * sizeof(T) / 16;
  const T* base = static_cast<const T*>(p.query) + unit.token * p.query_stride_t +
                  static_cast<int64_t>(h) * p.group * p.query_stride_h;
  for (int i = threadIdx.x; i < Shape::kRows * kWords; i += kEchoThreads) {
    const int local = i / kWords, word = i % kWords;
    const int row = tile * Shape::kRows + local, query = row / p.group;
    const bool live = query < unit.n;
    const T* from = base;
    if (live) {
      from += query * p.query_stride_t + (row - query * p.group) * p.query_stride_h + word * 8;
    }
    char* to = shared + local * Shape::kQueryStride + word * 16;
    if (p.aligned) {
      copy_async(shared_address(to), from, live);
    } else {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        reinterpret_cast<uint32_t*>(to)[d] = live ? load_pair(from + 2 * d, false) : 0;
      }
    }
  }
}

// Turns the queries in shared memory by the distance between reading and repetition.
template <typename T, int kHeadSize>
__device__ __forceinline__ void turn_queries(const EchoParams& p, const float2* rotation,
                                             char* shared) {
  using Shape = EchoShape<T, kHeadSize>;
  const int pairs = p.pairs;
  if (p.interleaved) {
    for (int i = threadIdx.x; i < Shape::kRows * pairs; i += kEchoThreads) {
      const int row = i / pairs, pair = i - row * pairs;
      uint32_t* at = reinterpret_cast<uint32_t*>(shared + row * Shape::kQueryStride) + pair;
      const float2 x = unpack<T>(*at), y = turn(x.x, x.y, rotation[pair]);
      *at = pack<T>(y.x, y.y);
    }
  } else if (pairs % 2 == 0) {
    const int words = pairs / 2;
    for (int i = threadIdx.x; i < Shape::kRows * words; i += kEchoThreads) {
      const int row = i / words, word = i - row * words;
      uint32_t* at = reinterpret_cast<uint32_t*>(shared + row * Shape::kQueryStride) + word;
      const float2 x = unpack<T>(at[0]), y = unpack<T>(at[words]);
      const float2 a = turn(x.x, y.x, rotation[2 * word]);
      const float2 b = turn(x.y, y.y, rotation[2 * word + 1]);
      at[0] = pack<T>(a.x, b.x);
      at[words] = pack<T>(a.y, b.y);
    }
  } else {
    for (int i = threadIdx.x; i < Shape::kRows * pairs; i += kEchoThreads) {
      const int row = i / pairs, pair = i - row * pairs;
      T* at = reinterpret_cast<T*>(shared + row * Shape::kQueryStride) + pair;
      const float2 y = turn(to_float(at[0]), to_float(at[pairs]), rotation[pair]);
      at[0] = from_float<T>(y.x);
      at[pairs] = from_float<T>(y.y);
    }
  }
}

// grid (S, H, splits). Warp w has rows 32 * (w / 4) to + 32 of a tile, and of every 64 keys those
// from 16 * (w % 4) to + 16: what causality leaves to do is then shared evenly.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(kEchoThreads, 2) echo_kernel(EchoParams p) {
  using Shape = EchoShape<T, kHeadSize>;
  constexpr int kRows = Shape::kRows, kKeyStride = Shape::kKeyStride;
  constexpr int kQueryStride = Shape::kQueryStride, kGroups = kEchoKeys / 64;
  constexpr int kMostPages = kEchoKeys / 8 + 1;  // blocks have eight tokens or more
  extern __shared__ __align__(16) char shared[];
  __shared__ int page_ids[kMostPages + 1];  // of the segment, then of the sinks
  __shared__ float2 rotation[kHeadSize / 2];
  char* keys = shared;
  char* queries = keys + (kEchoKeys + kEchoSinks) * kKeyStride;
  float2* states = reinterpret_cast<float2*>(queries + kRows * kQueryStride);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row_warp = warp / Shape::kKeyWarps, key_warp = warp % Shape::kKeyWarps;
  const int h = blockIdx.y, split = blockIdx.z;
  const EchoUnit unit(p, blockIdx.x, h);
  const int n = unit.n, rows = n * p.group, tiles = ceil_div(max(rows, 0), kRows);
  if (n <= 0) return;

  const int shift = __ffs(unit.head.block_size) - 1, mask = unit.head.block_size - 1;
  const int first_page = unit.first >> shift;
  const int num_pages = ((unit.first + n - 1) >> shift) - first_page + 1;
  for (int i = threadIdx.x; i <= kMostPages; i += kEchoThreads) {
    if (i < num_pages) page_ids[i] = unit.head.page_id(first_page + i);
    if (i == kMostPages) page_ids[i] = unit.head.page_id(0);
  }
  for (int i = threadIdx.x; i < p.pairs; i += kEchoThreads) rotation[i] = p.rotation[i];
  __syncthreads();

  const int padded = ceil_div(n, 16) * 16;  // no warp touches keys beyond
  const auto load_keys = [&](int part) {
    constexpr int kWords = Shape::kPart * sizeof(T) / 16;
    for (int i = threadIdx.x; i < (padded + kEchoSinks) * kWords; i += kEchoThreads) {
      const int slot = i / kWords, word = i % kWords, sink = slot - padded;
      const bool live = sink < 0 ? slot < n : sink < unit.sinks;
      const int held = sink < 0 ? unit.first + slot : sink;
      int page = kMostPages;
      if (sink < 0) page = live ? (held >> shift) - first_page : 0;
      const int64_t place = static_cast<int64_t>(page_ids[page]) * (mask + 1) + (held & mask);
      copy_async(
          shared_address(keys + (sink < 0 ? slot : kEchoKeys + sink) * kKeyStride) + word * 16,
          static_cast<const T*>(p.pages) + place * 2 * kHeadSize + part * Shape::kPart + word * 8,
          live);
    }
  };

  float x[kGroups][2][2][4];  // logits: 16 keys of each group in two tiles, 32 rows in two
  float sink_x[2][4];
  float top[kGroups][2][2];  // of the columns of x over all rows so far
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) top[j][i / 2][i % 2] = -kInfinity;
  }
  const auto group_key = [&](int j) { return j * 64 + key_warp * 16; };
  const auto local_row = [&](int m, int i) { return row_warp * 32 + m * 16 + lane / 4 + i * 8; };
  const uint32_t q_lane =
      shared_address(queries) + (row_warp * 32 + lane % 16) * kQueryStride + lane / 16 * 16;
  const uint32_t k_lane = shared_address(keys) +
                          (key_warp * 16 + lane % 8 + lane / 16 * 8) * kKeyStride +
                          lane / 8 % 2 * 16;
  const uint32_t sink_lane =
      shared_address(keys) + (kEchoKeys + lane % 8) * kKeyStride + lane / 8 % 2 * 16;
  // Without a branch among the products, so that loads run ahead of them.
  const auto multiply_groups = [&](auto active, int part) {
#pragma unroll
    for (int k = 0; k < Shape::kPart / 16; ++k) {
      const uint32_t at = q_lane + part * Shape::kPart * sizeof(T) + k * 32;
      uint32_t a[2][4];
      load_tiles(a[0], at);
      load_tiles(a[1], at + 16 * kQueryStride);
#pragma unroll
      for (int j = 0; j < decltype(active)::value; ++j) {
        uint32_t b[4];
        load_tiles(b, k_lane + j * 64 * kKeyStride + k * 32);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(x[j][m][0], a[m], b[0], b[1]);
          multiply_add<T>(x[j][m][1], a[m], b[2], b[3]);
        }
      }
    }
  };
  // The rows of the tile against the keys before `limit`, and against the sinks.
  const auto multiply = [&](int limit, bool with_sinks) {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[j][i / 8][i / 4 % 2][i % 4] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sink_x[i / 4][i % 4] = 0.f;
    for (int part = 0; part < Shape::kParts; ++part) {
      if (Shape::kParts > 1) {
        __syncthreads();
        load_keys(part);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
      }
      switch (min((limit - group_key(0) + 63) / 64, kGroups)) {
        case 4:
          multiply_groups(std::integral_constant<int, 4>{}, part);
          break;
        case 3:
          multiply_groups(std::integral_constant<int, 3>{}, part);
          break;
        case 2:
          multiply_groups(std::integral_constant<int, 2>{}, part);
          break;
        case 1:
          multiply_groups(std::integral_constant<int, 1>{}, part);
          break;
        default:  // the limit is before this warp's keys
          break;
      }
      if (with_sinks) {
#pragma unroll
        for (int k = 0; k < Shape::kPart / 16; ++k) {
          const uint32_t at = q_lane + part * Shape::kPart * sizeof(T) + k * 32;
          uint32_t a[2][4], b[4];
          load_tiles(a[0], at);
          load_tiles(a[1], at + 16 * kQueryStride);
          load_tiles(b, sink_lane + k * 32);
          multiply_add<T>(sink_x[0], a[0], b[0], b[1]);
          multiply_add<T>(sink_x[1], a[1], b[0], b[1]);
        }
      }
    }
  };
  // Adds the logits to maximum and sum of every row. Row r of the tile sees the keys up to
  // last(r); sums are of this lane alone.
  float2 state[2][2];
  const auto accumulate = [&](int limit, bool with_sinks, const auto& last) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int seen = last(local_row(m, i));
        float high = state[m][i].x;
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          if (group_key(j) < limit) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int key = group_key(j) + c / 2 * 8 + lane % 4 * 2 + c % 2;
              float& logit = x[j][m][c / 2][2 * i + c % 2];
              logit = key <= seen ? logit * p.scale_log2 : -kInfinity;
              high = fmaxf(high, logit);
            }
          }
        }
        if (with_sinks) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& logit = sink_x[m][2 * i + c];
            logit = lane % 4 * 2 + c < unit.sinks ? logit * p.scale_log2 : -kInfinity;
            high = fmaxf(high, logit);
          }
        }
        high = lanes_max<2, 1>(high);
        const float origin = high == -kInfinity ? 0.f : high;
        float sum = state[m][i].y * exp2_fast(state[m][i].x - origin);
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          if (group_key(j) < limit) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              sum += exp2_fast(x[j][m][c / 2][2 * i + c % 2] - origin);
            }
          }
        }
        if (with_sinks) {
          sum += exp2_fast(sink_x[m][2 * i] - origin) + exp2_fast(sink_x[m][2 * i + 1] - origin);
        }
        state[m][i] = make_float2(high, sum);
      }
    }
  };

  if (Shape::kParts == 1) load_keys(0);
  if (split < tiles) load_echo_queries<T, kHeadSize>(p, unit, h, split, queries);
  copy_async_commit();
  for (int tile = split; tile < tiles; tile += p.splits) {
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) state[i / 2][i % 2] = make_float2(-kInfinity, 0.f);

    // First reading: of the keys up to the query.
    const int limit = min((tile * kRows + kRows - 1) / p.group, n - 1) + 1;
    multiply(limit, false);
    accumulate(limit, false, [&](int row) { return (tile * kRows + row) / p.group; });
    __syncthreads();
    turn_queries<T, kHeadSize>(p, rotation, queries);
    __syncthreads();

    // Repetition: of the sinks and the whole segment.
    const bool with_sinks = key_warp == Shape::kKeyWarps - 1;
    multiply(n, with_sinks);
    accumulate(n, with_sinks, [&](int) { return n - 1; });
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 own = state[i / 2][i % 2];
      own.y = lanes_sum<2, 1>(own.y);
      if (lane % 4 == 0) states[key_warp * kRows + local_row(i / 2, i % 2)] = own;
    }
    __syncthreads();
    if (tile + p.splits < tiles) {
      load_echo_queries<T, kHeadSize>(p, unit, h, tile + p.splits, queries);
    }
    copy_async_commit();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = local_row(i / 2, i % 2);
      float high = -kInfinity, sum = 0.f;
#pragma unroll
      for (int w = 0; w < Shape::kKeyWarps; ++w) high = fmaxf(high, states[w * kRows + row].x);
#pragma unroll
      for (int w = 0; w < Shape::kKeyWarps; ++w) {
        const float2 other = states[w * kRows + row];
        sum += other.y * rescale(other.x, high);
      }
      // Rows without a query raise nothing.
      const float total = tile * kRows + row < rows ? high + __log2f(sum) : kInfinity;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (group_key(j) < n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float& best = top[j][c / 2][c % 2];
            best = max_nan(best, x[j][i / 2][c / 2][2 * (i % 2) + c % 2] - total);
          }
        }
      }
    }
  }

  copy_async_wait<0>();
  __syncthreads();
  float* columns = reinterpret_cast<float*>(states);  // [2, kEchoKeys]
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float best = top[j][c / 2][c % 2];
#pragma unroll
      for (int i = 16; i >= 4; i /= 2) best = max_nan(best, __shfl_xor_sync(kAllLanes, best, i));
      const int key = group_key(j) + c / 2 * 8 + lane % 4 * 2 + c % 2;
      if (lane < 4) columns[row_warp * kEchoKeys + key] = best;
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) {
    echo_partial(p, blockIdx.x, h, split)[threadIdx.x] =
        max_nan(columns[threadIdx.x], columns[kEchoKeys + threadIdx.x]);
  }
}

// fp32, in plain arithmetic: a thread has one key, a block eight rows at a time. grid (S, H,
// splits). Shared memory: the eight rows as read, then as repeated.
template <int kRows>
__global__ void __launch_bounds__(kEchoThreads) echo_plain_kernel(EchoParams p, int head_size) {
  constexpr int kWarps = kEchoThreads / kWarp;
  extern __shared__ __align__(16) char shared[];
  __shared__ float maxima[kWarps][kRows], sums[kWarps][kRows];
  float* read = reinterpret_cast<float*>(shared);
  float* repeated = read + kRows * head_size;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, key = threadIdx.x;
  const int h = blockIdx.y, split = blockIdx.z;
  const EchoUnit unit(p, blockIdx.x, h);
  const int n = unit.n, rows = n * p.group;
  if (n <= 0) return;
  const float* query = static_cast<const float*>(p.query) + unit.token * p.query_stride_t +
                       static_cast<int64_t>(h) * p.group * p.query_stride_h;
  const auto key_at = [&](int held) {
    return reinterpret_cast<const float4*>(static_cast<const float*>(p.pages) +
                                           unit.place(held) * 2 * head_size);
  };
  float top = -kInfinity;
  for (int first = split * kRows; first < rows; first += p.splits * kRows) {
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * head_size; i += kEchoThreads) {
      const int row = first + i / head_size, d = i % head_size;
      float x = 0.f, y = 0.f;
      if (row < rows) {
        const float* from =
            query + row / p.group * p.query_stride_t + row % p.group * p.query_stride_h;
        x = y = from[d];
        if (d < 2 * p.pairs) {
          const bool second = p.interleaved ? d % 2 : d >= p.pairs;
          const int step = p.interleaved ? 1 : p.pairs, left = second ? d - step : d;
          const float2 turned =
              turn(from[left], from[left + step], p.rotation[p.interleaved ? left / 2 : left]);
          y = second ? turned.y : turned.x;
        }
      }
      read[i] = x;
      repeated[i] = y;
    }
    __syncthreads();
    float past[kRows] = {}, echo[kRows] = {}, sink[kRows] = {};
    if (key < n) {
      const float4* k = key_at(unit.first + key);
      for (int d = 0; d < head_size / 4; ++d) {
        const float4 b = k[d];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 a = reinterpret_cast<const float4*>(read + r * head_size)[d];
          const float4 c = reinterpret_cast<const float4*>(repeated + r * head_size)[d];
          past[r] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
          echo[r] += c.x * b.x + c.y * b.y + c.z * b.z + c.w * b.w;
        }
      }
    }
    if (key < unit.sinks) {
      const float4* k = key_at(key);
      for (int d = 0; d < head_size / 4; ++d) {
        const float4 b = k[d];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 c = reinterpret_cast<const float4*>(repeated + r * head_size)[d];
          sink[r] += c.x * b.x + c.y * b.y + c.z * b.z + c.w * b.w;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool seen = key < n && key <= (first + r) / p.group;
      past[r] = seen ? past[r] * p.scale_log2 : -kInfinity;
      echo[r] = key < n ? echo[r] * p.scale_log2 : -kInfinity;
      sink[r] = key < unit.sinks ? sink[r] * p.scale_log2 : -kInfinity;
      const float high = lanes_max(fmaxf(fmaxf(past[r], echo[r]), sink[r]));
      if (lane == 0) maxima[warp][r] = high;
    }
    __syncthreads();
    float highest[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float high = maxima[0][r];
      for (int w = 1; w < kWarps; ++w) high = fmaxf(high, maxima[w][r]);
      highest[r] = high == -kInfinity ? 0.f : high;
      const float sum =
          lanes_sum(exp2_fast(past[r] - highest[r]) + exp2_fast(echo[r] - highest[r]) +
                    exp2_fast(sink[r] - highest[r]));
      if (lane == 0) sums[warp][r] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = 0.f;
      for (int w = 0; w < kWarps; ++w) sum += sums[w][r];
      if (first + r < rows) top = max_nan(top, echo[r] - (highest[r] + __log2f(sum)));
    }
  }
  if (key < n) echo_partial(p, blockIdx.x, h, split)[key] = top;
}

// grid (S, H)
template <int kThreads>
__global__ void __launch_bounds__(kThreads) echo_combine_kernel(EchoParams p) {
  const EchoUnit unit(p, blockIdx.x, blockIdx.y);
  for (int key = threadIdx.x; key < unit.n; key += kThreads) {
    const float* from = echo_partial(p, blockIdx.x, blockIdx.y, 0) + key;
    float top = from[0];
    for (int i = 1; i < p.splits; ++i) top = max_nan(top, from[i * p.max_segment]);
    p.scores[unit.place(unit.first + key)] = exp2f(top);
  }
}

}  // namespace kvc::gpu
