// SPDX-License-Identifier: Apache-2.0
// echo_scores: what the repetition of a segment would pay to its keys. One block takes a share of
// the query rows of one (segment, KV head); within it, two groups of warps take 32 rows each and
// never wait for each other. The logits of the repeated queries stay in registers, [32, 256] over
// a group, until the sums of all rows are known; so each product is computed once. Logarithms of
// probabilities are compared, and a second kernel takes the maximum over the shares and one
// exponential per key.
#pragma once

#include <type_traits>

#include "gpu.cuh"
#include "mixed_tile.cuh"

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
  Logits logits;
  bool interleaved;  // pairs of neighbours
  bool aligned;      // queries may be loaded 16 bytes at once
};

constexpr int kEchoKeys = 256, kEchoSinks = 8;
constexpr int kEchoPlainThreads = 256;

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
  int32_t first;  // where they begin among the rows of the head's pages, 2 * D numbers of 16 bits
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

  // Element of the page pool, in rows, at which the head's row `held` lies.
  __device__ __forceinline__ int64_t place(int held) const {
    return static_cast<int64_t>(head.page_id(held / head.block_size)) * head.block_size +
           held % head.block_size;
  }

  // The same of scores, T of a page.
  __device__ __forceinline__ int64_t score_place(int held) const {
    return static_cast<int64_t>(head.page_id(held / head.block_size)) * head.page_blocks *
               head.block_size +
           held % head.block_size;
  }
};

// Eight numbers of a sink that is stored as codes, in the first page of the head.
template <typename T>
__device__ __forceinline__ void load_coded_sink(const EchoParams& p, const EchoUnit& unit, int page,
                                                int sink, bool live, int head_size, int group,
                                                char* to) {
  float x[8] = {};
  if (live) {
    const int row = 4 * head_size;
    read_key_channels(unit.head,
                      static_cast<const char*>(p.pages) +
                          static_cast<int64_t>(page) * unit.head.block_size * row +
                          sink * (row / unit.head.page_blocks),
                      head_size, group, x);
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]),
                                             pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
}

__device__ __forceinline__ float* echo_partial(const EchoParams& p, int segment, int h, int split) {
  return p.partial +
         ((static_cast<int64_t>(segment) * p.num_heads + h) * p.splits + split) * p.max_segment;
}

// A sum of weights relative to the maximum `high`, with the learnt sink of a query head, which may
// become the maximum.
__device__ __forceinline__ float add_sink(const float* sinks, int g, float sum, float* high) {
  if (sinks == nullptr) return sum;
  const float old = *high, sink = __ldg(sinks + g) * kLog2E;
  *high = fmaxf(old, sink);
  return sum * rescale(old, *high) + rescale(sink, *high);
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
  static constexpr int kRows = 64, kGroupRows = 32;
  // Keys are held by parts of the head where whole ones would not fit every device.
  static constexpr int kPart = kHeadSize <= 128 ? kHeadSize : kHeadSize == 256 ? 64 : kHeadSize / 2;
  static constexpr int kParts = kHeadSize / kPart;
  static constexpr int kKeyStride = kPart * sizeof(T) + 16;  // odd in 16 bytes: no conflicts
  static constexpr int kQueryStride = kHeadSize * sizeof(T) + 16;
  static constexpr int kKeyWarps = 4;  // of a group, side by side over the keys
  static constexpr int kGroupThreads = kKeyWarps * kWarp;
  static constexpr int kThreads = kRows / kGroupRows * kGroupThreads;
  static constexpr int kQueries = kRows * kQueryStride;
  static constexpr int kStates = kKeyWarps * kRows * sizeof(float2);
  static constexpr int kShared = (kEchoKeys + kEchoSinks) * kKeyStride + kQueries + kStates;
  static_assert(kPart % 16 == 0 && kPart * kParts == kHeadSize);
  static_assert(kQueries >= 2 * kEchoKeys * sizeof(float));
  static_assert(kShared <= 97 << 10);  // what sm_86 has, less what is not dynamic
};

// row / group by a product: exact for rows up to 4,160 and groups up to 16.
struct EchoQuery {
  int inverse;
  __device__ __forceinline__ explicit EchoQuery(int group) : inverse((65535 + group) / group) {}
  __device__ __forceinline__ int operator()(int row) const { return row * inverse >> 16; }
};

