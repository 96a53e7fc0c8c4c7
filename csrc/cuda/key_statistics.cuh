// SPDX-License-Identifier: Apache-2.0
// key_statistics: norms of keys, and their cosines to the mean direction of their head. Two passes
// over K: the first sums up the directions of a share of the keys, the second adds those sums up
// and holds every candidate against them. For norms of values the second runs over V.
#pragma once

#include "../channels.h"
#include "mixed_tile.cuh"

namespace kvc::gpu {

struct KeyStatisticsParams {
  PagedRows rows;
  const uint4* pages;          // [P, B, 2 * D], or D further on: of values
  const int32_t* new_covered;  // [R]
  const int64_t* page_start;   // [R]
  float* partial;              // [R, L * H, splits, D] sums of directions; kLikeness alone
  float* out;                  // [selected channels, candidates, B]
  int64_t candidates;          // candidate pages
  uint32_t channels;           // bit mask of Channel
  bool values;                 // of V: `pages` begins D further on
};

// 1 / |k| from |k|^2; a key without length has no direction and counts nowhere.
__device__ __forceinline__ float inverse_norm(float square) {
  return square > 0.f ? rsqrtf(square) : 0.f;
}

template <typename T, int kHeadSize>
struct KeyStatisticsShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kPerWord = 16 / sizeof(T);      // numbers in a word of 16 bytes
  static constexpr int kWords = kHeadSize / kPerWord;  // words of a key
  static constexpr int kLanes = 8;                     // share a key: 128 bytes at a time
  static constexpr int kSteps = ceil_div(kWords, kLanes);
  static constexpr int kSide = kWarp / kLanes;  // keys side by side
  // Rounds of them that are loaded before the arithmetic: 4 to 8 words per lane are on their way.
  static constexpr int kRounds = kSteps == 1 ? 4 : 8 / kSteps;
  static constexpr int kKeys = kSide * kRounds;  // of a warp at once: a tile
};

// One warp's walk over a share of the keys of a head: key i * kSide + lane / kLanes of a tile is
// spread over kLanes lanes, words kLanes apart.
// kCodes: packed pages hold codes.
template <typename T, int kHeadSize, bool kCodes>
class KeyWalk {
 public:
  using Shape = KeyStatisticsShape<T, kHeadSize>;
  static constexpr int kPerWord = Shape::kPerWord, kSteps = Shape::kSteps;

  // Keys [0, end) of the head, of which this warp takes one of gridDim.x * kWarps shares.
  __device__ __forceinline__ KeyWalk(const KeyStatisticsParams& p, const HeadPages& head, int end)
      : pages_(p.pages), head_(head), values_(p.values), end_(end) {
    const int tiles = ceil_div(max(end, 0), Shape::kKeys);
    const int shares = gridDim.x * Shape::kWarps;
    const int share = ceil_div(tiles, shares);
    tile_ = min(static_cast<int>(blockIdx.x * Shape::kWarps + threadIdx.x / kWarp) * share, tiles);
    last_ = min(tile_ + share, tiles);
    ids_.reset(head, end);
  }

  // Calls f(round, x) for every key of this lane's group; x [kSteps * kPerWord] are the lane's
  // numbers of the key, zeros behind the last key. Calls tile(first key) after each tile.
  template <typename F, typename G>
  __device__ __forceinline__ void run(F&& f, G&& tile) {
    for (; tile_ < last_; ++tile_) {
      uint4 words[Shape::kRounds][kSteps];
      if constexpr (!kCodes) load(words);
#pragma unroll
      for (int i = 0; i < Shape::kRounds; ++i) {
        float x[kSteps * kPerWord];
        if constexpr (kCodes) {
          read(tile_ * Shape::kKeys + i * Shape::kSide, x);
        } else {
#pragma unroll
          for (int s = 0; s < kSteps; ++s) unpack<T>(words[i][s], x + s * kPerWord);
        }
        f(i, x);
      }
      tile(tile_ * Shape::kKeys);
    }
  }

