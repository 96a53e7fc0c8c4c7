// SPDX-License-Identifier: Apache-2.0
// Codes of packed keys, read and written one key at a time.
#pragma once

#include <vector>

#include "../paged_layout.h"

namespace kvc {

class Codes {
 public:
  explicit Codes(int64_t head_size) : head_size_(static_cast<int>(head_size)) {}

  // K and V of the key at `in`, in fp32; nullptr: not wanted. `stored`: what codes stand for, which
  // int4 has rotated.
  void read(const HeadPages& head, const char* in, float* keys, float* values,
            bool stored = false) {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(in);
    const uint16_t* scales = head.scales;
    prepare(head.page_blocks);
    if (format_ == kFp8) {
      const float scale[] = {scale_float(scales[0]), scale_float(scales[1])};
      for (int side = 0; side < 2; ++side) {
        float* out = side ? values : keys;
        const int32_t* place = places_.data() + side * head_size_;
        for (int d = 0; out && d < head_size_; ++d)
          out[d] = numbers_[codes[place[d]]] * scale[side];
      }
      return;
    }
    for (int side = 0; side < 2; ++side) {
      float* out = side ? values : keys;
      const int first = side * head_size_;
      const int32_t* place = places_.data() + first;
      for (int d = 0; out && d < head_size_; ++d) {
        const uint32_t code = codes[place[d] / 2] >> place[d] % 2 * 4 & 15;
        out[d] = decode_int4(code, scale_float(scales[2 * head_size_ + first + d]),
                             scale_float(scales[first + d]));
      }
      if (out && !stored) rotate(out, head_size_, rotated_together(head_size_));
    }
  }

  // From K and V, [2 * D] fp32, to what codes of the format stand for.
  void to_stored(int32_t page_blocks, float* numbers) const {
    if (page_blocks != blocks_per_page(kInt4)) return;
    const int together = rotated_together(head_size_);
    for (int i = 0; i < 2 * head_size_; ++i) numbers[i] /= static_cast<float>(together);
    rotate(numbers, 2 * head_size_, together);
  }

  // The codes of K and V, [2 * D] fp32 as stored, with scales of the format's shape.
  void write(int32_t page_blocks, const uint16_t* scales, const float* numbers, char* out) {
    uint8_t* codes = reinterpret_cast<uint8_t*>(out);
    prepare(page_blocks);
    if (format_ == kFp8) {
      for (int i = 0; i < 2 * head_size_; ++i) {
        const float inverse = inverse_scale(scale_float(scales[i / head_size_]));
        codes[places_[i]] = static_cast<uint8_t>(encode_fp8(numbers[i], inverse));
      }
      return;
    }
    std::memset(codes, 0, head_size_);
    for (int i = 0; i < 2 * head_size_; ++i) {
      const float inverse = inverse_scale(scale_float(scales[i]));
      const uint32_t code =
          encode_int4(numbers[i], scale_float(scales[2 * head_size_ + i]), inverse);
      codes[places_[i] / 2] |= static_cast<uint8_t>(code << places_[i] % 2 * 4);
    }
  }

 private:
  // Tables of a format, made when first needed.
  void prepare(int32_t page_blocks) {
    const int format = page_blocks == blocks_per_page(kFp8) ? kFp8 : kInt4;
    if (format == format_) return;
    format_ = format;
    places_.resize(2 * head_size_);
    for (int d = 0; d < head_size_; ++d) {
      places_[d] = key_place(format, head_size_, d);
      places_[head_size_ + d] = head_size_ + value_place(head_size_, d);
    }
    if (format != kFp8) return;
    numbers_.resize(256);
    for (uint32_t code = 0; code < 256; ++code) numbers_[code] = decode_fp8(code);
  }

  int head_size_, format_ = kAuto;
  std::vector<int32_t> places_;  // [2 * D] of every channel
  std::vector<float> numbers_;   // [256] of every fp8 code
};

}  // namespace kvc
