// SPDX-License-Identifier: Apache-2.0
// write_kv and observe_queries: scattered copies of whole vectors. Letters:
// kvcompress_vllm/cache/layout.py.
#pragma once

#include "gpu.cuh"

namespace kvc::gpu {

// Sizes and strides are in words of type V, so the same code serves 16-byte and 2-byte copies.
struct WriteKvParams {
  const void* key;              // [>= T, H, D]
  const void* value;            // [>= T, H, D]
  void* cache;                  // [N, H, B, 2 * D]
  const int64_t* slot_mapping;  // [T], -1 skips
  int64_t key_stride_t, key_stride_h, value_stride_t, value_stride_h;
  int64_t cache_stride_n, cache_stride_h, cache_stride_b;
  int32_t num_heads;   // H
  int32_t block_size;  // B
  int32_t words;       // V per vector of D
};

template <typename V>
__global__ void write_kv_kernel(WriteKvParams p) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const int64_t slot = p.slot_mapping[blockIdx.x];
  if (slot < 0) return;
  const int64_t token = blockIdx.x;
  V* target = static_cast<V*>(p.cache) + slot / p.block_size * p.cache_stride_n +
              slot % p.block_size * p.cache_stride_b;
  const V* key = static_cast<const V*>(p.key) + token * p.key_stride_t;
  const V* value = static_cast<const V*>(p.value) + token * p.value_stride_t;
  for (int i = threadIdx.x; i < p.num_heads * 2 * p.words; i += blockDim.x) {
    const int h = i / (2 * p.words), w = i % (2 * p.words);
    target[h * p.cache_stride_h + w] =
        w < p.words ? key[h * p.key_stride_h + w] : value[h * p.value_stride_h + w - p.words];
  }
}

struct ObserveParams {
  const void* query;          // [>= T, H * G, D]
  void* ring;                 // [O * W, H * G, D]
  const int32_t* ring_index;  // [T], -1 skips
  int64_t query_stride_t, query_stride_h, ring_stride_t, ring_stride_h;
  int32_t num_heads;  // H * G
  int32_t words;      // V per vector of D
};

template <typename V>
__global__ void observe_queries_kernel(ObserveParams p) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const int64_t token = blockIdx.x, index = p.ring_index[blockIdx.x];
  if (index < 0) return;
  const V* query = static_cast<const V*>(p.query) + token * p.query_stride_t;
  V* ring = static_cast<V*>(p.ring) + index * p.ring_stride_t;
  for (int i = threadIdx.x; i < p.num_heads * p.words; i += blockDim.x) {
    const int h = i / p.words, w = i % p.words;
    ring[h * p.ring_stride_h + w] = query[h * p.query_stride_h + w];
  }
}

}  // namespace kvc::gpu