 private:
  // The numbers of this lane of key `first` + lane / kLanes, codes or not. Of values the length
  // alone matters: neither the order of channels, nor a rotation but by what it makes longer.
  __device__ __forceinline__ void read(int first, float* x) const {
    const int lane = threadIdx.x % kWarp, key = first + lane / Shape::kLanes;
    const bool coded = key < head_.packed_keys();
    const HeadPages::Place place = head_.place(min(key, max(end_ - 1, 0)));
    constexpr int kRow = 2 * Shape::kWords * 16, kTogether = rotated_together(kHeadSize);
    const char* page = reinterpret_cast<const char*>(pages_ - values_ * Shape::kWords) +
                       static_cast<int64_t>(head_.page_id(place.page)) * head_.block_size * kRow;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int word = s * Shape::kLanes + lane % Shape::kLanes;
      float* numbers = x + s * kPerWord;
      if (key >= end_ || word >= Shape::kWords) {
        unpack<T>(make_uint4(0, 0, 0, 0), numbers);
      } else if (!coded) {
        unpack<T>(__ldg(reinterpret_cast<const uint4*>(page + place.within * kRow) +
                        values_ * Shape::kWords + word),
                  numbers);
      } else {
        const char* codes = page + place.within * (kRow / head_.page_blocks);
        const bool fp8 = head_.page_blocks == blocks_per_page(kFp8);
        if (values_ && fp8) {
          read_values<kFp8>(codes, word, numbers);
        } else if (fp8) {
          read_key_channels<kFp8>(codes, head_.scales, kHeadSize, word, numbers);
        } else if constexpr (kHeadSize % 32 == 0) {
          if (values_) {
            read_values<kInt4>(codes, word, numbers);
#pragma unroll
            for (int i = 0; i < kPerWord; ++i) numbers[i] *= sqrtf(kTogether);
          } else {
            read_key_channels<kInt4>(codes, head_.scales, kHeadSize, word, numbers);
          }
        }
      }
    }
    if constexpr (kHeadSize % 32 == 0) {
      if (values_ || head_.page_blocks != blocks_per_page(kInt4)) return;
      // Channel bits 0 to 2 are a number's of its word, 3 to 5 the lane's, further ones the step's.
      constexpr int kCount = kSteps * kPerWord;
      float turned[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) turned[i] = x[i];
      rotate_registers<kCount, 1, 8>(turned);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int bit = 1; bit < kTogether / 8 && bit < Shape::kLanes; bit *= 2) {
          turned[i] = rotate_lanes(turned[i], bit);
        }
      }
      rotate_registers<kCount, 8, kTogether / 8>(turned);
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = coded ? turned[i] : x[i];
    }
  }
  template <int kFormat>
  __device__ __forceinline__ void read_values(const char* codes, int word, float* x) const {
    const CodeGroup<T, kHeadSize, kFormat> group(head_.scales, kHeadSize / 8 + word);
    int i = 0;
    group.each(codes, [&](int, float value) { x[i++] = value; });
  }

  __device__ __forceinline__ void load(uint4 (&words)[Shape::kRounds][kSteps]) {
    const int lane = threadIdx.x % kWarp, first = tile_ * Shape::kKeys;
    const int shift = __ffs(head_.block_size) - 1, mask = head_.block_size - 1;
    ids_.prepare(head_, first >> shift, ceil_div(Shape::kKeys, head_.block_size));
#pragma unroll
    for (int i = 0; i < Shape::kRounds; ++i) {
      const int key = first + i * Shape::kSide + lane / Shape::kLanes;
      const int64_t place = (static_cast<int64_t>(ids_.get(key >> shift)) << shift) + (key & mask);
      const uint4* from = pages_ + place * (2 * Shape::kWords);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int word = s * Shape::kLanes + lane % Shape::kLanes;
        const bool live = key < end_ && word < Shape::kWords;
        words[i][s] = live ? __ldg(from + word) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  const uint4* pages_;
  HeadPages head_;
  PageIds ids_;
  bool values_;
  int end_, tile_, last_;
};

// x . y of vectors that kLanes lanes share, `kCount` numbers each; all of them get it.
template <int kLanes, int kCount>
__device__ __forceinline__ float shared_dot(const float (&x)[kCount], const float (&y)[kCount]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += x[i] * y[i];
  return lanes_sum<kLanes / 2, 1>(sum);
}

// grid (splits, L * H, R). Every sum is taken in an order that depends on the grid alone.
template <typename T, int kHeadSize, bool kCodes>
__global__ void __launch_bounds__(KeyStatisticsShape<T, kHeadSize>::kThreads)
    sum_directions_kernel(KeyStatisticsParams p) {
  using Shape = KeyStatisticsShape<T, kHeadSize>;
  constexpr int kCount = Shape::kSteps * Shape::kPerWord;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const HeadPages head = head_pages(p.rows, blockIdx.z, blockIdx.y);
  float sums[kCount] = {};
  KeyWalk<T, kHeadSize, kCodes>(p, head, head.num_keys(p.rows.seq_lens[blockIdx.z]))
      .run(
          [&](int, const float (&x)[kCount]) {
            const float weight = inverse_norm(shared_dot<Shape::kLanes>(x, x));
#pragma unroll
            for (int i = 0; i < kCount; ++i) sums[i] += x[i] * weight;
          },
          [](int) {});
  __shared__ float of_warps[Shape::kWarps][kHeadSize];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float sum = lanes_sum<kWarp / 2, Shape::kLanes>(sums[i]);
    const int word = i / Shape::kPerWord * Shape::kLanes + lane;
    if (lane < Shape::kLanes && word < Shape::kWords) {
      of_warps[warp][word * Shape::kPerWord + i % Shape::kPerWord] = sum;
    }
  }
  __syncthreads();
  float* partial =
      p.partial +
      ((static_cast<int64_t>(blockIdx.z) * p.rows.slots + blockIdx.y) * gridDim.x + blockIdx.x) *
          kHeadSize;
  for (int d = threadIdx.x; d < kHeadSize; d += Shape::kThreads) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) sum += of_warps[w][d];
    partial[d] = sum;
  }
}

