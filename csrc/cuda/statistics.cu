// SPDX-License-Identifier: Apache-2.0
#include "ops.h"
#include "statistics.h"

namespace kvc::gpu {

Tensor attention_statistics(const Tensor& ring, const Tensor& pages, const Tensor& block_table,
                            const Tensor& seq_lens, const Tensor& state_slot,
                            const Tensor& num_pages, const Tensor& first_page,
                            const Tensor& covered, const Tensor& observe_slot,
                            const Tensor& num_queries, const Tensor& new_covered,
                            const Tensor& page_start, int64_t num_candidate_pages, int64_t channels,
                            int64_t query_stride, double scale) {
  StatisticsParams p{};
  p.rows = check_rows(pages, block_table, state_slot, num_pages, first_page, covered);
  const int64_t requests = block_table.size(0), heads = num_pages.size(2);
  const int64_t block_size = p.rows.block_size;
  p.rows.seq_lens = KVC_CHECK_PER_REQUEST(int32_t, seq_lens, requests, pages);
  p.observe_slot = KVC_CHECK_PER_REQUEST(int32_t, observe_slot, requests, pages);
  p.num_queries = KVC_CHECK_PER_REQUEST(int32_t, num_queries, requests, pages);
  p.new_covered = KVC_CHECK_PER_REQUEST(int32_t, new_covered, requests, pages);
  p.page_start = KVC_CHECK_PER_REQUEST(int64_t, page_start, requests, pages);
  KVC_CHECK_TENSOR(ring, pages.scalar_type(), 5, pages);
  KVC_CHECK_LAST_DENSE(ring);
  const int64_t query_heads = ring.size(3), head_size = ring.size(4), window = ring.size(2);
  KVC_CHECK_SIZE(ring, 0, num_pages.size(1));
  KVC_CHECK_SIZE(pages, 2, 2 * head_size);
  const int64_t group = query_heads / heads;
  KVC_CHECK(query_heads % heads == 0 && group >= 1 && group <= 16, "ring has ", query_heads,
            " heads, not 1 to 16 times the ", heads, " KV heads of num_pages");
  KVC_CHECK(block_size >= 8 && (block_size & (block_size - 1)) == 0, "pages have a block size of ",
            block_size, ", not a power of two from 8 on");
  KVC_CHECK(window >= 1 && window <= 1024, "ring has a window of ", window,
            " queries, not of 1 to 1024");
  KVC_CHECK(requests <= 65535, "block_table has ", requests, " rows; the most is 65535");
  KVC_CHECK(p.rows.slots <= 65535, "num_pages has ", p.rows.slots,
            " layers and heads; the most is 65535");
  KVC_CHECK(is_aligned(pages.const_data_ptr(), 16), "pages must be aligned to 16 bytes");
  const int64_t per_word = 16 / (ring.scalar_type() == ScalarType::Float ? 4 : 2);
  bool aligned = is_aligned(ring.const_data_ptr(), 16);
  for (int64_t d = 0; d < 4; ++d) aligned = aligned && ring.stride(d) % per_word == 0;
  KVC_CHECK(aligned, "the queries in ring must be aligned to 16 bytes");
  KVC_CHECK(num_candidate_pages >= 0, "num_candidate_pages is negative");
  const int64_t num_channels = check_observation(channels, query_stride);
  const Tensor out = torch::stable::new_empty(ring, {num_channels, num_candidate_pages, block_size},
                                              ScalarType::Float);
  if (out.numel() == 0) return out;
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
  p.scale_log2 = static_cast<float>(scale) * kLog2E;
  const Launch launch(pages);
  // Places that no head owns are zero, as in the reference.
  STD_CUDA_CHECK(cudaMemsetAsync(p.out, 0, out.numel() * sizeof(float), launch.stream()));
  if (requests == 0) return out;
  // A guess of the longest head, for the grid only: any length is correct.
  const int64_t most_keys = block_table.size(1) * block_size;
  dispatch_dtype(pages.scalar_type(), [&](auto type) {
    launch_statistics<decltype(type)>(launch, pages, p, requests, most_keys, head_size);
  });
  return out;
}

}  // namespace kvc::gpu
