// SPDX-License-Identifier: Apache-2.0
// Keys of packed pages that hold codes, in shared memory as 16-bit numbers: what codes stand for
// before scale and zero (Unpack). For kernels that use a tile often; decode, which does not, takes
// codes apart in registers.
#pragma once

#include "../paged_layout.h"
#include "codes.cuh"

namespace kvc::gpu {

// Codes of a tile travel through registers: the next tile's are on their way while this one is
// computed with, and so are the page ids of the one behind it.
//
// Four words of codes become kUnit = 8 kPairs channels in their order, for K and V alike, since
// word c of K is from chunk c, and word c of V from chunks 2 c and 2 c + 1, two bytes each:
//
//   word 0  word 1  word 2  word 3              pair j of each: channels of unit u
//   [p1 p0] [p1 p0] [p1 p0] [p1 p0]   kPairs=2  kUnit u + 8 j + {0 1} {2 3} {4 5} {6 7}
//
// kValues: of K and V, else of K.
template <typename T, int kHeadSize, int kFormat, int kKeys, int kStride, int kThreads,
          bool kValues>
class CodeTile {
 public:
  __device__ __forceinline__ CodeTile(const HeadPages& head, const char* pages)
      : head_(head), pages_(pages), values_(kValues && threadIdx.x >= kPart) {}

  // Looks up where keys [first, first + kKeys) are, first a multiple of kKeys; those from
  // packed_keys() on count as the last.
  __device__ __forceinline__ void locate(int first) {
    const int shift = __ffs(head_.block_size * blocks_per_page(kFormat)) - 1;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int key = min(first + item(s) / kPerKey, head_.packed_keys() - 1);
      within_[s] = key & ((1 << shift) - 1);
      if (kOnePage && s > 0) continue;
      // Not page_id(), which would wait for the block.
      const HeadPages::PackedPage page = head_.packed_page(key >> shift);
      block_[s] = __ldg(head_.row + page.block);
      slot_[s] = page.slot;
    }
  }

  // Starts to read the keys that were located.
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (!live(s)) continue;
      const int at = kOnePage ? 0 : s;
      const int64_t page = static_cast<int64_t>(block_[at]) * head_.slots + slot_[at];
      const int unit = item(s) % kPerKey * kWide;
      const char* from = pages_ + page * head_.block_size * (4 * kHeadSize) +
                         within_[s] * key_bytes(kFormat, kHeadSize);
      if (values_) {
        from += key_bytes(kFormat, kHeadSize) / 2 + unit * 2;
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          if constexpr (kWide == 2) {
            words_[s][r] = __ldg(reinterpret_cast<const uint32_t*>(from + r * kValueChunk));
          } else {
            words_[s][r] = __ldg(reinterpret_cast<const uint16_t*>(from + r * kValueChunk));
          }
        }
      } else {
        from += unit * 4;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if constexpr (kWide == 2) {
            const uint2 both = __ldg(reinterpret_cast<const uint2*>(from + c * kKeyChunk));
            words_[s][c] = both.x;
            words_[s][4 + c] = both.y;
          } else {
            words_[s][c] = __ldg(reinterpret_cast<const uint32_t*>(from + c * kKeyChunk));
          }
        }
      }
    }
  }

  // Writes them to rows of kStride bytes; visible to all after a barrier.
  __device__ __forceinline__ void store(char* rows) const {
    store(rows, [](uint32_t pair) { return pair; });
  }
  // The same of fp8, times the scale of K: what the codes stand for.
  __device__ __forceinline__ void store_scaled(char* rows, uint16_t scale) const {
    static_assert(kFormat == kFp8 && !kValues);
    store(rows, [&](uint32_t pair) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return multiply_pair<T>(pair, scale | static_cast<uint32_t>(scale) << 16);
      } else {
        const float2 x = pair_floats(pair, T{});
        const float factor = scale_float(scale) * Code::kFactor;
        return pack<T>(x.x * factor, x.y * factor);
      }
    });
  }

 private:
  using Code = Unpack<T, kFormat>;
  static constexpr int kUnit = 8 * Code::kPairs, kUnits = kHeadSize / kUnit;
  static constexpr int kWide = kFormat == kFp8 && kUnits % 2 == 0 ? 2 : 1;  // units of a thread
  static constexpr int kPerKey = kUnits / kWide, kItems = kKeys * kPerKey;
  static constexpr int kPart = kValues ? kThreads / 2 : kThreads;  // threads of K, then of V
  static constexpr int kSteps = ceil_div(kItems, kPart);
  static constexpr int kKeyChunk = key_bytes(kFormat, kHeadSize) / 8;
  static constexpr int kValueChunk = kKeyChunk / 2;
  // Whoever takes so few keys has made sure that blocks have 16 tokens; a page has two blocks.
  static constexpr bool kOnePage = kKeys <= 32;
  static_assert(kPart % kWarp == 0 && kHeadSize % kUnit == 0);

  static __device__ __forceinline__ int item(int step) {
    return step * kPart + static_cast<int>(threadIdx.x) % kPart;
  }
  static __device__ __forceinline__ bool live(int step) {
    return kItems % kPart == 0 || item(step) < kItems;
  }

  template <typename F>
  __device__ __forceinline__ void store(char* rows, F&& of) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (!live(s)) continue;
      char* to = rows + item(s) / kPerKey * kStride + (values_ ? 2 * kHeadSize : 0) +
                 item(s) % kPerKey * (kWide * kUnit * 2);
#pragma unroll
      for (int x = 0; x < kWide; ++x) {
        uint32_t word[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          word[c] = values_ ? __byte_perm(words_[s][2 * c], words_[s][2 * c + 1],
                                          x == 0 ? 0x5410 : 0x7632)
                            : words_[s][4 * x + c];
        }
#pragma unroll
        for (int j = 0; j < Code::kPairs; ++j) {
          *reinterpret_cast<uint4*>(to + (x * kUnit + j * 8) * 2) =
              make_uint4(of(Code::pair(word[0], j)), of(Code::pair(word[1], j)),
                         of(Code::pair(word[2], j)), of(Code::pair(word[3], j)));
        }
      }
    }
  }

  const HeadPages& head_;
  const char* pages_;
  const bool values_;
  int block_[kOnePage ? 1 : kSteps], slot_[kOnePage ? 1 : kSteps];  // of the page
  int within_[kSteps];                                              // key of the page
  uint32_t words_[kSteps][8];
};

}  // namespace kvc::gpu
