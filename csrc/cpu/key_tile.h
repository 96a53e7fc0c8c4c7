// SPDX-License-Identifier: Apache-2.0
// A tile of keys of one head, gathered from its pages and converted to fp32 once for all queries.
#pragma once

#include "../paged_layout.h"
#include "codes.h"
#include "convert.h"
#include "parallel.h"

namespace kvc {

// One tile of K and V stays in the L2 cache beside the queries.
constexpr int64_t kTileKeys = 64;

enum class Part { kKeys, kValues, kBoth };

class KeyTile {
 public:
  explicit KeyTile(int64_t head_size)
      : head_size_(head_size),
        padded_(ceil_div(head_size, kPanel) * kPanel),
        // The extra panel keeps a column of rows from falling into few sets of the cache.
        stride_(2 * padded_ + kPanel),
        data_(kTileKeys * stride_),
        codes_(head_size) {}

  // Keys [begin, begin + count) of the head; with Part::kValues their values in the keys' place.
  // The zeros that pad a row are never overwritten.
  template <typename T>
  void load(const Simd& simd, const HeadPages& head, const T* pages, int32_t begin, int32_t count,
            Part part) {
    const int64_t row = 2 * head_size_, page_bytes = row * head.block_size * int64_t{sizeof(T)};
    const int32_t packed = head.page_blocks > 1 ? head.packed_keys() : 0;
    const char* bytes = reinterpret_cast<const char*>(pages);
    float* out = data_;
    for (int32_t key = begin; key < begin + count;) {
      const auto [page, offset] = head.place(key);
      const bool coded = key < packed;
      const int32_t page_keys =
          head.block_size * (coded || head.page_blocks == 1 ? head.page_blocks : 1);
      const int32_t run = std::min(page_keys - offset, begin + count - key);
      const char* in = bytes + head.page_id(page) * page_bytes + page_bytes / page_keys * offset;
      for (int32_t i = 0; i < run; ++i, in += page_bytes / page_keys, out += stride_) {
        if (coded) {
          codes_.read(head, in, part != Part::kValues ? out : nullptr,
                      part == Part::kBoth     ? out + padded_
                      : part == Part::kValues ? out
                                              : nullptr);
          continue;
        }
        const T* numbers = reinterpret_cast<const T*>(in);
        if (part != Part::kValues) to_float(simd, numbers, out, head_size_);
        if (part == Part::kValues) to_float(simd, numbers + head_size_, out, head_size_);
        if (part == Part::kBoth) to_float(simd, numbers + head_size_, out + padded_, head_size_);
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
  Codes codes_;
};

}  // namespace kvc
