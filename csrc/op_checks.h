// SPDX-License-Identifier: Apache-2.0
// One check per op: dtypes, shapes and strides of its arguments, the same on every device. What
// only one device's kernels need (head sizes, alignment, values) is checked beside them.
#pragma once

#include "checks.h"

namespace kvc {

// key, value [>= T, H, D], kv_cache [N, H, B, 2 * D], slot_mapping [T].
inline void check_write_kv(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                           const Tensor& slot_mapping) {
  KVC_CHECK_CACHE_DTYPE(kv_cache);
  KVC_CHECK_TENSOR(kv_cache, kv_cache.scalar_type(), 4, kv_cache);
  KVC_CHECK_TENSOR(key, kv_cache.scalar_type(), 3, kv_cache);
  KVC_CHECK_TENSOR(value, kv_cache.scalar_type(), 3, kv_cache);
  KVC_CHECK_TENSOR(slot_mapping, ScalarType::Long, 1, kv_cache);
  KVC_CHECK_LAST_DENSE(kv_cache);
  KVC_CHECK_LAST_DENSE(key);
  KVC_CHECK_LAST_DENSE(value);
  KVC_CHECK_DENSE(slot_mapping);
  const int64_t num_tokens = slot_mapping.size(0), heads = kv_cache.size(1);
  KVC_CHECK_SIZE(kv_cache, 3, 2 * key.size(2));
  KVC_CHECK_SIZE(key, 1, heads);
  KVC_CHECK_SIZE(value, 1, heads);
  KVC_CHECK_SIZE(value, 2, key.size(2));
  KVC_CHECK(key.size(0) >= num_tokens && value.size(0) >= num_tokens, "key and value hold ",
            key.size(0), " and ", value.size(0), " tokens, slot_mapping ", num_tokens);
}

// query [>= T, H * G, D], ring_index [T], ring [O * W, H * G, D].
inline void check_observe_queries(const Tensor& query, const Tensor& ring_index,
                                  const Tensor& ring) {
  KVC_CHECK_CACHE_DTYPE(ring);
  KVC_CHECK_TENSOR(ring, ring.scalar_type(), 3, ring);
  KVC_CHECK_TENSOR(query, ring.scalar_type(), 3, ring);
  KVC_CHECK_TENSOR(ring_index, ScalarType::Int, 1, ring);
  KVC_CHECK_LAST_DENSE(ring);
  KVC_CHECK_LAST_DENSE(query);
  KVC_CHECK_DENSE(ring_index);
  KVC_CHECK_SIZE(query, 1, ring.size(1));
  KVC_CHECK_SIZE(query, 2, ring.size(2));
  KVC_CHECK(query.size(0) >= ring_index.size(0), "query holds ", query.size(0),
            " tokens, ring_index ", ring_index.size(0));
}

// Query tokens of a row that are to read its keys together.
inline void check_decode_query_len(int64_t decode_query_len) {
  KVC_CHECK(decode_query_len >= 1, "decode_query_len must be 1 or more, not ", decode_query_len);
}

// The rows, query and out [>= T, H * G, D], query_start [R + 1]. Returns the rows.
inline PagedRows check_paged_attention(const Tensor& query, const Tensor& pages,
                                       const Tensor& block_table, const Tensor& seq_lens,
                                       const Tensor& state_slot, const Tensor& num_pages,
                                       const Tensor& first_page, const Tensor& covered,
                                       const std::optional<Tensor>& page_scales,
                                       int64_t page_format, const Tensor& query_start,
                                       int64_t layer, const Tensor& out) {
  PagedRows rows = check_rows(pages, block_table, state_slot, num_pages, first_page, covered,
                              page_scales, page_format);
  const int64_t num_requests = block_table.size(0);
  rows.seq_lens = KVC_CHECK_PER_REQUEST(int32_t, seq_lens, num_requests, pages);
  KVC_CHECK_TENSOR(query, pages.scalar_type(), 3, pages);
  KVC_CHECK_TENSOR(out, pages.scalar_type(), 3, pages);
  KVC_CHECK_LAST_DENSE(query);
  KVC_CHECK_LAST_DENSE(out);
  KVC_CHECK_TENSOR(query_start, ScalarType::Int, 1, pages);
  KVC_CHECK_DENSE(query_start);
  KVC_CHECK_SIZE(query_start, 0, num_requests + 1);
  const int64_t heads = num_pages.size(2), head_size = query.size(2);
  KVC_CHECK_SIZE(pages, 2, 2 * head_size);
  KVC_CHECK(query.size(1) > 0 && query.size(1) % heads == 0, "query has ", query.size(1),
            " heads, not a multiple of the ", heads, " KV heads of num_pages");
  KVC_CHECK_SIZE(out, 1, query.size(1));
  KVC_CHECK_SIZE(out, 2, head_size);
  KVC_CHECK(0 <= layer && layer < num_pages.size(1), "layer must be in [0, ", num_pages.size(1),
            "), not ", layer);
  return rows;
}

// The rows, and where the statistics of their candidates go: new_covered and page_start [R].
// Returns the rows.
inline PagedRows check_candidates(const Tensor& pages, const Tensor& block_table,
                                  const Tensor& seq_lens, const Tensor& state_slot,
                                  const Tensor& num_pages, const Tensor& first_page,
                                  const Tensor& covered, const std::optional<Tensor>& page_scales,
                                  int64_t page_format, const Tensor& new_covered,
                                  const Tensor& page_start, int64_t num_candidate_pages) {
  PagedRows rows = check_rows(pages, block_table, state_slot, num_pages, first_page, covered,
                              page_scales, page_format);
  const int64_t requests = block_table.size(0);
  rows.seq_lens = KVC_CHECK_PER_REQUEST(int32_t, seq_lens, requests, pages);
  KVC_CHECK_PER_REQUEST(int32_t, new_covered, requests, pages);
  KVC_CHECK_PER_REQUEST(int64_t, page_start, requests, pages);
  KVC_CHECK(num_candidate_pages >= 0, "num_candidate_pages is negative");
  return rows;
}

// The candidates, ring [L, O, W, H * G, D], observe_slot and num_queries [R]. Returns the rows.
inline PagedRows check_attention_statistics(
    const Tensor& ring, const Tensor& pages, const Tensor& block_table, const Tensor& seq_lens,
    const Tensor& state_slot, const Tensor& num_pages, const Tensor& first_page,
    const Tensor& covered, const std::optional<Tensor>& page_scales, int64_t page_format,
    const Tensor& observe_slot, const Tensor& num_queries, const Tensor& new_covered,
    const Tensor& page_start, int64_t num_candidate_pages, int64_t channels, int64_t query_stride) {
  const PagedRows rows =
      check_candidates(pages, block_table, seq_lens, state_slot, num_pages, first_page, covered,
                       page_scales, page_format, new_covered, page_start, num_candidate_pages);
  const int64_t requests = block_table.size(0), heads = num_pages.size(2);
  KVC_CHECK_PER_REQUEST(int32_t, observe_slot, requests, pages);
  KVC_CHECK_PER_REQUEST(int32_t, num_queries, requests, pages);
  KVC_CHECK_TENSOR(ring, pages.scalar_type(), 5, pages);
  KVC_CHECK_LAST_DENSE(ring);
  KVC_CHECK_SIZE(ring, 0, num_pages.size(1));
  KVC_CHECK_SIZE(pages, 2, 2 * ring.size(4));
  KVC_CHECK(ring.size(3) > 0 && ring.size(3) % heads == 0, "ring has ", ring.size(3),
            " heads, not a multiple of the ", heads, " KV heads of num_pages");
  check_channels(channels, kAttentionChannels);
  KVC_CHECK(1 <= query_stride && query_stride <= INT32_MAX,
            "query_stride must be a positive 32-bit number, not ", query_stride);
  return rows;
}

// The candidates of pages that hold as much K as V. Returns the rows.
inline PagedRows check_key_statistics(const Tensor& pages, const Tensor& block_table,
                                      const Tensor& seq_lens, const Tensor& state_slot,
                                      const Tensor& num_pages, const Tensor& first_page,
                                      const Tensor& covered,
                                      const std::optional<Tensor>& page_scales, int64_t page_format,
                                      const Tensor& new_covered, const Tensor& page_start,
                                      int64_t num_candidate_pages, int64_t channels) {
  const PagedRows rows =
      check_candidates(pages, block_table, seq_lens, state_slot, num_pages, first_page, covered,
                       page_scales, page_format, new_covered, page_start, num_candidate_pages);
  KVC_CHECK(pages.size(2) > 0 && pages.size(2) % 2 == 0, "pages have ", pages.size(2),
            " numbers per key, not K and V of one size");
  check_channels(channels, kKeyChannels);
  return rows;
}

// The rows, query [>= T, H * G, D], segments [S, 4], rotation [n, 2], scores [P, T]. Returns the
// rows.
inline PagedRows check_echo_scores(const Tensor& query, const Tensor& pages,
                                   const Tensor& block_table, const Tensor& seq_lens,
                                   const Tensor& state_slot, const Tensor& num_pages,
                                   const Tensor& first_page, const Tensor& covered,
                                   const std::optional<Tensor>& page_scales, int64_t page_format,
                                   const Tensor& segments, const Tensor& rotation, int64_t layer,
                                   int64_t max_segment, int64_t num_sinks, const Tensor& scores) {
  PagedRows rows = check_rows(pages, block_table, state_slot, num_pages, first_page, covered,
                              page_scales, page_format);
  rows.seq_lens = KVC_CHECK_PER_REQUEST(int32_t, seq_lens, block_table.size(0), pages);
  KVC_CHECK_TENSOR(query, pages.scalar_type(), 3, pages);
  KVC_CHECK_LAST_DENSE(query);
  const int64_t heads = num_pages.size(2), head_size = query.size(2);
  KVC_CHECK_SIZE(pages, 2, 2 * head_size);
  KVC_CHECK(query.size(1) > 0 && query.size(1) % heads == 0, "query has ", query.size(1),
            " heads, not a multiple of the ", heads, " KV heads of num_pages");
  KVC_CHECK_TENSOR(segments, ScalarType::Int, 2, pages);
  KVC_CHECK_DENSE(segments);
  KVC_CHECK_SIZE(segments, 1, 4);
  KVC_CHECK_TENSOR(rotation, ScalarType::Float, 2, pages);
  KVC_CHECK_DENSE(rotation);
  KVC_CHECK_SIZE(rotation, 1, 2);
  KVC_CHECK(2 * rotation.size(0) <= head_size, "rotation has ", rotation.size(0),
            " pairs, the head only ", head_size, " dimensions");
  KVC_CHECK_TENSOR(scores, ScalarType::Float, 2, pages);
  KVC_CHECK_DENSE(scores);
  KVC_CHECK_SIZE(scores, 0, pages.size(0));
  KVC_CHECK_SIZE(scores, 1, rows.page_blocks * pages.size(1));
  KVC_CHECK(0 <= layer && layer < num_pages.size(1), "layer must be in [0, ", num_pages.size(1),
            "), not ", layer);
  KVC_CHECK(max_segment >= 1, "max_segment must be positive, not ", max_segment);
  KVC_CHECK(num_sinks >= 0, "num_sinks must not be negative");
  return rows;
}

// scores [pages, B], the state, page_start, new_covered and num_recent [R], num_freed [R, A].
// Returns the state part of the rows.
inline PagedRows check_select_pages(const Tensor& scores, const Tensor& page_start,
                                    const Tensor& state_slot, const Tensor& num_pages,
                                    const Tensor& first_page, const Tensor& covered,
                                    const std::optional<Tensor>& page_scales, int64_t page_format,
                                    const Tensor& new_covered, const Tensor& num_freed,
                                    const Tensor& num_recent, int64_t num_sinks,
                                    int64_t floor_pages, int64_t num_kept_pages) {
  KVC_CHECK_TENSOR(scores, ScalarType::Float, 2, scores);
  KVC_CHECK_DENSE(scores);
  KVC_CHECK(scores.size(1) > 0, "scores must hold at least one key per page");
  KVC_CHECK_TENSOR(num_freed, ScalarType::Int, 2, scores);
  KVC_CHECK_DENSE(num_freed);
  const int64_t requests = num_freed.size(0), groups = num_freed.size(1);
  const PagedRows rows = check_state(state_slot, num_pages, first_page, covered, page_scales,
                                     page_format, requests, scores.size(1), scores);
  KVC_CHECK(groups > 0 && rows.slots % groups == 0, "num_freed has ", groups, " groups for ",
            rows.slots, " heads");
  KVC_CHECK_PER_REQUEST(int64_t, page_start, requests, scores);
  KVC_CHECK_PER_REQUEST(int32_t, new_covered, requests, scores);
  KVC_CHECK_PER_REQUEST(int32_t, num_recent, requests, scores);
  KVC_CHECK(num_sinks >= 0 && floor_pages >= 0 && num_kept_pages >= 0,
            "num_sinks, floor_pages and num_kept_pages must not be negative");
  return rows;
}

// The rows, kept_pages and kept_first [R, L, H], kept_keys [kept pages, T]. `codes`: pages are
// [P, B, 2 * D], else [P, T, n]. Returns the rows, without seq_lens.
inline PagedRows check_kept(const Tensor& pages, const Tensor& block_table,
                            const Tensor& state_slot, const Tensor& num_pages,
                            const Tensor& first_page, const Tensor& covered,
                            const std::optional<Tensor>& page_scales, int64_t page_format,
                            const Tensor& kept_pages, const Tensor& kept_first,
                            const Tensor& kept_keys, bool codes) {
  PagedRows rows = check_rows(pages, block_table, state_slot, num_pages, first_page, covered,
                              page_scales, page_format, codes);
  const int64_t requests = block_table.size(0), m = rows.page_blocks;
  KVC_CHECK_TENSOR(kept_pages, ScalarType::Int, 3, pages);
  KVC_CHECK_TENSOR(kept_first, ScalarType::Int, 3, pages);
  KVC_CHECK_TENSOR(kept_keys, ScalarType::Int, 2, pages);
  KVC_CHECK_DENSE(kept_pages);
  KVC_CHECK_DENSE(kept_first);
  KVC_CHECK_DENSE(kept_keys);
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t expected = d == 0 ? requests : num_pages.size(d);
    KVC_CHECK_SIZE(kept_pages, d, expected);
    KVC_CHECK_SIZE(kept_first, d, expected);
  }
  if (codes) {
    KVC_CHECK_SIZE(kept_keys, 1, pages.size(1) * m);
  } else {
    KVC_CHECK_SIZE(kept_keys, 1, pages.size(1));
    KVC_CHECK(pages.size(1) % m == 0, "pages hold ", pages.size(1), " keys, not a multiple of ", m);
    rows.block_size = static_cast<int32_t>(pages.size(1) / m);
  }
  return rows;
}

