// SPDX-License-Identifier: Apache-2.0
#include "../op_checks.h"
#include "echo.h"

namespace kvc::gpu {
namespace {

void echo_scores(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                 const Tensor& seq_lens, const Tensor& state_slot, const Tensor& num_pages,
                 const Tensor& first_page, const Tensor& covered,
                 const std::optional<Tensor>& page_scales, int64_t page_format,
                 const Tensor& segments, const Tensor& rotation, int64_t layer, int64_t max_segment,
                 int64_t num_sinks, bool interleaved, double scale, const Tensor& scores,
                 double soft_cap, const std::optional<Tensor>& sink_logits) {
  EchoParams p{};
  p.rows = check_echo_scores(query, pages, block_table, seq_lens, state_slot, num_pages, first_page,
                             covered, page_scales, page_format, segments, rotation, layer,
                             max_segment, num_sinks, scores);
  const int64_t num_segments = segments.size(0), heads = num_pages.size(2);
  const int64_t group = query.size(1) / heads;
  const float* sinks = check_logits(soft_cap, sink_logits, std::nullopt, query.size(1), pages);
  check_all_heads(pages, p.rows, block_table.size(0));
  KVC_CHECK(group <= 16, "query has ", group, " heads per KV head; the most on CUDA is 16");
  KVC_CHECK(max_segment <= kEchoKeys, "max_segment must be at most ", kEchoKeys, " on CUDA, not ",
            max_segment);
  KVC_CHECK(num_sinks <= kEchoSinks, "num_sinks must be at most ", kEchoSinks, " on CUDA, not ",
            num_sinks);
  KVC_CHECK(is_aligned(rotation.const_data_ptr(), sizeof(float2)),
            "rotation must be aligned to 8 bytes");
  if (num_segments == 0) return;
  p.query = query.const_data_ptr();
  p.pages = pages.const_data_ptr();
  p.segments = segments.const_data_ptr<int32_t>();
  p.rotation = static_cast<const float2*>(rotation.const_data_ptr());
  p.scores = scores.mutable_data_ptr<float>();
  p.query_stride_t = query.stride(0);
  p.query_stride_h = query.stride(1);
  p.num_heads = static_cast<int32_t>(heads);
  p.group = static_cast<int32_t>(group);
  p.layer = static_cast<int32_t>(layer);
  p.max_segment = static_cast<int32_t>(max_segment);
  p.num_sinks = static_cast<int32_t>(num_sinks);
  p.pairs = static_cast<int32_t>(rotation.size(0));
  p.logits = {scale, soft_cap, sinks};
  p.interleaved = interleaved;
  p.aligned = is_aligned(p.query, 16) && p.query_stride_t % 8 == 0 && p.query_stride_h % 8 == 0;
  const Launch launch(pages);
  Tensor partial;
  dispatch_dtype(pages.scalar_type(), [&](auto type) {
    partial = launch_echo<decltype(type)>(launch, pages, &p, num_segments, query.size(2));
  });
  constexpr int kCombineThreads = 256;
  launch.chained(echo_combine_kernel<kCombineThreads>, num_segments * heads, kCombineThreads, 0, p);
}

}  // namespace
}  // namespace kvc::gpu

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CUDA, m) {
  m.impl("echo_scores", TORCH_BOX(&kvc::gpu::echo_scores));
}