// The 32 rows of the unit from `first` on, row i * G + g being query i of member g; by the threads
// of a group.
template <typename T, int kHeadSize>
__device__ __forceinline__ void load_echo_queries(const EchoParams& p, const EchoUnit& unit,
                                                  const EchoQuery& query_of, int h, int first,
                                                  int thread, char* shared) {
  using Shape = EchoShape<T, kHeadSize>;
  constexpr int kWords = kHeadSize * sizeof(T) / 16;
  const T* base = static_cast<const T*>(p.query) + unit.token * p.query_stride_t +
                  static_cast<int64_t>(h) * p.group * p.query_stride_h;
#pragma unroll 4
  for (int i = thread; i < Shape::kGroupRows * kWords; i += Shape::kGroupThreads) {
    const int local = i / kWords, word = i % kWords;
    const int row = first + local, query = query_of(row);
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

// Whether halves are turned eight pairs at once.
__device__ __forceinline__ bool turns_words(const EchoParams& p) {
  return !p.interleaved && p.pairs % 8 == 0;
}

// Where the rotation of a pair lies in shared memory: by words, the first two pairs of all words
// come first, so that neighbouring threads read neighbouring 16 bytes.
__device__ __forceinline__ int rotation_place(const EchoParams& p, int pair) {
  return turns_words(p) ? (pair % 8 / 2 * (p.pairs / 8) + pair / 8) * 2 + pair % 2 : pair;
}

// Turns the 32 queries in shared memory by the distance between reading and repetition; by the
// threads of a group.
template <typename T, int kHeadSize>
__device__ __forceinline__ void turn_queries(const EchoParams& p, const float2* rotation,
                                             int thread, char* shared) {
  using Shape = EchoShape<T, kHeadSize>;
  const int pairs = p.pairs;
  if (turns_words(p)) {
    const int words = pairs / 8;
    for (int i = thread; i < Shape::kGroupRows * words; i += Shape::kGroupThreads) {
      const int row = i / words, word = i - row * words;
      uint4* at = reinterpret_cast<uint4*>(shared + row * Shape::kQueryStride) + word;
      uint4 left = at[0], right = at[words];
      uint32_t *x = &left.x, *y = &right.x;
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const float4 by = reinterpret_cast<const float4*>(rotation)[d * words + word];
        const float2 first = unpack<T>(x[d]), second = unpack<T>(y[d]);
        const float2 a = turn(first.x, second.x, make_float2(by.x, by.y));
        const float2 b = turn(first.y, second.y, make_float2(by.z, by.w));
        x[d] = pack<T>(a.x, b.x);
        y[d] = pack<T>(a.y, b.y);
      }
      at[0] = left;
      at[words] = right;
    }
  } else if (p.interleaved) {
    for (int i = thread; i < Shape::kGroupRows * pairs; i += Shape::kGroupThreads) {
      const int row = i / pairs, pair = i - row * pairs;
      uint32_t* at = reinterpret_cast<uint32_t*>(shared + row * Shape::kQueryStride) + pair;
      const float2 x = unpack<T>(*at), y = turn(x.x, x.y, rotation[pair]);
      *at = pack<T>(y.x, y.y);
    }
  } else {
    for (int i = thread; i < Shape::kGroupRows * pairs; i += Shape::kGroupThreads) {
      const int row = i / pairs, pair = i - row * pairs;
      T* at = reinterpret_cast<T*>(shared + row * Shape::kQueryStride) + pair;
      const float2 y = turn(to_float(at[0]), to_float(at[pairs]), rotation[pair]);
      at[0] = from_float<T>(y.x);
      at[pairs] = from_float<T>(y.y);
    }
  }
}

// grid (S, H, splits). Warp w has rows 32 * (w / kKeyWarps) to + 32 of 64, and of every
// 16 * kKeyWarps keys 16: what causality leaves to do is then shared evenly.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(EchoShape<T, kHeadSize>::kThreads, 2) echo_kernel(EchoParams p) {
  using Shape = EchoShape<T, kHeadSize>;
  constexpr int kRows = Shape::kRows, kKeyStride = Shape::kKeyStride;
  constexpr int kQueryStride = Shape::kQueryStride;
  constexpr int kStride = 16 * Shape::kKeyWarps, kGroups = kEchoKeys / kStride;
  constexpr int kStep = kGroups / 4;  // groups of keys are taken by so many
  // Of the groups that are taken, those that can hold keys which some row does not see: rows of a
  // warp are of queries less than 32 apart.
  constexpr int kMasked = kGroups == 4 ? 1 : 3;
  constexpr int kMostPages = kEchoKeys / 8 + 1;  // blocks have eight tokens or more
  extern __shared__ __align__(16) char shared[];
  __shared__ int page_ids[kMostPages + 1];  // of the segment, then of the sinks
  __shared__ __align__(16) float2 rotation[kHeadSize / 2];
  char* keys = shared;
  float2* states = reinterpret_cast<float2*>(keys + (kEchoKeys + kEchoSinks) * kKeyStride);
  char* queries = reinterpret_cast<char*>(states) + Shape::kStates;
  // The same in all lanes, and the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const int row_warp = warp / Shape::kKeyWarps, key_warp = warp % Shape::kKeyWarps;
  const int thread = threadIdx.x % Shape::kGroupThreads;
  const int h = blockIdx.y, split = blockIdx.z;
  let_next_kernel_start();
  const EchoUnit unit(p, blockIdx.x, h);
  const EchoQuery query_of(p.group);
  const int n = unit.n, rows = n * p.group, tiles = ceil_div(max(rows, 0), kRows);
  if (n <= 0) return;

  const int shift = __ffs(unit.head.block_size) - 1, mask = unit.head.block_size - 1;
  const int first_page = unit.first >> shift;
  const int num_pages = ((unit.first + n - 1) >> shift) - first_page + 1;
  // Of this group: its place in shared memory, and its rows among the 64 of `tile`.
  char* own = queries + row_warp * Shape::kGroupRows * kQueryStride;
  const auto load_queries = [&](int tile) {
    load_echo_queries<T, kHeadSize>(p, unit, query_of, h,
                                    tile * kRows + row_warp * Shape::kGroupRows, thread, own);
    copy_async_commit();
  };
  if (split < tiles) load_queries(split);
  for (int i = threadIdx.x; i <= kMostPages; i += Shape::kThreads) {
    if (i < num_pages) page_ids[i] = unit.head.page_id(first_page + i);
    if (i == kMostPages) page_ids[i] = unit.head.page_id(0);
  }
  for (int i = threadIdx.x; i < p.pairs; i += Shape::kThreads) {
    rotation[rotation_place(p, i)] = p.rotation[i];
  }
  __syncthreads();

  const int padded = ceil_div(n, 16) * 16;
  const bool codes = unit.head.page_blocks > 1 && unit.head.packed > 0;  // of the sinks alone
  const auto load_keys = [&](int part) {
    constexpr int kWords = Shape::kPart * sizeof(T) / 16;
#pragma unroll 4
    for (int i = threadIdx.x; i < (padded + kEchoSinks) * kWords; i += Shape::kThreads) {
      const int slot = i / kWords, word = i % kWords, sink = slot - padded;
      const bool live = sink < 0 ? slot < n : sink < unit.sinks;
      if (sink >= 0 && codes) {
        load_coded_sink<T>(p, unit, page_ids[kMostPages], sink, live, kHeadSize,
                           part * Shape::kPart / 8 + word,
                           keys + (kEchoKeys + sink) * kKeyStride + word * 16);
        continue;
      }
      const int held = sink < 0 ? unit.first + slot : sink;
      int page = kMostPages;
      if (sink < 0) page = live ? (held >> shift) - first_page : 0;
      const int64_t place = static_cast<int64_t>(page_ids[page]) * (mask + 1) + (held & mask);
      copy_async(
          shared_address(keys + (sink < 0 ? slot : kEchoKeys + sink) * kKeyStride) + word * 16,
          static_cast<const T*>(p.pages) + place * 2 * kHeadSize + part * Shape::kPart + word * 8,
          live);
    }
    copy_async_commit();
  };
  // Groups have no memory in common but the keys, which stay unless they come by parts.
  const auto sync_group = [&] {
    if (Shape::kParts > 1) {
      __syncthreads();
    } else {
      sync_threads<Shape::kGroupThreads>(1 + row_warp);
    }
  };

  float x[kGroups][2][2][4];  // logits: 16 keys of each group in two tiles, 32 rows in two
  float sink_x[4];            // 16 rows, by the warps that have a `sink_tile`
  float top[kGroups][2][2];   // of the columns of x over all rows so far
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) top[j][i / 2][i % 2] = -kInfinity;
#pragma unroll
    for (int i = 0; i < 16; ++i) x[j][i / 8][i / 4 % 2][i % 4] = 0.f;
  }
  // Comparing logits before their product with the scale needs a positive one, and no cap.
  const float cap = p.logits.cap;
  const bool scaled = p.logits.factor <= 0.f || cap != 0.f;
  const float scale = scaled ? 1.f : p.logits.factor;
  const auto logit_of = [&](float product) {
    const float logit = product * p.logits.factor;
    return cap != 0.f ? soft_cap(logit, cap) : logit;
  };
  const auto local_row = [&](int m, int i) {
    return row_warp * Shape::kGroupRows + m * 16 + lane / 4 + i * 8;
  };
  const auto first_key = [&](int j) { return j * kStride + key_warp * 16 + lane % 4 * 2; };
  const uint32_t q_lane = shared_address(queries) +
                          (row_warp * Shape::kGroupRows + lane % 16) * kQueryStride +
                          lane / 16 * 16;
  const uint32_t k_lane = shared_address(keys) +
                          (key_warp * 16 + lane % 8 + lane / 16 * 8) * kKeyStride +
                          lane / 8 % 2 * 16;
  const uint32_t sink_lane =
      shared_address(keys) + (kEchoKeys + lane % 8) * kKeyStride + lane / 8 % 2 * 16;
  // Calls f with the number of groups before `limit`, made a whole number of steps. Everything
  // behind it is free of branches, so that loads run ahead and exponentials overlap.
  const auto with_groups = [&](int limit, auto&& f) {
    switch ((limit - key_warp * 16 + kStride * kStep - 1) / (kStride * kStep)) {
      case 4:
        return f(std::integral_constant<int, 4 * kStep>{});
      case 3:
        return f(std::integral_constant<int, 3 * kStep>{});
      case 2:
        return f(std::integral_constant<int, 2 * kStep>{});
      default:
        return f(std::integral_constant<int, kStep>{});
    }
  };
  const auto multiply = [&](auto active, uint32_t q, int part) {
    constexpr int kActive = decltype(active)::value;
    if (part == 0) {
#pragma unroll
      for (int j = 0; j < kActive; ++j) {
#pragma unroll
        for (int i = 0; i < 16; ++i) x[j][i / 8][i / 4 % 2][i % 4] = 0.f;
      }
    }
#pragma unroll
    for (int k = 0; k < Shape::kPart / 16; ++k) {
      uint32_t a[2][4];
      load_tiles(a[0], q + k * 32);
      load_tiles(a[1], q + k * 32 + 16 * kQueryStride);
#pragma unroll
      for (int j = 0; j < kActive; ++j) {
        uint32_t b[4];
        load_tiles(b, k_lane + j * kStride * kKeyStride + k * 32);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(x[j][m][0], a[m], b[0], b[1]);
          multiply_add<T>(x[j][m][1], a[m], b[2], b[3]);
        }
      }
    }
  };
  // Adds the logits to the maximum and the sum of every row; sums are of this lane alone. Two of
  // either per row, so that eight chains of dependent operations run side by side.
  float2 state[2][2];
  const auto accumulate = [&](auto active, bool masked, bool with_sinks, const int (&seen)[2][2]) {
    constexpr int kActive = decltype(active)::value;
    if (scaled) {
#pragma unroll
      for (int j = 0; j < kActive; ++j) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          float& logit = x[j][i / 8][i / 4 % 2][i % 4];
          logit = logit_of(logit);
        }
      }
    }
    if (masked) {
#pragma unroll
      for (int j = kActive > kMasked ? kActive - kMasked : 0; j < kActive; ++j) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int key = first_key(j) + i / 4 % 2 * 8 + i % 2;
          float& logit = x[j][i / 8][i / 4 % 2][i % 4];
          logit = key <= seen[i / 8][i % 4 / 2] ? logit : -kInfinity;
        }
      }
    }
    float sinks[2][2][2], high[2][2][2], sum[2][2][2];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool mine = with_sinks && key_warp == i / 4 && lane % 4 * 2 + i % 2 < unit.sinks;
      const float logit = scaled ? logit_of(sink_x[i % 4]) : sink_x[i % 4];
      sinks[i / 4][i / 2 % 2][i % 2] = mine ? logit : -kInfinity;
      high[i / 4][i / 2 % 2][i % 2] = sinks[i / 4][i / 2 % 2][i % 2];
    }
