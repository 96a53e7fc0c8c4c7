// SPDX-License-Identifier: Apache-2.0
// Inner loops on fp32 arrays, compiled once per x86 instruction set and chosen when first used.
#pragma once

#include <cstdint>

#include "../channels.h"

namespace kvc {

// Rows or columns handled side by side by every function below, whatever the vector width.
constexpr int kPanel = 16;
// Softmax runs in base 2; this factor on the logits makes it the natural one.
constexpr float kLog2E = 1.4426950408889634f;

// C[m, 16] = A[m, depth] * B[depth, 16], or += with `add`. Strides are in elements.
struct Gemm {
  const float* a;
  int64_t a_row, a_depth;
  const float* b;
  int64_t b_depth;
  float* c;
  int64_t c_row;
  int64_t m, depth;
  bool add;
};

// Softmax of 16 queries (lanes) over a tile of keys. Logits are in units of log 2. A query that has
// seen no key at all ends with a sum of NaN, which the caller does not use.
struct SoftmaxPanel {
  float* logits;           // [num_keys, 16], replaced by exp2(logit - running maximum)
  int64_t num_keys;        // in this tile
  const int32_t* visible;  // [16] keys of the tile that the query sees, nullptr: all
  float* maximum;          // [16] running, -inf at first
  float* sum;              // [16] running, 0 at first
  float* correction;       // [16] factor on what was accumulated with the old maximum
};

// Column sums over one tile of probabilities, see the attention_statistics op.
struct StatisticsTile {
  float* logits;              // [group, query_panels, num_keys, 16], replaced by probabilities
  int64_t group_stride;       // elements
  int64_t panel_stride;       // elements
  int64_t group;              // G
  int64_t query_panels;       // panels of 16 observed queries
  int64_t num_queries;        // at least 1; lanes from here on are idle
  int64_t num_keys;           // in this tile
  const float* maximum;       // [group, query_panels, 16] final
  const float* inverse;       // [group, query_panels, 16] 1 / sum of exponentials
  const float* log2_inverse;  // [group, query_panels, 16] its logarithm; for kEntropy alone
  const float* uniform;       // [query_panels, 16] 1 / keys that the query sees
  const int32_t* visible;     // [query_panels, 16] keys of this tile that the query sees
  float* out[kNumAttentionChannels];  // [num_keys] each, by Channel; nullptr: not wanted
};

struct Simd {
  void (*gemm)(const Gemm&);
  // out[r, k] = dot(q[r], keys[k]); sizes padded with zeros to a multiple of 16.
  void (*dots)(const float* q, int64_t num_rows, const float* keys, int64_t key_stride,
               int64_t num_keys, int64_t size, float* out, int64_t out_stride);
  // out[k] = dot(keys[k], keys[k]); size as above.
  void (*squares)(const float* keys, int64_t key_stride, int64_t num_keys, int64_t size,
                  float* out);
  // logits = cap * tanh(logits), of `count` of them and up to 15 behind.
  void (*soft_cap)(float* logits, int64_t count, float cap);
  void (*softmax_panel)(const SoftmaxPanel&);
  // As softmax_panel for one query; returns the correction.
  float (*softmax_row)(float* logits, int64_t num_keys, float* maximum, float* sum);
  void (*scale)(float* values, int64_t count, float factor);
  void (*statistics)(const StatisticsTile&);
  // top[k, i] = max(top[k, i], logits[k, i] - shift[i]) for 16 lanes i; a NaN stays.
  void (*raise)(const float* logits, const float* shift, int64_t num_keys, float* top);
  void (*from_half)(const uint16_t* in, float* out, int64_t count);
  void (*from_bfloat16)(const uint16_t* in, float* out, int64_t count);
};

// The best version for this machine. ATEN_CPU_CAPABILITY (default, avx2, avx512) limits it, as it
// does PyTorch's own kernels.
const Simd& simd();

}  // namespace kvc