// grid as above.
template <typename T, int kHeadSize, bool kCodes>
__global__ void __launch_bounds__(KeyStatisticsShape<T, kHeadSize>::kThreads)
    key_statistics_kernel(KeyStatisticsParams p) {
  using Shape = KeyStatisticsShape<T, kHeadSize>;
  constexpr int kCount = Shape::kSteps * Shape::kPerWord, kLanes = Shape::kLanes;
  const int lane = threadIdx.x % kWarp;
  const HeadPages head = head_pages(p.rows, blockIdx.z, blockIdx.y);
  const int new_covered = p.new_covered[blockIdx.z];
  const int num_keys = head.num_keys(p.rows.seq_lens[blockIdx.z]);
  const int counted = min(head.candidate_pages(new_covered) * head.block_size, num_keys);
  const bool norms = p.channels >> kNorm & 1, likeness = p.channels >> kLikeness & 1;

  // The mean direction, of which every lane holds what it holds of a key.
  float mean[kCount] = {};
  if (likeness) {
    __shared__ float sums[kHeadSize];
    const float* partial =
        p.partial +
        (static_cast<int64_t>(blockIdx.z) * p.rows.slots + blockIdx.y) * gridDim.x * kHeadSize;
    for (int d = threadIdx.x; d < kHeadSize; d += Shape::kThreads) {
      float sum = 0.f;
#pragma unroll 4
      for (int s = 0; s < gridDim.x; ++s) sum += __ldg(partial + s * kHeadSize + d);
      sums[d] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int word = i / Shape::kPerWord * kLanes + lane % kLanes;
      if (word < Shape::kWords) mean[i] = sums[word * Shape::kPerWord + i % Shape::kPerWord];
    }
    const float scale = inverse_norm(shared_dot<kLanes>(mean, mean));
#pragma unroll
    for (int i = 0; i < kCount; ++i) mean[i] *= scale;
  }

  const int64_t first_place = (p.page_start[blockIdx.z] + head.first_candidate(new_covered)) *
                              static_cast<int64_t>(head.block_size);
  const int64_t plane = p.candidates * head.block_size;
  // Lane i of a group keeps what came out in round i, so that a tile is written at once.
  float norm = 0.f, cosine = 0.f;
  KeyWalk<T, kHeadSize, kCodes>(p, head, counted)
      .run(
          [&](int round, const float (&x)[kCount]) {
            const float square = shared_dot<kLanes>(x, x);
            const float along = shared_dot<kLanes>(x, mean);
            if (lane % kLanes == round) {
              norm = sqrtf(square);
              cosine = along * inverse_norm(square);
            }
          },
          [&](int first) {
            const int key = first + lane % kLanes * Shape::kSide + lane / kLanes;
            const int64_t place = first_place + key;
            if (lane % kLanes >= Shape::kRounds || key >= counted || place >= plane) return;
            if (norms) p.out[place] = norm;
            if (likeness) p.out[(norms ? plane : 0) + place] = cosine;
          });
}

}  // namespace kvc::gpu
