// SPDX-License-Identifier: Apache-2.0
// Codes of packed keys as operands of the matrix instructions, two to a register.
#pragma once

#include <type_traits>

#include "../page_format.h"
#include "gpu.cuh"

namespace kvc::gpu {

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

template <typename T>
__device__ __forceinline__ uint32_t subtract_pair(uint32_t a, uint32_t b) {
  using T2 = typename Pair<T>::Type;
  const T2 c = __hsub2(reinterpret_cast<const T2&>(a), reinterpret_cast<const T2&>(b));
  return reinterpret_cast<const uint32_t&>(c);
}
template <typename T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  using T2 = typename Pair<T>::Type;
  const T2 c = __hmul2(reinterpret_cast<const T2&>(a), reinterpret_cast<const T2&>(b));
  return reinterpret_cast<const uint32_t&>(c);
}
__device__ __forceinline__ float2 pair_floats(uint32_t x, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(x));
}
__device__ __forceinline__ float2 pair_floats(uint32_t x, __nv_bfloat16) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u));
}

// word & mask | bits in one instruction, which the compiler does not find for two constants.
__device__ __forceinline__ uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;\n" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// Pair j of a word whose halves lie 16 bits apart: what the codes stand for, before scale and zero
// and divided by kFactor. All of it is exact.
template <typename T, int kFormat>
struct Unpack;

template <typename T>
struct Unpack<T, kInt4> {
  static constexpr int kPairs = 4;
  static constexpr float kFactor = 1.f;
  // The code in the first bits of the mantissa of 16: 16 and the code, which stands for itself
  // less 8.
  static __device__ __forceinline__ uint32_t pair(uint32_t word, int j) {
    constexpr bool kHalf = std::is_same_v<T, __half>;
    constexpr int kPlace = kHalf ? 6 : 3;
    const uint32_t moved = 4 * j < kPlace ? word << (kPlace - 4 * j) : word >> (4 * j - kPlace);
    const uint32_t raw = masked_or(moved, 0x000F000Fu << kPlace, kHalf ? 0x4C004C00u : 0x41804180u);
    return subtract_pair<T>(raw, kHalf ? 0x4E004E00u : 0x41C041C0u);
  }
};

// A code's exponent and mantissa, moved to where T has them, with a bias that is too large.
template <>
struct Unpack<__half, kFp8> {
  static constexpr int kPairs = 2;
  static constexpr float kFactor = 256.f;
  static __device__ __forceinline__ uint32_t pair(uint32_t word, int j) {
    const uint32_t x = j == 0 ? word << 8 : word;
    return (x & 0x80008000u) | (x & 0x7F007F00u) >> 1;
  }
};
template <>
struct Unpack<__nv_bfloat16, kFp8> {
  static constexpr int kPairs = 2;
  static constexpr float kFactor = 1.f;
  static __device__ __forceinline__ uint32_t pair(uint32_t word, int j) {
    const uint32_t x = j == 0 ? word << 8 : word;
    // 2^120: products with what would be subnormal sums are not to be trusted.
    return multiply_pair<__nv_bfloat16>((x & 0x80008000u) | (x & 0x7F007F00u) >> 4, 0x7B807B80u);
  }
};

// Pairs as decode multiplies them, in numbers of Type: what codes stand for times times(j), plus
// added(j). Weights are rounded to Type, too: fp16 loses those below 2^-25 of the largest.
template <typename T, int kFormat>
struct Operands : Unpack<T, kFormat> {
  using Type = T;
  static constexpr float times(int) { return 1.f; }
  static constexpr float added(int) { return 0.f; }
};

// fp16 whatever the cache holds: of its ten bits of mantissa, two codes of a half word lie where
// the number 1024 has them, so that eight codes take five instructions instead of eight:
//
//   15..12  11..8  7..4  3..0   bits of a half word; shifted by 8, pairs 2 and 3 lie there, too
//     j=3    j=2    j=1   j=0   1024 + code for j = 0, 2; 1024 + 16 code for j = 1, 3
template <typename T>
struct Operands<T, kInt4> {
  using Type = __half;
  static constexpr int kPairs = 4;
  static constexpr float kFactor = 1.f;
  static constexpr float times(int j) { return j % 2 ? 16.f : 1.f; }
  static constexpr float added(int j) { return 1024.f + 8.f * times(j); }
  static __device__ __forceinline__ uint32_t pair(uint32_t word, int j) {
    return masked_or(j < 2 ? word : word >> 8, j % 2 ? 0x00F000F0u : 0x000F000Fu, 0x64006400u);
  }
};

// Stages of the rotation (rotated_together): x[i] and x[i + distance] become sum and difference,
// for distances from kFirst on that are less than kEnd.
template <int kCount, int kFirst, int kEnd>
__device__ __forceinline__ void rotate_registers(float* x) {
#pragma unroll
  for (int distance = kFirst; distance < kEnd; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i & distance) continue;
      const float first = x[i], second = x[i + distance];
      x[i] = first + second;
      x[i + distance] = first - second;
    }
  }
}
// The same with the lane that differs in one bit.
__device__ __forceinline__ float rotate_lanes(float x, int bit) {
  const float other = __shfl_xor_sync(kAllLanes, x, bit);
  return threadIdx.x & bit ? other - x : x + other;
}

// `kBytes` of shared memory, aligned as far as kBytes is.
template <int kBytes>
struct Chunk {
  static_assert(kBytes % 2 == 0);
  uint32_t words[(kBytes + 3) / 4];

  __device__ __forceinline__ void load(uint32_t shared) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 4; i += 4) {
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                     : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                     : "r"(shared + i * 4)
                     : "memory");
      }
    } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 4; i += 2) {
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n"
                     : "=r"(words[i]), "=r"(words[i + 1])
                     : "r"(shared + i * 4)
                     : "memory");
      }
    } else if constexpr (kBytes % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) words[i] = load_shared(shared + i * 4);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 2; ++i) {
        const uint32_t half = load_shared_half(shared + i * 2);
        words[i / 2] = i % 2 ? words[i / 2] | half << 16 : half;
      }
    }
  }
};

// Two bytes of two chunks each: one register of what Operands takes apart by value.
template <int kBytes>
__device__ __forceinline__ uint32_t halves(const Chunk<kBytes>& low, const Chunk<kBytes>& high,
                                           int index) {
  return __byte_perm(low.words[index / 2], high.words[index / 2], index % 2 ? 0x7632 : 0x5410);
}

}  // namespace kvc::gpu
