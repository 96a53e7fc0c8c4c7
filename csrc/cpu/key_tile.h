// SPDX-License-Identifier: Apache-2.0
// A tile of keys of one head, gathered from its pages and converted to fp32 once for all queries.
#pragma once

#include "../paged_layout.h"
#include "convert.h"
#include "parallel.h"

namespace kvc {

// One tile of K and V stays in the L2 cache beside the queries.
constexpr int64_t kTileKeys = 64;

class KeyTile {
 public:
  explicit KeyTile(int64_t head_size)
      : head_size_(head_size),
        padded_(ceil_div(head_size, kPanel) * kPanel),
        // The extra panel keeps a column of rows from falling into few sets of the cache.
        stride_(2 * padded_ + kPanel),
        data_(kTileKeys * stride_) {}

  // Keys [begin, begin + count) of the head. The zeros that pad a row are never overwritten.
  template <typename T>
  void load(const Simd& simd, const HeadPages& head, const T* pages, int32_t begin, int32_t count,
            bool with_values) {
    const int64_t row = 2 * head_size_;
    const int32_t page_size = head.block_size;
    float* out = data_;
    for (int32_t key = begin; key < begin + count;) {
      const int32_t offset = key % page_size;
      const int32_t run = std::min(page_size - offset, begin + count - key);
      const T* in = pages + (int64_t{head.page_id(key / page_size)} * page_size + offset) * row;
      for (int32_t i = 0; i < run; ++i, in += row, out += stride_) {
        to_float(simd, in, out, head_size_);
        if (with_values) to_float(simd, in + head_size_, out + padded_, head_size_);
      }
      key += run;
    }
  }

  const float* keys() { return data_; }
  const float* values() { return data_ + padded_; }
  int64_t stride() const { return stride_; }
  int64_t padded() const { return padded_; }

 private:
  int64_t head_size_, padded_, stride_;
  Scratch<float> data_;
};

}  // namespace kvc
