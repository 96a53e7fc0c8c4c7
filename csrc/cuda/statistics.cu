// SPDX-License-Identifier: Apache-2.0
#include "../op_checks.h"
#include "statistics.h"

namespace kvc::gpu {
namespace {

Tensor attention_statistics(const Tensor& ring, const Tensor& pages, const Tensor& block_table,
                            const Tensor& seq_lens, const Tensor& state_slot,
                            const Tensor& num_pages, const Tensor& first_page,
                            const Tensor& covered, const std::optional<Tensor>& page_scales,
                            int64_t page_format, const Tensor& observe_slot,
                            const Tensor& num_queries, const Tensor& new_covered,
                            const Tensor& page_start, int64_t num_candidate_pages, int64_t channels,
                            int64_t query_stride, double scale, double soft_cap,
                            const std::optional<Tensor>& sink_logits) {
  StatisticsParams p{};
  p.rows = check_attention_statistics(ring, pages, block_table, seq_lens, state_slot, num_pages,
                                      first_page, covered, page_scales, page_format, observe_slot,
                                      num_queries, new_covered, page_start, num_candidate_pages,
                                      channels, query_stride);
  const int64_t requests = block_table.size(0), heads = num_pages.size(2);
  const int64_t block_size = p.rows.block_size;
  const int64_t head_size = ring.size(4), window = ring.size(2), group = ring.size(3) / heads;
  const float* sinks = check_logits(soft_cap, sink_logits, num_pages.size(1), ring.size(3), pages);
  check_all_heads(pages, p.rows, requests);
  KVC_CHECK(group <= 16, "ring has ", group, " heads per KV head; the most is 16");
  KVC_CHECK(window >= 1 && window <= 1024, "ring has a window of ", window,
            " queries, not of 1 to 1024");
  const int64_t per_word = 16 / (ring.scalar_type() == ScalarType::Float ? 4 : 2);
  bool aligned = is_aligned(ring.const_data_ptr(), 16);
  for (int64_t d = 0; d < 4; ++d) aligned = aligned && ring.stride(d) % per_word == 0;
  KVC_CHECK(aligned, "the queries in ring must be aligned to 16 bytes");
  const Tensor out = torch::stable::new_empty(
      ring, {count_channels(channels), num_candidate_pages, block_size}, ScalarType::Float);
  if (out.numel() == 0) return out;
  p.observe_slot = observe_slot.const_data_ptr<int32_t>();
  p.num_queries = num_queries.const_data_ptr<int32_t>();
  p.new_covered = new_covered.const_data_ptr<int32_t>();
  p.page_start = page_start.const_data_ptr<int64_t>();
  p.ring = ring.const_data_ptr();
  p.pages = pages.const_data_ptr();
  p.out = out.mutable_data_ptr<float>();
  p.candidates = num_candidate_pages;
  p.num_heads = static_cast<int32_t>(heads);
  p.group = static_cast<int32_t>(group);
  p.ring_layer = ring.stride(0) / per_word;
  p.ring_slot = ring.stride(1) / per_word;
  p.ring_place = ring.stride(2) / per_word;
  p.ring_head = ring.stride(3) / per_word;
  p.window = static_cast<int32_t>(window);
  p.channels = static_cast<uint32_t>(channels);
  p.query_stride = static_cast<int32_t>(query_stride);
  p.logits = {scale, soft_cap, sinks};
  const Launch launch(pages);
  // Places that no head owns are zero, as in the reference.
  STD_CUDA_CHECK(cudaMemsetAsync(p.out, 0, out.numel() * sizeof(float), launch.stream()));
  if (requests == 0) return out;
  // A guess of the longest head, for the grid only: any length is correct.
  const int64_t most_keys = block_table.size(1) * block_size;
  dispatch_dtype(pages.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (page_format == kAuto) {
      launch_statistics<T, false>(launch, pages, p, requests, most_keys, head_size);
    } else if constexpr (!std::is_same_v<T, float>) {  // refused before
      launch_statistics<T, true>(launch, pages, p, requests, most_keys, head_size);
    }
  });
  return out;
}

}  // namespace
}  // namespace kvc::gpu

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CUDA, m) {
  m.impl("attention_statistics", TORCH_BOX(&kvc::gpu::attention_statistics));
}
