// SPDX-License-Identifier: Apache-2.0
#include "../op_checks.h"
#include "launch.h"
#include "select.cuh"

namespace kvc::gpu {
namespace {

// Values cannot be checked without waiting for the GPU, so callers guarantee them. What happens if
// they do not: a group asked for more pages than it can free frees all it can, a negative number
// frees none; keys beyond num_kept_pages are not written, rows that nobody fills stay undefined
// (compact_pages skips them).
std::tuple<Tensor, Tensor, Tensor> select_pages(const Tensor& scores, const Tensor& page_start,
                                                const Tensor& state_slot, const Tensor& num_pages,
                                                const Tensor& first_page, const Tensor& covered,
                                                const std::optional<Tensor>& page_scales,
                                                int64_t page_format, const Tensor& new_covered,
                                                const Tensor& num_freed, const Tensor& num_recent,
                                                int64_t num_sinks, int64_t floor_pages,
                                                int64_t num_kept_pages) {
  constexpr int kThreads = 512;
  static_assert(kThreads >= kBins);
  SelectParams p{};
  p.rows = check_select_pages(scores, page_start, state_slot, num_pages, first_page, covered,
                              page_scales, page_format, new_covered, num_freed, num_recent,
                              num_sinks, floor_pages, num_kept_pages);
  const int64_t requests = num_freed.size(0), groups = num_freed.size(1);
  const int64_t slots = p.rows.slots, heads = requests * slots;
  const int64_t layers = num_pages.size(1);
  using torch::stable::new_empty;
  const Tensor kept_pages = new_empty(scores, {requests, layers, slots / layers}, ScalarType::Int);
  const Tensor kept_first = new_empty(scores, {requests, layers, slots / layers}, ScalarType::Int);
  const Tensor kept_keys =
      new_empty(scores, {num_kept_pages, scores.size(1) * p.rows.page_blocks}, ScalarType::Int);
  if (heads == 0) return {kept_pages, kept_first, kept_keys};
  const Launch launch(scores);
  const int64_t all_groups = requests * groups;
  const int64_t bins = kDigits * all_groups * kBins;
  const Tensor scratch =
      new_empty(scores, {bins + 2 * (kDigits + 1) * all_groups + 4 * heads}, ScalarType::Int);
  p.histogram = scratch.mutable_data_ptr<int32_t>();
  p.threshold = reinterpret_cast<int2*>(p.histogram + bins);
  p.head_pages = p.threshold + (kDigits + 1) * all_groups;
  p.lost_pages = reinterpret_cast<int32_t*>(p.head_pages + heads);
  int32_t* ties = p.lost_pages + heads;
  p.scores = scores.const_data_ptr<float>();
  p.page_start = page_start.const_data_ptr<int64_t>();
  p.new_covered = new_covered.const_data_ptr<int32_t>();
  p.num_recent = num_recent.const_data_ptr<int32_t>();
  p.num_freed = num_freed.const_data_ptr<int32_t>();
  p.kept_pages = kept_pages.mutable_data_ptr<int32_t>();
  p.kept_first = kept_first.mutable_data_ptr<int32_t>();
  p.kept_keys = kept_keys.mutable_data_ptr<int32_t>();
  p.num_kept = num_kept_pages;
  p.num_requests = static_cast<int32_t>(requests);
  p.groups = static_cast<int32_t>(groups);
  p.num_sinks = static_cast<int32_t>(num_sinks);
  p.floor_pages = static_cast<int32_t>(floor_pages);
  p.page_keys = static_cast<int32_t>(scores.size(1)) * p.rows.page_blocks;
  STD_CUDA_CHECK(cudaMemsetAsync(p.histogram, 0, bins * sizeof(int32_t), launch.stream()));
  for (int pass = 0; pass <= kDigits; ++pass) {
    threshold_kernel<kThreads><<<heads, kThreads, 0, launch.stream()>>>(p, pass);
  }
  deal_kernel<1024><<<1, 1024, 0, launch.stream()>>>(p, ties);
  keep_kernel<kThreads><<<heads, kThreads, 0, launch.stream()>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {kept_pages, kept_first, kept_keys};
}

}  // namespace
}  // namespace kvc::gpu

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CUDA, m) {
  m.impl("select_pages", TORCH_BOX(&kvc::gpu::select_pages));
}
