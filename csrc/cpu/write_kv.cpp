// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.write_kv on the CPU.
#include <torch/csrc/stable/library.h>

#include "../op_checks.h"
#include "parallel.h"

namespace kvc {
namespace {

void write_kv(const Tensor& key, const Tensor& value, Tensor kv_cache, const Tensor& slot_mapping) {
  check_write_kv(key, value, kv_cache, slot_mapping);
  const int64_t num_tokens = slot_mapping.size(0), heads = kv_cache.size(1);
  const int64_t head_size = key.size(2), block_size = kv_cache.size(2);
  const int64_t num_slots = kv_cache.size(0) * block_size;
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    KVC_CHECK(slots[t] < num_slots, "slot_mapping names slot ", slots[t], " of ", num_slots);
  }

  // Bytes: the op copies values and never looks at them.
  const int64_t bytes = static_cast<int64_t>(key.element_size());
  const char* keys = static_cast<const char*>(key.const_data_ptr());
  const char* values = static_cast<const char*>(value.const_data_ptr());
  char* cache = static_cast<char*>(kv_cache.mutable_data_ptr());
  const int64_t key_token = key.stride(0) * bytes, key_head = key.stride(1) * bytes;
  const int64_t value_token = value.stride(0) * bytes, value_head = value.stride(1) * bytes;
  const int64_t cache_block = kv_cache.stride(0) * bytes, cache_head = kv_cache.stride(1) * bytes;
  const int64_t cache_offset = kv_cache.stride(2) * bytes, size = head_size * bytes;
  const int64_t grain = kWorthThreads / std::max<int64_t>(1, heads * size) + 1;
  torch::stable::parallel_for(0, num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] < 0) continue;
      char* target =
          cache + slots[t] / block_size * cache_block + slots[t] % block_size * cache_offset;
      for (int64_t h = 0; h < heads; ++h, target += cache_head) {
        std::memcpy(target, keys + t * key_token + h * key_head, size);
        std::memcpy(target + size, values + t * value_token + h * value_head, size);
      }
    }
  });
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("write_kv", TORCH_BOX(&kvc::write_kv));
}