#pragma unroll
    for (int j = 0; j < kActive; ++j) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& best = high[i / 8][i % 4 / 2][i % 2];
        best = fmaxf(best, x[j][i / 8][i / 4 % 2][i % 4]);
      }
    }
    float origin[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2& own = state[i / 2][i % 2];
      float best = lanes_max<2, 1>(fmaxf(high[i / 2][i % 2][0], high[i / 2][i % 2][1])) * scale;
      best = fmaxf(best, own.x);
      origin[i / 2][i % 2] = best == -kInfinity ? 0.f : best;
      sum[i / 2][i % 2][0] = own.y * exp2_fast(own.x - origin[i / 2][i % 2]);
      sum[i / 2][i % 2][1] = 0.f;
      own.x = best;
    }
    if (with_sinks) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum[i / 4][i / 2 % 2][i % 2] +=
            exp2_fast(sinks[i / 4][i / 2 % 2][i % 2] * scale - origin[i / 4][i / 2 % 2]);
      }
    }
#pragma unroll
    for (int j = 0; j < kActive; ++j) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        sum[i / 8][i % 4 / 2][i % 2] +=
            exp2_fast(x[j][i / 8][i / 4 % 2][i % 4] * scale - origin[i / 8][i % 4 / 2]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      state[i / 2][i % 2].y = sum[i / 2][i % 2][0] + sum[i / 2][i % 2][1];
    }
  };

  const float* sinks = p.logits.of_head(h, p.group);
  if (Shape::kParts == 1) {
    load_keys(0);
    copy_async_wait<0>();
    __syncthreads();
  }
  for (int tile = split; tile < tiles; tile += p.splits) {
    copy_async_wait<0>();
    sync_group();
    const int next = tile + p.splits, row = tile * kRows;
#pragma unroll
    for (int i = 0; i < 4; ++i) state[i / 2][i % 2] = make_float2(-kInfinity, 0.f);

    // First reading, of the keys up to the query; then the repetition, of the sinks and the whole
    // segment.
#pragma unroll 1
    for (int reading = 0; reading < 2; ++reading) {
      int limit = n, seen[2][2];
      if (reading == 0) {
        const int last = query_of(row + (row_warp + 1) * Shape::kGroupRows - 1);
        limit = min(last, n - 1) + 1;
      } else {
        sync_group();
        turn_queries<T, kHeadSize>(p, rotation, thread, own);
        sync_group();
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        seen[i / 2][i % 2] = reading == 0 ? query_of(row + local_row(i / 2, i % 2)) : n - 1;
      }
      const bool with_sinks = reading == 1 && key_warp < 2;  // for 16 rows each
#pragma unroll
      for (int i = 0; i < 4; ++i) sink_x[i] = 0.f;
      for (int part = 0; part < Shape::kParts; ++part) {
        if (Shape::kParts > 1) {
          __syncthreads();
          load_keys(part);
          copy_async_wait<0>();
          __syncthreads();
        }
        const uint32_t at = q_lane + part * Shape::kPart * sizeof(T);
        if (with_sinks) {
#pragma unroll
          for (int k = 0; k < Shape::kPart / 16; ++k) {
            uint32_t a[4], b[4];
            load_tiles(a, at + key_warp * 16 * kQueryStride + k * 32);
            load_tiles(b, sink_lane + k * 32);
            multiply_add<T>(sink_x, a, b[0], b[1]);
          }
        }
        if (Shape::kParts > 1) {
          with_groups(limit, [&](auto active) { multiply(active, at, part); });
        }
      }
      with_groups(limit, [&](auto active) {
        if (Shape::kParts == 1) multiply(active, q_lane, 0);
        accumulate(active, reading == 0 || n < kEchoKeys, with_sinks, seen);
      });
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 mine = state[i / 2][i % 2];
      mine.y = lanes_sum<2, 1>(mine.y);
      if (lane % 4 == 0) states[key_warp * kRows + local_row(i / 2, i % 2)] = mine;
    }
    sync_group();
    if (next < tiles) load_queries(next);
    float total[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int local = local_row(i / 2, i % 2);
      const bool live = row + local < rows;
      float high = -kInfinity, sum = 0.f;
#pragma unroll
      for (int w = 0; w < Shape::kKeyWarps; ++w) high = fmaxf(high, states[w * kRows + local].x);
#pragma unroll
      for (int w = 0; w < Shape::kKeyWarps; ++w) {
        const float2 other = states[w * kRows + local];
        sum += other.y * rescale(other.x, high);
      }
      if (live) sum = add_sink(sinks, (row + local) - query_of(row + local) * p.group, sum, &high);
      // Rows without a query raise nothing.
      total[i / 2][i % 2] = live ? high + __log2f(sum) : kInfinity;
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& best = top[j][i / 4 % 2][i % 2];
        best = max_nan(best, x[j][i / 8][i / 4 % 2][i % 4] * scale - total[i / 8][i % 4 / 2]);
      }
    }
  }

  copy_async_wait<0>();
  __syncthreads();
  float* columns = reinterpret_cast<float*>(queries);  // [2, kEchoKeys]
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float best = top[j][c / 2][c % 2];
#pragma unroll
      for (int i = 16; i >= 4; i /= 2) best = max_nan(best, __shfl_xor_sync(kAllLanes, best, i));
      if (lane < 4) columns[row_warp * kEchoKeys + first_key(j) + c / 2 * 8 + c % 2] = best;
    }
  }
  __syncthreads();
  for (int key = threadIdx.x; key < n; key += Shape::kThreads) {
    echo_partial(p, blockIdx.x, h, split)[key] = max_nan(columns[key], columns[kEchoKeys + key]);
  }
}

