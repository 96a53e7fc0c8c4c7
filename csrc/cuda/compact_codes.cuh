// SPDX-License-Identifier: Apache-2.0
// fit_scales, and compact_pages into codes. Both take kept keys from where they are, 16 bit or
// codes. Head size and block size are known at run time only.
#pragma once

#include "codes.cuh"
#include "compact.cuh"

namespace kvc::gpu {

struct CodesParams {
  CompactParams kept;          // words: 16 bytes of K and V of an uncompressed key
  const uint16_t* new_scales;  // [R, L * H, A * S]
  uint16_t* fitted;            // the same, of fit_scales
  int32_t head_size;           // D
};

// Scale and zero of channels [first, first + kCount) of K and V, first a multiple of kCount.
template <int kFormat, int kCount>
__device__ __forceinline__ void load_scales(const uint16_t* scales, int head_size, int first,
                                            float* scale, float* zero) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (kFormat == kFp8) {
      scale[i] = scale_float(__ldg(scales + (first >= head_size)));
      zero[i] = 0.f;
    } else {
      scale[i] = scale_float(__ldg(scales + first + i));
      zero[i] = scale_float(__ldg(scales + 2 * head_size + first + i));
    }
  }
}

template <int kFormat>
__device__ __forceinline__ uint32_t encode(float x, float zero, float inverse) {
  return kFormat == kFp8 ? encode_fp8(x, inverse) : encode_int4(x, zero, inverse);
}
template <int kFormat>
__device__ __forceinline__ float decode(uint32_t code, float zero, float scale) {
  return kFormat == kFp8 ? decode_fp8(code) * scale : decode_int4(code, zero, scale);
}

// What codes of int4 stand for, of eight channels of 16 bits of kCount keys in each lane, of which
// lanes that differ in the bits below P / 8 hold one block. All lanes of the warp.
template <int kCount>
__device__ __forceinline__ void rotate_words(float (&x)[kCount][8], int together) {
  const float whole = 1.f / static_cast<float>(together);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[k][i] *= whole;
    rotate_registers<8, 1, 8>(x[k]);
  }
#pragma unroll 1
  for (int bit = 1; bit < together / 8; bit *= 2) {
    // Sum or difference as rotate_lanes() has them: products with 1 and -1 are exact.
    const float sign = threadIdx.x & bit ? -1.f : 1.f;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        x[k][i] = fmaf(x[k][i], sign, __shfl_xor_sync(kAllLanes, x[k][i], bit));
      }
    }
  }
}

// Between places of a packed key and channels of K, then V.
template <int kFormat>
__device__ __forceinline__ int place_of(int head_size, int channel) {
  return channel < head_size ? key_place(kFormat, head_size, channel)
                             : head_size + value_place(head_size, channel - head_size);
}
template <int kFormat>
__device__ __forceinline__ int channel_at(int head_size, int place) {
  return place < head_size ? key_channel(kFormat, head_size, place)
                           : head_size + value_channel(head_size, place - head_size);
}

// The codes of a word of a packed key, as codes of other scales.
template <int kFormat>
__device__ __forceinline__ uint32_t recode(uint32_t word, int index, int head_size,
                                           const uint16_t* old_scales, const uint16_t* new_scales) {
  constexpr int kBits = 16 >> kFormat, kCodes = 32 / kBits;
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < kCodes; ++i) {
    const int channel = channel_at<kFormat>(head_size, index * kCodes + i);
    float scale, zero, new_scale, new_zero;
    load_scales<kFormat, 1>(old_scales, head_size, channel, &scale, &zero);
    load_scales<kFormat, 1>(new_scales, head_size, channel, &new_scale, &new_zero);
    const float x = decode<kFormat>(word >> i * kBits & ((1u << kBits) - 1), zero, scale);
    result |= encode<kFormat>(x, new_zero, inverse_scale(new_scale)) << i * kBits;
  }
  return result;
}

