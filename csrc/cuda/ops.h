// SPDX-License-Identifier: Apache-2.0
// The ops, as registered. Meaning of every argument: kvcompress_vllm/ops/reference.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace kvc::gpu {

using torch::stable::Tensor;

void write_kv(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
              const Tensor& slot_mapping);

void observe_queries(const Tensor& query, const Tensor& ring_index, const Tensor& ring);

void paged_attention(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                     const Tensor& seq_lens, const Tensor& state_slot, const Tensor& num_pages,
                     const Tensor& first_page, const Tensor& covered,
                     const std::optional<Tensor>& page_scales, int64_t page_format,
                     const Tensor& query_start, int64_t layer, double scale, const Tensor& out);

Tensor attention_statistics(const Tensor& ring, const Tensor& pages, const Tensor& block_table,
                            const Tensor& seq_lens, const Tensor& state_slot,
                            const Tensor& num_pages, const Tensor& first_page,
                            const Tensor& covered, const std::optional<Tensor>& page_scales,
                            int64_t page_format, const Tensor& observe_slot,
                            const Tensor& num_queries, const Tensor& new_covered,
                            const Tensor& page_start, int64_t num_candidate_pages, int64_t channels,
                            int64_t query_stride, double scale);

Tensor key_statistics(const Tensor& pages, const Tensor& block_table, const Tensor& seq_lens,
                      const Tensor& state_slot, const Tensor& num_pages, const Tensor& first_page,
                      const Tensor& covered, const std::optional<Tensor>& page_scales,
                      int64_t page_format, const Tensor& new_covered, const Tensor& page_start,
                      int64_t num_candidate_pages, int64_t channels);

void echo_scores(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                 const Tensor& seq_lens, const Tensor& state_slot, const Tensor& num_pages,
                 const Tensor& first_page, const Tensor& covered,
                 const std::optional<Tensor>& page_scales, int64_t page_format,
                 const Tensor& segments, const Tensor& rotation, int64_t layer, int64_t max_segment,
                 int64_t num_sinks, bool interleaved, double scale, const Tensor& scores);

std::tuple<Tensor, Tensor, Tensor> select_pages(const Tensor& scores, const Tensor& page_start,
                                                const Tensor& state_slot, const Tensor& num_pages,
                                                const Tensor& first_page, const Tensor& covered,
                                                const std::optional<Tensor>& page_scales,
                                                int64_t page_format, const Tensor& new_covered,
                                                const Tensor& num_freed, const Tensor& num_recent,
                                                int64_t num_sinks, int64_t floor_pages,
                                                int64_t num_kept_pages);

Tensor fit_scales(const Tensor& pages, const Tensor& block_table, const Tensor& state_slot,
                  const Tensor& num_pages, const Tensor& first_page, const Tensor& covered,
                  const std::optional<Tensor>& page_scales, int64_t page_format,
                  const Tensor& kept_pages, const Tensor& kept_first, const Tensor& kept_keys);

void compact_pages(const Tensor& pages, const Tensor& block_table, const Tensor& state_slot,
                   const Tensor& num_pages, const Tensor& first_page, const Tensor& covered,
                   const std::optional<Tensor>& page_scales, int64_t page_format,
                   const Tensor& kept_pages, const Tensor& kept_first, const Tensor& kept_keys,
                   const Tensor& new_blocks, const std::optional<Tensor>& new_scales);

}  // namespace kvc::gpu