// fp32, in plain arithmetic: a thread has one key, a block eight rows at a time. grid (S, H,
// splits). Shared memory: the eight rows as read, then as repeated.
template <int kRows>
__global__ void __launch_bounds__(kEchoPlainThreads)
    echo_plain_kernel(EchoParams p, int head_size) {
  constexpr int kWarps = kEchoPlainThreads / kWarp;
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
  const auto logit_of = [&](float product) {
    const float logit = product * p.logits.factor;
    return p.logits.cap != 0.f ? soft_cap(logit, p.logits.cap) : logit;
  };
  const float* sinks = p.logits.of_head(h, p.group);
  float top = -kInfinity;
  for (int first = split * kRows; first < rows; first += p.splits * kRows) {
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * head_size; i += kEchoPlainThreads) {
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
      past[r] = seen ? logit_of(past[r]) : -kInfinity;
      echo[r] = key < n ? logit_of(echo[r]) : -kInfinity;
      sink[r] = key < unit.sinks ? logit_of(sink[r]) : -kInfinity;
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
      if (first + r < rows) {
        sum = add_sink(sinks, (first + r) % p.group, sum, &highest[r]);
        top = max_nan(top, echo[r] - (highest[r] + __log2f(sum)));
      }
    }
  }
  if (key < n) echo_partial(p, blockIdx.x, h, split)[key] = top;
}

// grid (S * H). Launched before the kernel in front of it has ended.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) echo_combine_kernel(EchoParams p) {
  const int segment = blockIdx.x / p.num_heads, h = blockIdx.x % p.num_heads;
  wait_for_kernel_before();
  const EchoUnit unit(p, segment, h);
  for (int key = threadIdx.x; key < unit.n; key += kThreads) {
    const float* from = echo_partial(p, segment, h, 0) + key;
    float top = from[0];
    for (int i = 1; i < p.splits; ++i) top = max_nan(top, from[i * p.max_segment]);
    p.scores[unit.score_place(unit.first + key)] = exp2f(top);
  }
}

}  // namespace kvc::gpu
