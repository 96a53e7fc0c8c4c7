// SPDX-License-Identifier: Apache-2.0
// A tile of keys of a head whose packed pages hold codes, in shared memory as if they were 16 bit.
// For statistics, whose arithmetic, not memory, takes the time.
#pragma once

#include "code_tile.cuh"
#include "page_cursor.cuh"

namespace kvc::gpu {

// What eight codes of a packed key stand for: those of places [8 * group, 8 * group + 8) of K or,
// behind them, of V.
template <typename T, int kHeadSize, int kFormat>
class CodeGroup {
 public:
  static constexpr int kGroups = kHeadSize / 8;  // of K, and as many of V

  __device__ __forceinline__ CodeGroup(const uint16_t* scales, int group)
      : values_(group >= kGroups), place_(group % kGroups * 8) {
    if (scales == nullptr) return;  // there are no codes
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (kFormat == kFp8) {
        scale_[i] = scale_float(__ldg(scales + values_));
        zero_[i] = 0.f;
      } else {
        const int at = values_ * kHeadSize + channel(i);
        scale_[i] = scale_float(__ldg(scales + at));
        zero_[i] = scale_float(__ldg(scales + 2 * kHeadSize + at));
      }
    }
  }

  // Of the key at `key`, f(channel, x), channels counted within K or V.
  template <typename F>
  __device__ __forceinline__ void each(const char* key, F&& f) const {
    const char* from = key + values_ * key_bytes(kFormat, kHeadSize) / 2;
    constexpr int kBits = 16 >> kFormat, kPerWord = 32 / kBits;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from) + place_ / kPerWord;
#pragma unroll
    for (int w = 0; w < 8 / kPerWord; ++w) {
      const uint32_t word = __ldg(words + w);
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        const int i = w * kPerWord + j;
        const uint32_t code = word >> j * kBits & ((1u << kBits) - 1);
        f(channel(i),
          kFormat == kFp8 ? decode_fp8(code) * scale_[i] : decode_int4(code, zero_[i], scale_[i]));
      }
    }
  }

 private:
  __device__ __forceinline__ int channel(int i) const {
    return values_ ? value_channel(kHeadSize, place_ + i)
                   : key_channel(kFormat, kHeadSize, place_ + i);
  }

  bool values_;
  int place_;
  float scale_[8], zero_[8];
};

// Channels [8 * group, 8 * group + 8) of K of the packed key at `key`, in fp32. Those of a word lie
// in four chunks, a word from each.
template <int kFormat>
__device__ __forceinline__ void read_key_channels(const char* key, const uint16_t* scales,
                                                  int head_size, int group, float* x) {
  constexpr int kBits = 16 >> kFormat, kPairs = 16 / kBits;
  const int chunk = key_bytes(kFormat, head_size) / 8;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const uint32_t word =
        __ldg(reinterpret_cast<const uint32_t*>(key + c * chunk) + group / kPairs) >>
        group % kPairs * kBits;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t code = word >> 16 * b & ((1u << kBits) - 1);
      const int channel = group * 8 + c * 2 + b;
      if constexpr (kFormat == kFp8) {
        x[c * 2 + b] = decode_fp8(code) * scale_float(__ldg(scales));
      } else {
        x[c * 2 + b] = decode_int4(code, scale_float(__ldg(scales + 2 * head_size + channel)),
                                   scale_float(__ldg(scales + channel)));
      }
    }
  }
}
// The same of K itself, which int4 has rotated: slow, for few keys.
__device__ __forceinline__ void read_key_channels(const HeadPages& head, const char* key,
                                                  int head_size, int group, float* x) {
  if (head.page_blocks == blocks_per_page(kFp8)) {
    read_key_channels<kFp8>(key, head.scales, head_size, group, x);
    return;
  }
  const int groups = rotated_together(head_size) / 8, mine = group % groups;
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = 0.f;
#pragma unroll 1
  for (int other = 0; other < groups; ++other) {
    float y[8];
    read_key_channels<kInt4>(key, head.scales, head_size, group - mine + other, y);
    rotate_registers<8, 1, 8>(y);
    const bool negative = __popc(mine & other) & 1;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += negative ? -y[i] : y[i];
  }
}

// K of packed keys of int4, turned back by a warp: lane i holds channels i, i + 32, ...
template <int kHeadSize>
class TurnedCodes {
 public:
  static constexpr int kCount = kHeadSize / kWarp;