inline PagedRows check_fit_scales(const Tensor& pages, const Tensor& block_table,
                                  const Tensor& state_slot, const Tensor& num_pages,
                                  const Tensor& first_page, const Tensor& covered,
                                  const std::optional<Tensor>& page_scales, int64_t page_format,
                                  const Tensor& kept_pages, const Tensor& kept_first,
                                  const Tensor& kept_keys) {
  const PagedRows rows =
      check_kept(pages, block_table, state_slot, num_pages, first_page, covered, page_scales,
                 page_format, kept_pages, kept_first, kept_keys, true);
  KVC_CHECK(page_format != kAuto, "page_format auto has no scales");
  return rows;
}

// The same, new_blocks [R, >= C], and new_scales [R, L, H, A, S] if pages are to hold codes.
inline PagedRows check_compact_pages(const Tensor& pages, const Tensor& block_table,
                                     const Tensor& state_slot, const Tensor& num_pages,
                                     const Tensor& first_page, const Tensor& covered,
                                     const std::optional<Tensor>& page_scales, int64_t page_format,
                                     const Tensor& kept_pages, const Tensor& kept_first,
                                     const Tensor& kept_keys, const Tensor& new_blocks,
                                     const std::optional<Tensor>& new_scales) {
  const PagedRows rows =
      check_kept(pages, block_table, state_slot, num_pages, first_page, covered, page_scales,
                 page_format, kept_pages, kept_first, kept_keys, new_scales.has_value());
  KVC_CHECK_TENSOR(new_blocks, ScalarType::Int, 2, pages);
  KVC_CHECK_LAST_DENSE(new_blocks);
  KVC_CHECK_SIZE(new_blocks, 0, block_table.size(0));
  if (!new_scales) return rows;
  KVC_CHECK(page_format != kAuto, "new_scales are of no use with page_format auto");
  check_tensor(*new_scales, "new_scales", ScalarType::BFloat16, 5, pages);
  KVC_CHECK(new_scales->is_contiguous(), "new_scales must be contiguous");
  for (int64_t d = 0; d < 5; ++d) {
    const int64_t expected = d == 0 ? block_table.size(0) : page_scales->size(d);
    KVC_CHECK(new_scales->size(d) == expected, "new_scales must have size ", expected,
              " in dimension ", d, ", not ", new_scales->size(d));
  }
  return rows;
}

}  // namespace kvc
