// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <climits>

#include "../op_checks.h"
#include "attention.h"

namespace kvc::gpu {
namespace {

// One call serves mixed batches: which rows are decode and which prefill is decided on the device.
// A batch of no more tokens than its rows have in a step of speculation (decode_query_len each) is
// taken for decode, so that a captured decode step launches no prefill kernel; its rows with more
// tokens, if any, are served in several passes over their keys.
void paged_attention(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                     const Tensor& seq_lens, const Tensor& state_slot, const Tensor& num_pages,
                     const Tensor& first_page, const Tensor& covered,
                     const std::optional<Tensor>& page_scales, int64_t page_format,
                     const Tensor& query_start, int64_t layer, double scale, const Tensor& out,
                     double soft_cap, const std::optional<Tensor>& sink_logits,
                     int64_t decode_query_len) {
  const PagedRows rows =
      check_paged_attention(query, pages, block_table, seq_lens, state_slot, num_pages, first_page,
                            covered, page_scales, page_format, query_start, layer, out);
  const int64_t requests = block_table.size(0), heads = num_pages.size(2);
  const int64_t tokens = std::min(query.size(0), out.size(0)), head_size = query.size(2);
  const int64_t group = query.size(1) / heads, block_size = rows.block_size;
  const float* sinks = check_logits(soft_cap, sink_logits, std::nullopt, query.size(1), pages);
  check_decode_query_len(decode_query_len);
  KVC_CHECK(group <= 16, "query must have 1 to 16 heads per KV head on CUDA, not ", group);
  KVC_CHECK(block_size >= 8 && (block_size & (block_size - 1)) == 0,
            "pages must hold a power of two of tokens from 8 on, not ", block_size);
  KVC_CHECK(is_aligned(pages.const_data_ptr(), 16), "pages must be aligned to 16 bytes");
  // So that 16 rows of a page, a unit of decode work, are either codes or not, and that a page of
  // codes has the 32 keys of a prefill tile.
  KVC_CHECK(page_format == kAuto || block_size >= 16, "page_format ", page_format,
            " needs pages of 16 tokens or more on CUDA, not ", block_size);
  KVC_CHECK(is_aligned(rows.page_scales, 16), "page_scales must be aligned to 16 bytes");
  if (requests == 0 || tokens == 0) return;

  const Launch launch(pages);
  DecodeParams p{};
  p.rows = rows;
  p.query = query.const_data_ptr();
  p.pages = pages.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.query_start = query_start.const_data_ptr<int32_t>();
  p.query_stride_t = query.stride(0);
  p.query_stride_h = query.stride(1);
  p.out_stride_t = out.stride(0);
  p.out_stride_h = out.stride(1);
  p.num_requests = static_cast<int32_t>(requests);
  p.num_heads = static_cast<int32_t>(heads);
  p.group = static_cast<int32_t>(group);
  p.layer = static_cast<int32_t>(layer);
  p.least_units = 1;
  p.logits = {scale, soft_cap, sinks};
  p.aligned = is_aligned(p.query, 16) && p.query_stride_t % 8 == 0 && p.query_stride_h % 8 == 0;
  p.aligned_pages = heads % 4 == 0 && is_aligned(rows.num_pages, 16);
  // As 32-bit numbers: no row has more tokens than the batch.
  const int64_t together = std::min(decode_query_len, tokens);
  const bool decode_all = tokens <= requests * together || pages.scalar_type() == ScalarType::Float;
  p.width = static_cast<int32_t>(together);
  p.most_tokens = decode_all ? INT_MAX : p.width;
  dispatch_dtype(pages.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (page_format == kAuto) {
      launch_decode<T, kAuto>(launch, pages, p, head_size);
    } else if constexpr (!std::is_same_v<T, float>) {  // refused before
      if (page_format == kFp8) {
        launch_decode<T, kFp8>(launch, pages, p, head_size);
      } else {
        launch_decode<T, kInt4>(launch, pages, p, head_size);
      }
    }
  });
  if (decode_all) return;

  PrefillParams q{};
  q.rows = rows;
  q.query = p.query;
  q.pages = p.pages;
  q.out = p.out;
  q.query_start = p.query_start;
  q.query_stride_t = p.query_stride_t;
  q.query_stride_h = p.query_stride_h;
  q.out_stride_t = p.out_stride_t;
  q.out_stride_h = p.out_stride_h;
  q.num_requests = p.num_requests;
  q.num_heads = p.num_heads;
  q.group = p.group;
  q.layer = p.layer;
  q.least_tokens = p.most_tokens + 1;
  q.logits = p.logits;
  q.aligned = p.aligned;
  q.aligned_out = is_aligned(p.out, 4) && p.out_stride_t % 2 == 0 && p.out_stride_h % 2 == 0;
  const auto prefill = [&](auto type) {
    if (page_format == kAuto) {
      launch_prefill<decltype(type), kAuto>(launch, q, head_size, tokens);
    } else if (page_format == kFp8) {
      launch_prefill<decltype(type), kFp8>(launch, q, head_size, tokens);
    } else {
      launch_prefill<decltype(type), kInt4>(launch, q, head_size, tokens);
    }
  };
  if (pages.scalar_type() == ScalarType::Half) {
    prefill(__half{});
  } else {
    prefill(__nv_bfloat16{});
  }
}

}  // namespace
}  // namespace kvc::gpu

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&kvc::gpu::paged_attention));
}