// Whether, by what a lane looks at (all of the warp see every scale), recode() changes no code: the
// scales are the same, large enough beside the zeros that no rounding leads to another code, and
// small enough that nothing overflows.
template <int kFormat>
__device__ __forceinline__ bool same_codes(int head_size, const uint16_t* old_scales,
                                           const uint16_t* new_scales) {
  bool same = true;
  const int count = scales_columns(kFormat, head_size);
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) {
    const float scale = scale_float(__ldg(old_scales + i));
    same &=
        __ldg(old_scales + i) == __ldg(new_scales + i) && scale >= 0x1p-126f && scale <= 0x1p100f;
    if constexpr (kFormat == kInt4) {
      const uint16_t zero = __ldg(old_scales + count + i);
      same &= zero == __ldg(new_scales + count + i) && fabsf(scale_float(zero)) <= 0x1p20f * scale;
    }
  }
  return same;
}

constexpr int kKeysTogether = 8;  // of a warp: loads in flight per lane

// Of shared memory: a key's codes, a byte each, before they are packed; and a warp's.
constexpr int kStagedKey = 512;
constexpr int kStagedBytes = kKeysTogether * kStagedKey;

// Word `word` of a key's codes, of which `staged` has a byte each.
template <int kFormat>
__device__ __forceinline__ uint32_t staged_codes(const uint8_t* staged, int word) {
  if constexpr (kFormat == kFp8) return reinterpret_cast<const uint32_t*>(staged)[word];
  // Eight bytes, a code in the lower half of each.
  const uint2 bytes = reinterpret_cast<const uint2*>(staged)[word];
  const auto pack_four = [](uint32_t x) {
    x = (x | x >> 4) & 0x00FF00FFu;
    return (x | x >> 8) & 0xFFFFu;
  };
  return pack_four(bytes.x) | pack_four(bytes.y) << 16;
}

// One warp per new page.
template <typename T, int kFormat, int kThreads>
__global__ void __launch_bounds__(kThreads) quantise_pages_kernel(CodesParams q) {
  constexpr int kPerWord = 8;  // numbers in 16 bytes
  extern __shared__ __align__(16) uint8_t shared[];
  const CompactParams& p = q.kept;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, head_size = q.head_size;
  uint8_t* staged = shared + warp * kStagedBytes;
  const int64_t page = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp;
  if (page >= p.num_kept) return;
  const int slots = p.rows.slots;
  const int index = find_head(p.kept_first, p.num_requests * slots, page);
  const int first = p.kept_first[index];
  if (page < first || page >= first + p.kept_pages[index]) return;
  const int request = index / slots;
  const HeadPages head = head_pages(p.rows, request, index % slots);
  const int packed = head.packed_keys(), page_keys = head.block_size * head.page_blocks;
  const int32_t target =
      packed_page_id(p.new_blocks + request * p.new_blocks_stride,
                     static_cast<int32_t>(page - p.kept_first[request * slots]), slots);
  const int row_bytes = 4 * head_size, code_bytes = key_bytes(kFormat, head_size);
  const int together = rotated_together(head_size);
  char* pages = static_cast<char*>(p.pages);
  const int64_t page_bytes = static_cast<int64_t>(head.block_size) * row_bytes;
  char* out = pages + target * page_bytes;
  const uint16_t* new_scales = q.new_scales + static_cast<int64_t>(index) * p.rows.scales_size;
  const int32_t* keys = p.kept_keys + page * page_keys;
  // Most compressions after the first widen no scale.
  const bool same =
      __all_sync(kAllLanes, packed == 0 || same_codes<kFormat>(head_size, head.scales, new_scales));
  // Of the channels of word `word`.
  float inverse[kPerWord] = {}, zero[kPerWord] = {};
  int position[kPerWord];
  const auto enter = [&](int word) {
    if (word < p.words) {
      load_scales<kFormat, kPerWord>(new_scales, head_size, word * kPerWord, inverse, zero);
    }
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      inverse[i] = inverse_scale(inverse[i]);
      position[i] = place_of<kFormat>(head_size, word * kPerWord + i);
    }
  };
  if (p.words <= kWarp) enter(lane);
  for (int base = 0; base < page_keys; base += kWarp) {
    const int rows = min(kWarp, page_keys - base);
    // Lane i finds where key i lies now; the last bit tells codes, which are 16-byte aligned, too.
    int64_t from = 0;
    if (lane < rows) {
      const int key = keys[base + lane];
      const HeadPages::Place place = head.place(key);
      const bool codes = key < packed;
      from =
          head.page_id(place.page) * page_bytes + place.within * (codes ? code_bytes : row_bytes);
      from |= codes;
    }
    for (int row = 0; row < rows; row += kKeysTogether) {
      for (int start = 0; start < p.words; start += kWarp) {
        const int word = start + lane;
        const bool live = word < p.words;
        uint4 words[kKeysTogether];
#pragma unroll
        for (int k = 0; k < kKeysTogether; ++k) {
          const int64_t source = __shfl_sync(kAllLanes, from, min(row + k, rows - 1));
          words[k] = make_uint4(0, 0, 0, 0);
          if (live && !(source & 1)) {
            words[k] = __ldcs(reinterpret_cast<const uint4*>(pages + source) + word);
          }
        }
        if (p.words > kWarp) enter(word);
        float x[kKeysTogether][kPerWord];
#pragma unroll
        for (int k = 0; k < kKeysTogether; ++k) unpack<T>(words[k], x[k]);
        if constexpr (kFormat == kInt4) rotate_words(x, together);
        if (!live) continue;
        // Of keys that are codes already, what stands here is not looked at.
#pragma unroll
        for (int k = 0; k < kKeysTogether; ++k) {
#pragma unroll
          for (int i = 0; i < kPerWord; ++i) {
            staged[k * kStagedKey + position[i]] =
                static_cast<uint8_t>(encode<kFormat>(x[k][i], zero[i], inverse[i]));
          }
        }
      }
      __syncwarp();
      for (int start = 0; start < code_bytes / 4; start += kWarp) {
        const int word = start + lane;
        const bool live = word < code_bytes / 4;
        const auto read = [&](int k) {
          const int64_t source = __shfl_sync(kAllLanes, from, min(row + k, rows - 1));
          if (!live) return 0u;
          if (source & 1) {
            return __ldg(reinterpret_cast<const uint32_t*>(pages + (source & ~int64_t{1})) + word);
          }
          return staged_codes<kFormat>(staged + k * kStagedKey, word);
        };
        const auto write = [&](int k, uint32_t codes) {
          if (!live || row + k >= rows) return;
          char* to = out + static_cast<int64_t>(base + row + k) * code_bytes;
          reinterpret_cast<uint32_t*>(to)[word] = codes;
        };
        if (same) {
          uint32_t codes[kKeysTogether];
#pragma unroll
          for (int k = 0; k < kKeysTogether; ++k) codes[k] = read(k);
#pragma unroll
          for (int k = 0; k < kKeysTogether; ++k) write(k, codes[k]);
          continue;
        }
#pragma unroll 1  // recode() is long
        for (int k = 0; k < kKeysTogether; ++k) {
          uint32_t codes = read(k);
          const bool coded = __shfl_sync(kAllLanes, from, min(row + k, rows - 1)) & 1;
          if (live && coded) {
            codes = recode<kFormat>(codes, word, head_size, head.scales, new_scales);
          }
          write(k, codes);
        }
      }
      __syncwarp();
    }
  }
}