  __device__ __forceinline__ explicit TurnedCodes(const uint16_t* scales) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int channel = i * kWarp + lane;
      scale_[i] = scale_float(__ldg(scales + channel));
      zero_[i] = scale_float(__ldg(scales + 2 * kHeadSize + channel));
      place_[i] = key_place(kInt4, kHeadSize, channel);
    }
  }

  // All lanes of the warp, of the same key.
  __device__ __forceinline__ void read(const char* key, float (&x)[kCount]) const {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(key);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t code = __ldg(words + place_[i] / 8) >> place_[i] % 8 * 4 & 15;
      x[i] = decode_int4(code, zero_[i], scale_[i]);
#pragma unroll
      for (int bit = 1; bit < kWarp; bit *= 2) x[i] = rotate_lanes(x[i], bit);
    }
    rotate_registers<kCount, 1, rotated_together(kHeadSize) / kWarp>(x);
  }

 private:
  float scale_[kCount], zero_[kCount];
  int place_[kCount];
};

// K of keys [first, first + kKeys) into rows of kStride bytes; rows from num_keys on become zero.
// All threads of the block take part; visible to all after a barrier.
template <typename T, int kHeadSize, int kKeys, int kStride, int kThreads>
__device__ __forceinline__ void load_mixed_tile(char* shared, const char* pages,
                                                const HeadPages& head, int first, int num_keys) {
  constexpr int kWarps = kThreads / kWarp, kRows = kKeys / kWarps, kPair = 4 * kHeadSize;
  constexpr int kGroups = kHeadSize / 8;
  static_assert(kKeys % kWarps == 0 && kRows <= kWarp && kGroups <= kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int format = head.page_blocks == blocks_per_page(kFp8) ? kFp8 : kInt4;
  if (format == kFp8 && first + kKeys <= min(head.packed_keys(), num_keys)) {
    CodeTile<T, kHeadSize, kFp8, kKeys, kStride, kThreads, false> tile(head, pages);
    tile.locate(first);
    tile.fetch();
    tile.store_scaled(shared, __ldg(head.scales));
    return;
  }
  char* rows = shared + warp * kRows * kStride;
  // Lane i finds where key i of the warp's is: 0 none, the last bit tells codes.
  const char* from = nullptr;
  const int key = first + warp * kRows + lane;
  if (lane < kRows && key < num_keys) {
    const HeadPages::Place place = head.place(key);
    const bool codes = key < head.packed_keys();
    from = pages + static_cast<int64_t>(head.page_id(place.page)) * head.block_size * kPair +
           place.within * (codes ? kPair / head.page_blocks : kPair) + codes;
  }
  const uint64_t address = reinterpret_cast<uint64_t>(from);
  const auto load = [&](auto of) {
    constexpr int kFormat = decltype(of)::value;
    if constexpr (kFormat == kInt4) {
      if (head.packed > 0) {
        const TurnedCodes<kHeadSize> codes(head.scales);
#pragma unroll 2
        for (int i = 0; i < kRows; ++i) {
          const uint64_t at = __shfl_sync(kAllLanes, address, i);
          if (!(at & 1)) continue;
          float x[TurnedCodes<kHeadSize>::kCount];
          codes.read(reinterpret_cast<const char*>(at - 1), x);
          T* to = reinterpret_cast<T*>(rows + i * kStride) + lane;
#pragma unroll
          for (int c = 0; c < kHeadSize / kWarp; ++c) to[c * kWarp] = from_float<T>(x[c]);
        }
      }
    }
    const bool live = lane < kGroups;
    const bool any = kFormat == kFp8 && head.packed > 0 && live;
    const CodeGroup<T, kHeadSize, kFp8> codes(any ? head.scales : nullptr, any ? lane : 0);
#pragma unroll 2
    for (int i = 0; i < kRows; ++i) {
      const uint64_t at = __shfl_sync(kAllLanes, address, i);
      if (!live) continue;
      char* row = rows + i * kStride;
      if (at & 1) {
        if constexpr (kFormat == kInt4) continue;
        T* to = reinterpret_cast<T*>(row);
        codes.each(reinterpret_cast<const char*>(at - 1),
                   [&](int channel, float x) { to[channel] = from_float<T>(x); });
      } else {
        uint4 word = make_uint4(0, 0, 0, 0);
        if (at != 0) word = __ldg(reinterpret_cast<const uint4*>(at) + lane);
        *reinterpret_cast<uint4*>(row + lane * 16) = word;
      }
    }
  };
  if (format == kFp8) {
    load(std::integral_constant<int, kFp8>{});
  } else if constexpr (kHeadSize % 32 == 0) {
    load(std::integral_constant<int, kInt4>{});
  }
}

}  // namespace kvc::gpu
