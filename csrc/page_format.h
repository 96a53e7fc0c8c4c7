// SPDX-License-Identifier: Apache-2.0
// How packed pages hold keys: the only place in C++ and CUDA that knows how many bytes a key takes
// and what its codes stand for. Python twins, with the words: page_format.py and fitting.py in
// kvcompress_vllm/cache.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KVC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KVC_HOST_DEVICE inline
#endif

namespace kvc {

enum PageFormat { kAuto, kFp8, kInt4 };
constexpr int kNumPageFormats = 3;

// m: blocks of tokens whose keys a packed page holds.
KVC_HOST_DEVICE constexpr int blocks_per_page(int format) { return 1 << format; }

// Of K and V of one key, where a number of the cache has `element` bytes.
KVC_HOST_DEVICE constexpr int key_bytes(int format, int head_size, int element = 2) {
  return 2 * head_size * element >> format;
}

// What divides the head sizes that a format takes.
constexpr int head_size_multiple(int format) {
  return format == kAuto ? 1 : format == kFp8 ? 16 : 32;
}

// A, S: of the scales of a (request, layer, head).
constexpr int scales_rows(int format) { return format; }
constexpr int scales_columns(int format, int head_size) {
  return format == kAuto ? 0 : format == kFp8 ? 2 : 2 * head_size;
}

// P: neighbouring channels that int4 rotates together, by a Hadamard matrix H with H H = P I. Codes
// stand for H x / P, so that H turns them back. Sums and differences of channels 1, 2, 4, ...
// apart, in this order everywhere, so that all kernels find the same codes.
KVC_HOST_DEVICE constexpr int rotated_together(int head_size) { return head_size & -head_size; }

// The channel at place `place` of K; its two halves' pairs lie 16 bits apart in a word, as lane c
// of a matrix instruction's four takes them.
KVC_HOST_DEVICE constexpr int key_channel(int format, int head_size, int place) {
  const int half = format == kFp8 ? 2 : 4;  // pairs in 4 bytes
  const int c = place / (head_size / 4), rest = place % (head_size / 4);
  const int pair = rest / (2 * half) * half + rest % half;
  return 8 * pair + 2 * c + rest % (2 * half) / half;
}
KVC_HOST_DEVICE constexpr int key_place(int format, int head_size, int channel) {
  const int half = format == kFp8 ? 2 : 4;
  const int pair = channel / 8, c = channel % 8 / 2;
  return c * (head_size / 4) + pair / half * 2 * half + channel % 2 * half + pair % half;
}

// The same of V, whose channels lane r of eight takes in steps of 8.
KVC_HOST_DEVICE constexpr int value_channel(int head_size, int place) {
  return place % (head_size / 8) * 8 + place / (head_size / 8);
}
KVC_HOST_DEVICE constexpr int value_place(int head_size, int channel) {
  return channel % 8 * (head_size / 8) + channel / 8;
}

KVC_HOST_DEVICE uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}
KVC_HOST_DEVICE float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

// a * b, never fused with a sum that follows.
KVC_HOST_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
// The nearest integer, ties to even, of a number below 2^22: a sum leaves it in the low bits.
KVC_HOST_DEVICE uint32_t nearest_integer(float x) {
  return float_bits(x + 0x1.8p23f) - 0x4B400000u;
}