constexpr int kMostRows = 512;

// Where kept keys of a head are, found once for all threads of a block: of every `apart`-th of
// `count`, chunk <= kMostRows in all. Those behind the last count as the last.
template <int kThreads>
__device__ __forceinline__ void find_rows(const uint4* (&rows)[kMostRows], const CompactParams& p,
                                          const HeadPages& head, const int32_t* keys, int count,
                                          int chunk, int apart) {
  __syncthreads();  // the rows before are done with
  for (int i = threadIdx.x; i < chunk; i += kThreads) {
    const HeadPages::Place place = head.place(keys[min(i * apart, count - 1)]);
    const int64_t row =
        static_cast<int64_t>(head.page_id(place.page)) * head.block_size + place.within;
    rows[i] = static_cast<const uint4*>(p.pages) + row * p.words;
  }
  __syncthreads();
}

// steps_outside() / 256 of a number, squared and added to `sum`. Such a number is at most 256 parts
// of a step outside, so that fp32 holds the sum of 256 of them without rounding; `inverse` is parts
// / (256 scale). NaN counts as 0, as there.
__device__ __forceinline__ void add_square(float x, float least, float greatest, float inverse,
                                           float* sum) {
  constexpr float kNearest = 0x1.8p15f;  // leaves multiples of 1 / 256
  float steps;
  asm("mul.rn.sat.f32 %0, %1, %2;\n"
      : "=f"(steps)
      : "f"(fmaxf(x - greatest, least - x)), "f"(inverse));
  steps = __fadd_rn(__fadd_rn(steps, kNearest), -kNearest);
  *sum = fmaf(steps, steps, *sum);
}

