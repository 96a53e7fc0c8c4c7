// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.observe_queries on the CPU.
#include <torch/csrc/stable/library.h>

#include "../op_checks.h"
#include "parallel.h"

namespace kvc {
namespace {

void observe_queries(const Tensor& query, const Tensor& ring_index, Tensor ring) {
  check_observe_queries(query, ring_index, ring);
  const int64_t num_tokens = ring_index.size(0), heads = ring.size(1);
  const int32_t* index = ring_index.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    KVC_CHECK(index[t] < ring.size(0), "ring_index names place ", index[t], " of ", ring.size(0));
  }

  const int64_t bytes = static_cast<int64_t>(query.element_size());
  const int64_t size = ring.size(2) * bytes;
  const char* source = static_cast<const char*>(query.const_data_ptr());
  char* target = static_cast<char*>(ring.mutable_data_ptr());
  const int64_t query_token = query.stride(0) * bytes, query_head = query.stride(1) * bytes;
  const int64_t ring_place = ring.stride(0) * bytes, ring_head = ring.stride(1) * bytes;
  const int64_t grain = kWorthThreads / std::max<int64_t>(1, heads * size) + 1;
  torch::stable::parallel_for(0, num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (index[t] < 0) continue;
      for (int64_t h = 0; h < heads; ++h) {
        std::memcpy(target + index[t] * ring_place + h * ring_head,
                    source + t * query_token + h * query_head, size);
      }
    }
  });
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("observe_queries", TORCH_BOX(&kvc::observe_queries));
}
