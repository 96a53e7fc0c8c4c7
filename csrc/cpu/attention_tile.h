// SPDX-License-Identifier: Apache-2.0
// Attention of a tile of query rows over the keys of one head, with online softmax. A row is one
// (token, group member) pair. Prefill runs rows side by side in vector lanes (PanelAttention);
// decode has too few rows for that and runs them one by one (RowAttention).
#pragma once

#include <limits>

#include "key_tile.h"

namespace kvc {

// What both need to know about their rows.
struct QueryRows {
  int64_t count;        // rows in the tile
  const int32_t* seen;  // [count] keys that the row sees, never falling
  float soft_cap;       // of the logits, 0: none
};

// logits = (K tile) * Q^T in panels of 16 rows, so every step of the softmax is vertical.
class PanelAttention {
 public:
  PanelAttention(int64_t max_rows, int64_t head_size)
      : head_size_(head_size),
        padded_(ceil_div(head_size, kPanel) * kPanel),
        max_panels_(ceil_div(max_rows, kPanel)),
        queries_(max_panels_ * head_size * kPanel),
        out_(max_panels_ * kPanel * padded_),
        logits_(kTileKeys * kPanel),
        maximum_(max_panels_ * kPanel),
        sum_(max_panels_ * kPanel) {}

  // Row of the queries as a column: element d goes to query(row)[d * kPanel].
  float* query(int64_t row) { return queries_ + row / kPanel * head_size_ * kPanel + row % kPanel; }

  void begin(int64_t num_rows) {
    num_panels_ = ceil_div(num_rows, kPanel);
    std::fill_n(static_cast<float*>(maximum_), num_panels_ * kPanel,
                -std::numeric_limits<float>::infinity());
    std::fill_n(static_cast<float*>(sum_), num_panels_ * kPanel, 0.0f);
    std::fill_n(static_cast<float*>(out_), num_panels_ * kPanel * padded_, 0.0f);
  }

  // Before the first key.
  void start_row(int64_t row, float maximum, float sum) {
    maximum_[row] = maximum;
    sum_[row] = sum;
  }

  void add(const Simd& simd, KeyTile& tile, const QueryRows& rows, int32_t begin, int32_t count) {
    for (int64_t panel = 0; panel < num_panels_; ++panel) {
      const int64_t first = panel * kPanel;
      const int64_t last = std::min<int64_t>(rows.count, first + kPanel) - 1;
      if (rows.seen[last] <= begin) continue;
      const int32_t seen_by_any = std::min(count, rows.seen[last] - begin);
      int32_t visible[kPanel];
      for (int64_t i = 0; i < kPanel; ++i) {
        visible[i] = rows.seen[std::min(first + i, last)] - begin;
      }
      simd.gemm({tile.keys(), tile.stride(), 1, queries_ + panel * head_size_ * kPanel, kPanel,
                 logits_, kPanel, seen_by_any, head_size_, false});
      if (rows.soft_cap != 0) simd.soft_cap(logits_, seen_by_any * kPanel, rows.soft_cap);
      float correction[kPanel];
      simd.softmax_panel({logits_, seen_by_any, visible[0] < seen_by_any ? visible : nullptr,
                          maximum_ + first, sum_ + first, correction});
      float* out = out_ + first * padded_;
      for (int64_t i = 0; i < kPanel; ++i) {
        if (correction[i] != 1.0f) simd.scale(out + i * padded_, padded_, correction[i]);
      }
      for (int64_t d = 0; d < padded_; d += kPanel) {
        simd.gemm({logits_, 1, kPanel, tile.values() + d, tile.stride(), out + d, padded_, kPanel,
                   seen_by_any, true});
      }
    }
  }

  const float* out(int64_t row) { return out_ + row * padded_; }
  float sum(int64_t row) { return sum_[row]; }

 private:
  int64_t head_size_, padded_, max_panels_, num_panels_ = 0;
  Scratch<float> queries_;  // [panels, D, 16]
  Scratch<float> out_;      // [panels * 16, padded D]
  Scratch<float> logits_;   // [kTileKeys, 16]
  Scratch<float> maximum_, sum_;
};

class RowAttention {
 public:
  RowAttention(int64_t max_rows, int64_t head_size)
      : padded_(ceil_div(head_size, kPanel) * kPanel),
        queries_(max_rows * padded_),
        out_(max_rows * padded_),
        logits_(max_rows * kTileKeys),
        maximum_(max_rows),
        sum_(max_rows) {}

  float* query(int64_t row) { return queries_ + row * padded_; }

  void begin(int64_t num_rows) {
    std::fill_n(static_cast<float*>(maximum_), num_rows, -std::numeric_limits<float>::infinity());
    std::fill_n(static_cast<float*>(sum_), num_rows, 0.0f);
    std::fill_n(static_cast<float*>(out_), num_rows * padded_, 0.0f);
  }

  // Before the first key.
  void start_row(int64_t row, float maximum, float sum) {
    maximum_[row] = maximum;
    sum_[row] = sum;
  }

  void add(const Simd& simd, KeyTile& tile, const QueryRows& rows, int32_t begin, int32_t count) {
    simd.dots(queries_, rows.count, tile.keys(), tile.stride(), count, padded_, logits_, kTileKeys);
    for (int64_t row = 0; row < rows.count; ++row) {
      const int32_t visible = std::clamp(rows.seen[row] - begin, 0, count);
      float* logits = logits_ + row * kTileKeys;
      if (rows.soft_cap != 0) simd.soft_cap(logits, visible, rows.soft_cap);
      const float correction =
          simd.softmax_row(logits, visible, maximum_ + row, static_cast<float*>(sum_) + row);
      std::fill(logits + visible, logits + count, 0.0f);
      if (correction != 1.0f) simd.scale(out_ + row * padded_, padded_, correction);
    }
    for (int64_t d = 0; d < padded_; d += kPanel) {
      simd.gemm({logits_, kTileKeys, 1, tile.values() + d, tile.stride(), out_ + d, padded_,
                 rows.count, count, true});
    }
  }

  const float* out(int64_t row) { return out_ + row * padded_; }
  float sum(int64_t row) { return sum_[row]; }

 private:
  int64_t padded_;
  Scratch<float> queries_;  // [rows, padded D]
  Scratch<float> out_;      // [rows, padded D]
  Scratch<float> logits_;   // [rows, kTileKeys]
  Scratch<float> maximum_, sum_;
};

}  // namespace kvc
