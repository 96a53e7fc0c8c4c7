// SPDX-License-Identifier: Apache-2.0
#include "../op_checks.h"
#include "compact.cuh"
#include "launch.h"
#include "ops.h"

namespace kvc::gpu {

void compact_pages(const Tensor& pages, const Tensor& block_table, const Tensor& state_slot,
                   const Tensor& num_pages, const Tensor& first_page, const Tensor& covered,
                   const Tensor& kept_pages, const Tensor& kept_first, const Tensor& kept_keys,
                   const Tensor& new_blocks) {
  constexpr int kThreads = 128;
  CompactParams p{};
  p.rows = check_compact_pages(pages, block_table, state_slot, num_pages, first_page, covered,
                               kept_pages, kept_first, kept_keys, new_blocks);
  const int64_t requests = block_table.size(0);
  const int64_t bytes = pages.size(2) * pages.element_size();
  const bool narrow = bytes == sizeof(uint32_t);
  const int64_t word = narrow ? sizeof(uint32_t) : sizeof(uint4);
  KVC_CHECK(bytes % word == 0 && is_aligned(pages.const_data_ptr(), word),
            "pages must be aligned to 16 bytes, and so must every K/V pair");
  p.pages = pages.mutable_data_ptr();
  p.kept_pages = kept_pages.const_data_ptr<int32_t>();
  p.kept_first = kept_first.const_data_ptr<int32_t>();
  p.kept_keys = kept_keys.const_data_ptr<int32_t>();
  p.new_blocks = new_blocks.const_data_ptr<int32_t>();
  p.new_blocks_stride = new_blocks.stride(0);
  p.num_kept = kept_keys.size(0);
  p.num_requests = static_cast<int32_t>(requests);
  p.words = static_cast<int32_t>(bytes / word);
  if (p.num_kept == 0 || requests == 0) return;
  const Launch launch(pages);
  const int64_t per_block = kThreads / kWarp;
  const auto kernel =
      narrow ? compact_pages_kernel<kThreads, uint32_t> : compact_pages_kernel<kThreads, uint4>;
  kernel<<<(p.num_kept + per_block - 1) / per_block, kThreads, 0, launch.stream()>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace kvc::gpu