// bfloat16, in which scales are stored.
KVC_HOST_DEVICE float scale_float(uint16_t scale) {
  return bits_float(static_cast<uint32_t>(scale) << 16);
}
// No less than x, which is not negative.
KVC_HOST_DEVICE uint16_t scale_up(float x) {
  return static_cast<uint16_t>((float_bits(x) + 0xFFFFu) >> 16);
}
KVC_HOST_DEVICE uint16_t scale_nearest(float x) {
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
// 0 where a scale is too small to have one: of numbers that the zero alone stands for.
KVC_HOST_DEVICE float inverse_scale(float scale) {
  return scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
}

// H of `size` numbers, in blocks of `together`.
inline void rotate(float* x, int size, int together) {
  for (int distance = 1; distance < together; distance *= 2) {
    for (int i = 0; i < size; i += 2 * distance) {
      for (int j = i; j < i + distance; ++j) {
        const float first = x[j], second = x[j + distance];
        x[j] = first + second;
        x[j + distance] = first - second;
      }
    }
  }
}

constexpr float kLargestFp8 = 448.0f;

// Scales that fit a range, and that go on from scales there are; see fitting.py. A range is the
// least and the greatest number of a channel, for fp8 the greatest absolute one of a side.
KVC_HOST_DEVICE uint16_t fit_fp8(float largest) { return scale_up(largest / kLargestFp8); }
KVC_HOST_DEVICE uint16_t widen_fp8(uint16_t old, float largest) {
  float scale = scale_float(old);
  if (!(scale > 0.0f)) return fit_fp8(largest);
  while (largest > 464.0f * scale) scale *= 2.0f;
  return static_cast<uint16_t>(float_bits(scale) >> 16);
}
KVC_HOST_DEVICE uint16_t reaching_int4(float low, float high, float zero) {
  const float above = (high - zero) / 7.0f, below = (zero - low) / 8.0f;
  return scale_up(above > below ? above : below);
}
KVC_HOST_DEVICE uint16_t zero_int4(float low, float high) {
  // Half a step above the middle. No product here is rounded, so that none can be fused.
  return scale_nearest((high + low) * 0.5f + (high - low) / 30.0f);
}
// Part of a range that int4 may leave out on either side; the first of those with the least squared
// error is taken. Powers of two, so that rounding is the same everywhere.
constexpr int kNumCuts = 4;
KVC_HOST_DEVICE float range_cut(int index) {
  return index == 0 ? 0.0f : static_cast<float>(1 << index) * 0.03125f;
}
// Every how manieth of `count` keys tells which cut is best.
constexpr int kJudged = 1024;
KVC_HOST_DEVICE int judged_apart(int64_t count) {
  return count < 2 * kJudged ? 1 : static_cast<int>(count / kJudged);
}
struct Int4Scale {
  uint16_t scale, zero;
};
KVC_HOST_DEVICE Int4Scale around_int4(float below, float above) {
  const uint16_t zero = zero_int4(below, above);
  return {reaching_int4(below, above, scale_float(zero)), zero};
}
KVC_HOST_DEVICE Int4Scale fit_int4(float low, float high, int index) {
  const float cut = (high - low) * range_cut(index);
  return around_int4(low + cut, high - cut);
}
// Of those that go on: part of what lies beyond the codes that they reach for. The first leaves no
// number out, the second moves nothing.
KVC_HOST_DEVICE float range_reached(int index) {
  return index < 2 ? static_cast<float>(1 - index) : static_cast<float>(index - 1) * 0.25f;
}
// Steps beyond the codes that all but the first leave a number off at most.
constexpr float kFarthest = 64.0f;
KVC_HOST_DEVICE Int4Scale widen_int4(Int4Scale old, float low, float high, int index) {
  const float scale = scale_float(old.scale), zero = scale_float(old.zero);
  const float least = zero - 8.0f * scale, greatest = zero + 7.0f * scale;
  const float under = least > low ? least - low : 0.0f;
  const float over = high > greatest ? high - greatest : 0.0f;
  const Int4Scale all = around_int4(least - under, greatest + over);
  if (index == 0) return all;
  // Products with shares are exact, so that none can be fused.
  const float share = range_reached(index);
  const Int4Scale some =
      index == 1 ? old : around_int4(least - under * share, greatest + over * share);
  const float step = scale_float(some.scale), middle = scale_float(some.zero);
  const float off_low = middle - 8.0f * step - low, off_high = high - (middle + 7.0f * step);
  return (off_low > off_high ? off_low : off_high) > kFarthest * step ? all : some;
}
// Numbers outside what codes reach are counted in so many parts of a step: those that a cut leaves
// out are fewer than 16 steps off, others may be kFarthest.
KVC_HOST_DEVICE constexpr int parts_of_step(bool anew) { return anew ? 16 : 4; }
// How far a number lies outside what codes reach, in parts of a step; `inverse` is parts / scale.
KVC_HOST_DEVICE int32_t steps_outside(float x, float least, float greatest, float inverse) {
  const float above = x - greatest, below = least - x;
  const float outside = above > below ? above : below;
  const float steps = rounded_product(outside, inverse);
  if (!(steps > 0.0f)) return 0;
  return static_cast<int32_t>(nearest_integer(steps < 256.0f ? steps : 256.0f));
}
// Sum of squared errors of `count` numbers, of which those outside have `squares`, in parts.
KVC_HOST_DEVICE double error_int4(int64_t count, int parts, int64_t squares, float scale) {
  return (static_cast<double>(count * parts * parts) / 12.0 + static_cast<double>(squares)) *
         (static_cast<double>(scale) * scale);
}

// Code of a number, in [0, 16).
KVC_HOST_DEVICE uint32_t encode_int4(float x, float zero, float inverse) {
  const float step = rounded_product(x - zero, inverse);
#ifdef __CUDA_ARCH__
  const float inside = fminf(fmaxf(step, -8.0f), 7.0f);  // of NaN -8, too
#else
  const float inside = step > -8.0f ? step < 7.0f ? step : 7.0f : -8.0f;
#endif
  return float_bits(inside + (0x1.8p23f + 8.0f)) - 0x4B400000u;  // nearest_integer(inside) + 8
}
KVC_HOST_DEVICE float decode_int4(uint32_t code, float zero, float scale) {
  return (static_cast<float>(code) - 8.0f) * scale + zero;
}

// e4m3: a sign, four bits of exponent, three of mantissa; round to nearest even, no infinities.
KVC_HOST_DEVICE uint32_t encode_fp8(float x, float inverse) {
  const float step = x * inverse;
  const uint32_t sign = float_bits(step) >> 24 & 0x80;
  float size = bits_float(float_bits(step) & 0x7FFFFFFFu);
  if (!(size <= kLargestFp8)) size = kLargestFp8;
  if (size < 0x1p-6f) return sign | nearest_integer(size * 0x1p9f);
  const uint32_t bits = float_bits(size);
  return sign | (((bits + 0x7FFFFu + (bits >> 20 & 1)) >> 20) - (120u << 3));
}
KVC_HOST_DEVICE float decode_fp8(uint32_t code) {
  const float normal = bits_float(((code & 0x7F) << 20) + (120u << 23));
  const float size = code & 0x78 ? normal : static_cast<float>(code & 7) * 0x1p-9f;
  return code & 0x80 ? -size : size;
}

}  // namespace kvc
