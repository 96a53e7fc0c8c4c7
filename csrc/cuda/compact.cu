// SPDX-License-Identifier: Apache-2.0
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
  p.rows = check_rows(pages, block_table, state_slot, num_pages, first_page, covered);
  const int64_t requests = block_table.size(0);
  KVC_CHECK_TENSOR(kept_pages, ScalarType::Int, 3, pages);
  KVC_CHECK_TENSOR(kept_first, ScalarType::Int, 3, pages);
  KVC_CHECK_TENSOR(kept_keys, ScalarType::Int, 2, pages);
  KVC_CHECK_TENSOR(new_blocks, ScalarType::Int, 2, pages);
  for (int dim = 1; dim < 3; ++dim) {
    KVC_CHECK_SIZE(kept_pages, dim, num_pages.size(dim));
    KVC_CHECK_SIZE(kept_first, dim, num_pages.size(dim));
  }
  KVC_CHECK_SIZE(kept_pages, 0, requests);
  KVC_CHECK_SIZE(kept_first, 0, requests);
  KVC_CHECK_SIZE(kept_keys, 1, pages.size(1));
  KVC_CHECK_SIZE(new_blocks, 0, requests);
  KVC_CHECK_DENSE(kept_pages);
  KVC_CHECK_DENSE(kept_first);
  KVC_CHECK_DENSE(kept_keys);
  KVC_CHECK_LAST_DENSE(new_blocks);
  const int64_t bytes = pages.size(2) * pages.element_size();
  KVC_CHECK(bytes % 16 == 0 && is_aligned(pages.const_data_ptr(), 16),
            "pages must be aligned to 16 bytes, and so must every K/V pair");
  p.pages = static_cast<uint4*>(pages.mutable_data_ptr());
  p.kept_pages = kept_pages.const_data_ptr<int32_t>();
  p.kept_first = kept_first.const_data_ptr<int32_t>();
  p.kept_keys = kept_keys.const_data_ptr<int32_t>();
  p.new_blocks = new_blocks.const_data_ptr<int32_t>();
  p.new_blocks_stride = new_blocks.stride(0);
  p.num_kept = kept_keys.size(0);
  p.num_requests = static_cast<int32_t>(requests);
  p.words = static_cast<int32_t>(bytes / 16);
  if (p.num_kept == 0 || requests == 0) return;
  const Launch launch(pages);
  const int64_t per_block = kThreads / kWarp;
  compact_pages_kernel<kThreads>
      <<<(p.num_kept + per_block - 1) / per_block, kThreads, 0, launch.stream()>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace kvc::gpu
