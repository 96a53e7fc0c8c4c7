// SPDX-License-Identifier: Apache-2.0
#include "../op_checks.h"
#include "copy.cuh"
#include "launch.h"

namespace kvc::gpu {
namespace {

// 16 when every pointer and stride (in elements) allows 16-byte copies, else the element size.
int64_t copy_width(int64_t element, std::initializer_list<const void*> pointers,
                   std::initializer_list<int64_t> strides) {
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer, 16)) return element;
  }
  for (int64_t stride : strides) {
    if (stride * element % 16 != 0) return element;
  }
  return 16;
}

template <typename F>
void dispatch_width(int64_t width, F&& f) {
  if (width == 16) {
    f(uint4{});
  } else if (width == 4) {
    f(uint32_t{});
  } else {
    f(uint16_t{});
  }
}

int threads_for(int64_t words) {
  return static_cast<int>(words >= 256 ? 256 : (words + kWarp - 1) / kWarp * kWarp);
}

void write_kv(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
              const Tensor& slot_mapping) {
  check_write_kv(key, value, kv_cache, slot_mapping);
  const int64_t tokens = slot_mapping.size(0), heads = kv_cache.size(1), size = key.size(2);
  if (tokens == 0 || heads == 0 || size == 0) return;
  const int64_t element = kv_cache.element_size();
  const int64_t width =
      copy_width(element, {key.const_data_ptr(), value.const_data_ptr(), kv_cache.const_data_ptr()},
                 {size, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
                  kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2)});
  const int64_t per = width / element;  // elements in a word
  WriteKvParams p{};
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.cache = kv_cache.mutable_data_ptr();
  p.slot_mapping = slot_mapping.const_data_ptr<int64_t>();
  p.key_stride_t = key.stride(0) / per;
  p.key_stride_h = key.stride(1) / per;
  p.value_stride_t = value.stride(0) / per;
  p.value_stride_h = value.stride(1) / per;
  p.cache_stride_n = kv_cache.stride(0) / per;
  p.cache_stride_h = kv_cache.stride(1) / per;
  p.cache_stride_b = kv_cache.stride(2) / per;
  p.num_heads = static_cast<int32_t>(heads);
  p.block_size = static_cast<int32_t>(kv_cache.size(2));
  p.words = static_cast<int32_t>(size / per);
  const Launch launch(kv_cache);
  dispatch_width(width, [&](auto word) {
    launch.chained(write_kv_kernel<decltype(word)>, tokens, threads_for(heads * 2 * p.words), 0, p);
  });
}

void observe_queries(const Tensor& query, const Tensor& ring_index, const Tensor& ring) {
  check_observe_queries(query, ring_index, ring);
  const int64_t tokens = ring_index.size(0), heads = ring.size(1), size = ring.size(2);
  if (tokens == 0 || heads == 0 || size == 0) return;
  const int64_t element = ring.element_size();
  const int64_t width =
      copy_width(element, {query.const_data_ptr(), ring.const_data_ptr()},
                 {size, query.stride(0), query.stride(1), ring.stride(0), ring.stride(1)});
  const int64_t per = width / element;
  ObserveParams p{};
  p.query = query.const_data_ptr();
  p.ring = ring.mutable_data_ptr();
  p.ring_index = ring_index.const_data_ptr<int32_t>();
  p.query_stride_t = query.stride(0) / per;
  p.query_stride_h = query.stride(1) / per;
  p.ring_stride_t = ring.stride(0) / per;
  p.ring_stride_h = ring.stride(1) / per;
  p.num_heads = static_cast<int32_t>(heads);
  p.words = static_cast<int32_t>(size / per);
  const Launch launch(ring);
  dispatch_width(width, [&](auto word) {
    launch.chained(observe_queries_kernel<decltype(word)>, tokens, threads_for(heads * p.words), 0,
                   p);
  });
}

}  // namespace
}  // namespace kvc::gpu

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CUDA, m) {
  m.impl("write_kv", TORCH_BOX(&kvc::gpu::write_kv));
  m.impl("observe_queries", TORCH_BOX(&kvc::gpu::observe_queries));
}
