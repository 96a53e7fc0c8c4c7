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

// What codes of int4 stand for, of eight channels of 16 bits in each lane, of which lanes that
// differ in the bits below P / 8 hold one block. All lanes of the warp.
__device__ __forceinline__ void rotate_words(float (&x)[8], int together) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= 1.f / static_cast<float>(together);
  rotate_registers<8, 1, 8>(x);
  for (int bit = 1; bit < together / 8; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = rotate_lanes(x[i], bit);
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

// Bytes of shared memory per warp: a code each, before they are packed.
constexpr int quantise_bytes(int head_size) { return kKeysTogether * 2 * head_size; }

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
  uint8_t* staged = shared + warp * quantise_bytes(head_size);
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
        const int word = start + lane, channel = word * kPerWord;
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
        float scale[kPerWord], zero[kPerWord];
        if (live) load_scales<kFormat, kPerWord>(new_scales, head_size, channel, scale, zero);
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) scale[i] = inverse_scale(scale[i]);
#pragma unroll
        for (int k = 0; k < kKeysTogether; ++k) {
          const int64_t source = __shfl_sync(kAllLanes, from, min(row + k, rows - 1));
          if (source & 1) continue;
          float x[kPerWord];
          unpack<T>(words[k], x);
          if constexpr (kFormat == kInt4) rotate_words(x, together);
          if (!live) continue;
#pragma unroll
          for (int i = 0; i < kPerWord; ++i) {
            staged[k * 2 * head_size + place_of<kFormat>(head_size, channel + i)] =
                static_cast<uint8_t>(encode<kFormat>(x[i], zero[i], scale[i]));
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
          return staged_codes<kFormat>(staged + k * 2 * head_size, word);
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

// One block per (request, head): the range of its kept keys that are not codes, then its scales.
template <typename T, int kFormat, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) fit_scales_kernel(CodesParams q) {
  constexpr int kPerWord = 8, kAhead = 8;
  constexpr int kPlaces = kThreads * kPerWord, kMostChannels = 512;
  // Ranges by side and channel; then errors.
  __shared__ int64_t room[kPlaces];
  __shared__ float cuts[kFormat == kInt4 ? kNumCuts : 1][3][kMostChannels];
  float* low_of = reinterpret_cast<float*>(room);
  float* high_of = low_of + kPlaces;
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
  // Every thread takes the same 16 bytes of every `sides`-th key.
  const int sides = kThreads / p.words, word = threadIdx.x % p.words, side = threadIdx.x / p.words;
  float low[kPerWord], high[kPerWord];
#pragma unroll
  for (int i = 0; i < kPerWord; ++i) low[i] = kInfinity, high[i] = -kInfinity;
  const uint4* pages = static_cast<const uint4*>(p.pages);
  const int together = rotated_together(head_size);
  // As often for all threads: they rotate together.
  for (int base = fresh; base < count; base += sides * kAhead) {
    const int k = base + side;
    uint4 words[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int key = keys[min(k + a * sides, count - 1)];
      const HeadPages::Place place = head.place(key);
      const int64_t row =
          static_cast<int64_t>(head.page_id(place.page)) * head.block_size + place.within;
      words[a] = __ldg(pages + row * p.words + word);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      float x[kPerWord];
      unpack<T>(words[a], x);
      if constexpr (kFormat == kInt4) rotate_words(x, together);
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        low[i] = fminf(low[i], x[i]);
        high[i] = fmaxf(high[i], x[i]);
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
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    for (int s = 1; s < sides; ++s) {
      low_of[c] = fminf(low_of[c], low_of[s * channels + c]);
      high_of[c] = fmaxf(high_of[c], high_of[s * channels + c]);
    }
    if (kFormat == kInt4 && !anew) {
      const uint16_t zero = head.scales[channels + c];
      out[channels + c] = zero;
      out[c] = widen_int4(head.scales[c], scale_float(zero), low_of[c], high_of[c]);
    }
  }
  if constexpr (kFormat == kInt4) {
    if (!anew) return;
    // Once more over the keys: of every channel the cut of its range with the least squared error.
    // Sums of integers, so that their order decides nothing.
    __syncthreads();
    for (int i = threadIdx.x; i < kNumCuts * channels; i += kThreads) {
      const int cut = i / channels, c = i % channels;
      const Int4Scale of = fit_int4(low_of[c], high_of[c], cut);
      cuts[cut][0][c] = scale_float(of.scale);
      cuts[cut][1][c] = inverse_scale(scale_float(of.scale)) * 16.f;
      cuts[cut][2][c] = scale_float(of.zero);
    }
    __syncthreads();
    constexpr int kFew = 4;                    // as many as registers hold beside the sums
    int64_t squares[kNumCuts][kPerWord] = {};  // the first cut leaves nothing out
    for (int base = 0; base < count; base += sides * kFew) {
      const int k = base + side;
      uint4 words[kFew];
#pragma unroll
      for (int a = 0; a < kFew; ++a) {
        const HeadPages::Place place = head.place(keys[min(k + a * sides, count - 1)]);
        const int64_t row =
            static_cast<int64_t>(head.page_id(place.page)) * head.block_size + place.within;
        words[a] = __ldg(pages + row * p.words + word);
      }
      float x[kFew][kPerWord];
#pragma unroll
      for (int a = 0; a < kFew; ++a) {
        unpack<T>(words[a], x[a]);
        rotate_words(x[a], together);
      }
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        const int c = word * kPerWord + i;
#pragma unroll
        for (int cut = 1; cut < kNumCuts; ++cut) {
          const float least = cuts[cut][2][c] - 8.f * cuts[cut][0][c];
          const float greatest = cuts[cut][2][c] + 7.f * cuts[cut][0][c];
          const float inverse = cuts[cut][1][c];
#pragma unroll
          for (int a = 0; a < kFew; ++a) {
            const int steps =
                k + a * sides < count ? steps_outside(x[a][i], least, greatest, inverse) : 0;
            squares[cut][i] += static_cast<int64_t>(steps) * steps;
          }
        }
      }
    }
    double best[kMostChannels / kThreads];
#pragma unroll
    for (int cut = 0; cut < kNumCuts; ++cut) {
      __syncthreads();
      if (side < sides) {
#pragma unroll
        for (int i = 0; i < kPerWord; ++i) {
          room[side * channels + word * kPerWord + i] = squares[cut][i];
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kMostChannels / kThreads; ++j) {
        const int c = threadIdx.x + j * kThreads;
        if (c >= channels) continue;
        int64_t sum = 0;
        for (int s = 0; s < sides; ++s) sum += room[s * channels + c];
        const double error = error_int4(count, sum, cuts[cut][0][c]);
        if (cut > 0 && !(error < best[j])) continue;
        best[j] = error;
        out[c] = static_cast<uint16_t>(float_bits(cuts[cut][0][c]) >> 16);
        out[channels + c] = static_cast<uint16_t>(float_bits(cuts[cut][2][c]) >> 16);
      }
    }
  }
  if constexpr (kFormat == kFp8) {
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
