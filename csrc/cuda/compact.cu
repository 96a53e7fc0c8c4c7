// SPDX-License-Identifier: Apache-2.0
#include "../op_checks.h"
#include "compact_codes.cuh"
#include "launch.h"

namespace kvc::gpu {
namespace {

CompactParams kept_params(const PagedRows& rows, const Tensor& pages, int64_t word,
                          const Tensor& kept_pages, const Tensor& kept_first,
                          const Tensor& kept_keys) {
  CompactParams p{};
  const int64_t bytes = pages.size(2) * pages.element_size();
  KVC_CHECK(bytes % word == 0 && is_aligned(pages.const_data_ptr(), word),
            "pages must be aligned to 16 bytes, and so must every K/V pair");
  p.rows = rows;
  p.pages = const_cast<void*>(pages.const_data_ptr());
  p.kept_pages = kept_pages.const_data_ptr<int32_t>();
  p.kept_first = kept_first.const_data_ptr<int32_t>();
  p.kept_keys = kept_keys.const_data_ptr<int32_t>();
  p.num_kept = kept_keys.size(0);
  p.num_requests = static_cast<int32_t>(kept_pages.size(0));
  p.words = static_cast<int32_t>(bytes / word);
  return p;
}

// Of keys that become codes.
void check_head_size(const Tensor& pages) {
  const int64_t head_size = pages.size(2) / 2;
  KVC_CHECK(head_size <= 256, "pages have a head size of ", head_size, "; the most on CUDA is 256");
}

// Calls f with a value of the type and std::integral_constant of the format.
template <typename F>
void dispatch_codes(ScalarType dtype, int64_t page_format, F&& f) {
  const auto run = [&](auto type) {
    if (page_format == kFp8) {
      f(type, std::integral_constant<int, kFp8>{});
    } else {
      f(type, std::integral_constant<int, kInt4>{});
    }
  };
  if (dtype == ScalarType::Half) {
    run(__half{});
  } else {
    run(__nv_bfloat16{});
  }
}

Tensor fit_scales(const Tensor& pages, const Tensor& block_table, const Tensor& state_slot,
                  const Tensor& num_pages, const Tensor& first_page, const Tensor& covered,
                  const std::optional<Tensor>& page_scales, int64_t page_format,
                  const Tensor& kept_pages, const Tensor& kept_first, const Tensor& kept_keys) {
  constexpr int kThreads = 256;
  const PagedRows rows =
      check_fit_scales(pages, block_table, state_slot, num_pages, first_page, covered, page_scales,
                       page_format, kept_pages, kept_first, kept_keys);
  const int64_t requests = block_table.size(0), head_size = pages.size(2) / 2;
  check_head_size(pages);
  const int format = static_cast<int>(page_format);
  const Tensor out =
      torch::stable::new_empty(pages,
                               {requests, num_pages.size(1), num_pages.size(2), scales_rows(format),
                                scales_columns(format, static_cast<int>(head_size))},
                               ScalarType::BFloat16);
  if (requests == 0) return out;
  CodesParams q{};
  q.kept = kept_params(rows, pages, sizeof(uint4), kept_pages, kept_first, kept_keys);
  q.fitted = static_cast<uint16_t*>(out.mutable_data_ptr());
  q.head_size = static_cast<int32_t>(head_size);
  const Launch launch(pages);
  dispatch_codes(pages.scalar_type(), page_format, [&](auto type, auto of) {
    const auto kernel = fit_scales_kernel<decltype(type), decltype(of)::value, kThreads>;
    kernel<<<requests * rows.slots, kThreads, 0, launch.stream()>>>(q);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

void compact_pages(const Tensor& pages, const Tensor& block_table, const Tensor& state_slot,
                   const Tensor& num_pages, const Tensor& first_page, const Tensor& covered,
                   const std::optional<Tensor>& page_scales, int64_t page_format,
                   const Tensor& kept_pages, const Tensor& kept_first, const Tensor& kept_keys,
                   const Tensor& new_blocks, const std::optional<Tensor>& new_scales) {
  constexpr int kThreads = 128, kWarps = kThreads / kWarp;
  const PagedRows rows = check_compact_pages(pages, block_table, state_slot, num_pages, first_page,
                                             covered, page_scales, page_format, kept_pages,
                                             kept_first, kept_keys, new_blocks, new_scales);
  const bool narrow = pages.size(2) * pages.element_size() == sizeof(uint32_t);
  CompactParams p = kept_params(rows, pages, narrow ? sizeof(uint32_t) : sizeof(uint4), kept_pages,
                                kept_first, kept_keys);
  p.new_blocks = new_blocks.const_data_ptr<int32_t>();
  p.new_blocks_stride = new_blocks.stride(0);
  if (p.num_kept == 0 || p.num_requests == 0) return;
  const Launch launch(pages);
  const int64_t blocks = (p.num_kept + kWarps - 1) / kWarps;
  if (!new_scales) {
    const auto kernel =
        narrow ? compact_pages_kernel<kThreads, uint32_t> : compact_pages_kernel<kThreads, uint4>;
    kernel<<<blocks, kThreads, 0, launch.stream()>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  check_head_size(pages);
  CodesParams q{};
  q.kept = p;
  q.new_scales = static_cast<const uint16_t*>(new_scales->const_data_ptr());
  q.head_size = static_cast<int32_t>(pages.size(2) / 2);
  constexpr int kShared = kWarps * kStagedBytes;
  dispatch_codes(pages.scalar_type(), page_format, [&](auto type, auto of) {
    const auto kernel = quantise_pages_kernel<decltype(type), decltype(of)::value, kThreads>;
    kernel<<<blocks, kThreads, kShared, launch.stream()>>>(q);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace kvc::gpu

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CUDA, m) {
  m.impl("fit_scales", TORCH_BOX(&kvc::gpu::fit_scales));
  m.impl("compact_pages", TORCH_BOX(&kvc::gpu::compact_pages));
}
