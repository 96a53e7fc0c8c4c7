// SPDX-License-Identifier: Apache-2.0
#include "../op_checks.h"
#include "key_statistics.cuh"
#include "launch.h"

namespace kvc::gpu {
namespace {

// The same call for kValueNorm alone: a key's words behind it, values lie where keys would, and
// their norm is what kNorm is of keys.
KeyStatisticsParams of_values(KeyStatisticsParams p, int64_t words) {
  const int64_t before = count_channels(p.channels & ((1 << kValueNorm) - 1));
  p.out += before * p.candidates * p.rows.block_size;
  p.pages += words;
  p.values = true;
  p.channels = 1 << kNorm;
  return p;
}

template <typename T, int kHeadSize, bool kCodes>
void launch_key_statistics(const Launch& launch, const Tensor& like, KeyStatisticsParams p,
                           int64_t requests, int64_t most_keys) {
  using Shape = KeyStatisticsShape<T, kHeadSize>;
  const auto first = sum_directions_kernel<T, kHeadSize, kCodes>;
  const auto second = key_statistics_kernel<T, kHeadSize, kCodes>;
  const int64_t heads = requests * p.rows.slots;
  const int64_t splits =
      launch.num_splits(second, Shape::kThreads, 0, heads,
                        most_keys / (4 * Shape::kWarps * Shape::kKeys));  // four tiles per warp
  const dim3 grid(static_cast<unsigned>(splits), p.rows.slots, static_cast<unsigned>(requests));
  Tensor partial;  // lives until both kernels are in the stream
  if (p.channels >> kLikeness & 1) {
    partial = torch::stable::new_empty(like, {heads * splits * kHeadSize}, ScalarType::Float);
    p.partial = partial.mutable_data_ptr<float>();
    first<<<grid, Shape::kThreads, 0, launch.stream()>>>(p);
  }
  if (p.channels & (1 << kNorm | 1 << kLikeness)) {
    second<<<grid, Shape::kThreads, 0, launch.stream()>>>(p);
  }
  if (p.channels >> kValueNorm & 1) {
    second<<<grid, Shape::kThreads, 0, launch.stream()>>>(of_values(p, Shape::kWords));
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor key_statistics(const Tensor& pages, const Tensor& block_table, const Tensor& seq_lens,
                      const Tensor& state_slot, const Tensor& num_pages, const Tensor& first_page,
                      const Tensor& covered, const std::optional<Tensor>& page_scales,
                      int64_t page_format, const Tensor& new_covered, const Tensor& page_start,
                      int64_t num_candidate_pages, int64_t channels) {
  KeyStatisticsParams p{};
  p.rows = check_key_statistics(pages, block_table, seq_lens, state_slot, num_pages, first_page,
                                covered, page_scales, page_format, new_covered, page_start,
                                num_candidate_pages, channels);
  const int64_t requests = block_table.size(0), block_size = p.rows.block_size;
  check_all_heads(pages, p.rows, requests);
  const Tensor out = torch::stable::new_empty(
      pages, {count_channels(channels), num_candidate_pages, block_size}, ScalarType::Float);
  if (out.numel() == 0) return out;
  p.pages = static_cast<const uint4*>(pages.const_data_ptr());
  p.new_covered = new_covered.const_data_ptr<int32_t>();
  p.page_start = page_start.const_data_ptr<int64_t>();
  p.out = out.mutable_data_ptr<float>();
  p.candidates = num_candidate_pages;
  p.channels = static_cast<uint32_t>(channels);
  const Launch launch(pages);
  // Places that no head owns are zero, as in the reference.
  STD_CUDA_CHECK(cudaMemsetAsync(p.out, 0, out.numel() * sizeof(float), launch.stream()));
  if (requests == 0) return out;
  // A guess of the longest head, for the grid only: any length is correct.
  const int64_t most_keys = block_table.size(1) * block_size;
  dispatch_dtype(pages.scalar_type(), [&](auto type) {
    dispatch_head_size(pages.size(2) / 2, [&](auto size) {
      using T = decltype(type);
      constexpr int kHeadSize = decltype(size)::value;
      if (page_format == kAuto) {
        launch_key_statistics<T, kHeadSize, false>(launch, pages, p, requests, most_keys);
      } else if constexpr (!std::is_same_v<T, float>) {  // refused before
        launch_key_statistics<T, kHeadSize, true>(launch, pages, p, requests, most_keys);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace kvc::gpu

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CUDA, m) {
  m.impl("key_statistics", TORCH_BOX(&kvc::gpu::key_statistics));
}