// One block per (request, head): the range of its kept keys that are not codes, then its scales.
template <typename T, int kFormat, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) fit_scales_kernel(CodesParams q) {
  constexpr int kPerWord = 8, kAhead = 8, kMostChannels = 512;
  constexpr int kCuts = kNumCuts - 1;  // the first range leaves nothing out
  constexpr int kMostWords = kMostChannels / kPerWord;
  static_assert(kMostRows / (kThreads / kMostWords) <= 256);  // numbers that a thread adds up
  __shared__ const uint4* rows[kMostRows];
  // Ranges by side and channel; then sums of squares by cut and channel, of fewer than 2 kJudged
  // numbers below 256.
  __shared__ float ranges[2][kThreads * kPerWord];
  float *low_of = ranges[0], *high_of = ranges[1];
  auto* squares = reinterpret_cast<uint32_t (*)[kMostChannels]>(ranges);
  static_assert(sizeof(ranges) >= kCuts * sizeof(*squares));
  // By channel: the least and the greatest number that codes reach, parts / (256 scale), scale and
  // zero.
  __shared__ float4 cuts[kFormat == kInt4 ? kCuts : 1][kPerWord][kMostWords];
  const CompactParams& p = q.kept;
  const int head_size = q.head_size, channels = 2 * head_size, index = blockIdx.x;
  uint16_t* out = q.fitted + static_cast<int64_t>(index) * p.rows.scales_size;
  const HeadPages head = head_pages(p.rows, index / p.rows.slots, index % p.rows.slots);
  const int packed = head.packed_keys(), page_keys = head.block_size * head.page_blocks;
  // No more than there are rows of kept_keys, if num_kept_pages was wrong.
  const int64_t first = p.kept_first[index];
  const int count =
      static_cast<int>(max(int64_t{0}, min(int64_t{p.kept_pages[index]}, p.num_kept - first))) *
      page_keys;
  if (count == 0) {
    for (int i = threadIdx.x; i < p.rows.scales_size; i += kThreads) out[i] = 0;
    return;
  }
  const int32_t* keys = p.kept_keys + first * page_keys;
  // They ascend: codes come first.
  int fresh = 0, end = count;
  while (fresh < end) {
    const int middle = (fresh + end) / 2;
    if (keys[middle] < packed) {
      fresh = middle + 1;
    } else {
      end = middle;
    }
  }
  if (fresh == count) {
    for (int i = threadIdx.x; i < p.rows.scales_size; i += kThreads) out[i] = head.scales[i];
    return;
  }
  // Every thread takes the same 16 bytes of every `sides`-th key; as often all threads, as they
  // rotate together.
  const int sides = kThreads / p.words, word = threadIdx.x % p.words, side = threadIdx.x / p.words;
  const int chunk = kMostRows / (sides * kAhead) * (sides * kAhead);
  const int together = rotated_together(head_size);
  const auto read = [&](int k) { return __ldg(rows[min(k, chunk - 1)] + word); };
  float low[kPerWord], high[kPerWord];
#pragma unroll
  for (int i = 0; i < kPerWord; ++i) low[i] = kInfinity, high[i] = -kInfinity;
  for (int base = fresh; base < count; base += chunk) {
    find_rows<kThreads>(rows, p, head, keys + base, count - base, chunk, 1);
    for (int k = side; k - side < min(chunk, count - base); k += sides * kAhead) {
      uint4 words[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) words[a] = read(k + a * sides);
      float x[kAhead][kPerWord];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) unpack<T>(words[a], x[a]);
      if constexpr (kFormat == kInt4) rotate_words(x, together);
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) {
          low[i] = fminf(low[i], x[a][i]);
          high[i] = fmaxf(high[i], x[a][i]);
        }
      }
    }
  }
  if (side < sides) {
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      low_of[side * channels + word * kPerWord + i] = low[i];
      high_of[side * channels + word * kPerWord + i] = high[i];
    }
  }
  __syncthreads();
  const bool anew = fresh == 0;
  const int parts = parts_of_step(anew);
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    for (int s = 1; s < sides; ++s) {
      low_of[c] = fminf(low_of[c], low_of[s * channels + c]);
      high_of[c] = fmaxf(high_of[c], high_of[s * channels + c]);
    }
    if constexpr (kFormat == kInt4) {
      Int4Scale old = {};
      if (!anew) old = {head.scales[c], head.scales[channels + c]};
#pragma unroll
      for (int cut = 0; cut < kNumCuts; ++cut) {
        const Int4Scale of = anew ? fit_int4(low_of[c], high_of[c], cut)
                                  : widen_int4(old, low_of[c], high_of[c], cut);
        if (cut == 0) {
          out[c] = of.scale;
          out[channels + c] = of.zero;
          continue;
        }
        const float scale = scale_float(of.scale), zero = scale_float(of.zero);
        cuts[cut - 1][c % kPerWord][c / kPerWord] =
            make_float4(zero - 8.f * scale, zero + 7.f * scale,
                        inverse_scale(scale) * (static_cast<float>(parts) * 0x1p-8f),
                        __uint_as_float(static_cast<uint32_t>(of.scale) << 16 | of.zero));
      }
    }
  }
  if constexpr (kFormat == kInt4) {
    // Once more over keys: of every channel the range with the least squared error, of those that
    // are new and of what moving costs the others. Sums of integers, so that their order decides
    // nothing.
    constexpr int kFew = 4;  // as many as registers hold beside the sums
    __syncthreads();
    for (int c = threadIdx.x; c < kMostChannels; c += kThreads) {
#pragma unroll
      for (int cut = 0; cut < kCuts; ++cut) squares[cut][c] = 0;
    }
    const int apart = judged_apart(count - fresh), judged = ceil_div(count - fresh, apart);
    const int64_t moved = int64_t{fresh} * judged / (count - fresh);
    for (int base = 0; base < judged; base += chunk) {
      const int done = fresh + base * apart;
      find_rows<kThreads>(rows, p, head, keys + done, count - done, chunk, apart);
      float sums[kCuts][kPerWord] = {};
      for (int k = side; k - side < min(chunk, judged - base); k += sides * kFew) {
        uint4 words[kFew];
#pragma unroll
        for (int a = 0; a < kFew; ++a) {
          words[a] = read(k + a * sides);
          // NaN behind the last key.
          if (base + k + a * sides >= judged) words[a] = make_uint4(~0u, ~0u, ~0u, ~0u);
        }
        float x[kFew][kPerWord];
#pragma unroll
        for (int a = 0; a < kFew; ++a) unpack<T>(words[a], x[a]);
        rotate_words(x, together);
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) {
#pragma unroll
          for (int cut = 0; cut < kCuts; ++cut) {
            const float4 of = cuts[cut][i][word];
#pragma unroll
            for (int a = 0; a < kFew; ++a) {
              add_square(x[a][i], of.x, of.y, of.z, &sums[cut][i]);
            }
          }
        }
      }
      if (side >= sides) continue;
#pragma unroll
      for (int cut = 0; cut < kCuts; ++cut) {
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) {
          const int c = word * kPerWord + i;
          const auto sum = static_cast<uint32_t>(sums[cut][i] * 65536.f);
          if (sum > 0) atomicAdd(&squares[cut][c], sum);
        }
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += kThreads) {
      double best = error_int4(judged + moved, parts, 0, scale_float(out[c]));
#pragma unroll
      for (int cut = 0; cut < kCuts; ++cut) {
        const uint32_t of = __float_as_uint(cuts[cut][c % kPerWord][c / kPerWord].w);
        const int64_t keys_moved = !anew && cut == 0 ? 0 : moved;
        const double error = error_int4(judged + keys_moved, parts, squares[cut][c],
                                        scale_float(static_cast<uint16_t>(of >> 16)));
        if (!(error < best)) continue;
        best = error;
        out[c] = static_cast<uint16_t>(of >> 16);
        out[channels + c] = static_cast<uint16_t>(of);
      }
    }
  } else {
    __syncthreads();
    const int lane = threadIdx.x % kWarp, of_values = threadIdx.x / kWarp;
    if (of_values > 1) return;
    float largest = 0.f;
    for (int d = lane; d < head_size; d += kWarp) {
      const int c = of_values * head_size + d;
      largest = fmaxf(largest, fmaxf(fabsf(low_of[c]), fabsf(high_of[c])));
    }
    largest = lanes_max(largest);
    if (lane == 0)
      out[of_values] = anew ? fit_fp8(largest) : widen_fp8(head.scales[of_values], largest);
  }
}

}  // namespace kvc::gpu
