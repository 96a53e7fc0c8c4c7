// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.key_statistics on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../op_checks.h"
#include "key_tile.h"
#include "rows.h"

namespace kvc {
namespace {

struct Call {
  PagedRows rows;
  const int32_t* new_covered;  // [R]
  const int64_t* page_start;   // [R]
  int64_t head_size;           // D
  int64_t channels;            // bit mask
  int64_t channel_size;        // output elements per channel
};

// 1 / |k| from |k|^2; a key without length has no direction and counts nowhere.
float inverse_norm(float square) { return square > 0.0f ? 1.0f / std::sqrt(square) : 0.0f; }

// One (request, layer, head) at a time: the sum of all directions, then each key against it.
template <typename T>
class Runner {
 public:
  explicit Runner(const Call& call)
      : call_(call),
        tile_(call.head_size),
        direction_(tile_.padded()),
        squares_(kTileKeys),
        weights_(kTileKeys) {}

  void run(const Simd& simd, int64_t request, int64_t head_slot, const T* pages, float* out) {
    const HeadPages head = head_pages(call_.rows, request, static_cast<int32_t>(head_slot));
    const int32_t new_covered = call_.new_covered[request];
    const int32_t candidates = head.candidate_pages(new_covered) * head.block_size;
    if (candidates == 0) return;
    out += (call_.page_start[request] + head.first_candidate(new_covered)) * head.block_size;
    float* norms = wants(kNorm) ? out : nullptr;
    if (norms) out += call_.channel_size;
    float* likeness = wants(kLikeness) ? out : nullptr;
    if (likeness) out += call_.channel_size;
    const int32_t num_keys = head.num_keys(call_.rows.seq_lens[request]);
    if (norms || likeness) {
      look(simd, head, candidates, num_keys, pages, Part::kKeys, norms, likeness);
    }
    if (wants(kValueNorm)) {
      look(simd, head, candidates, num_keys, pages, Part::kValues, out, nullptr);
    }
  }

 private:
  bool wants(int channel) const { return call_.channels >> channel & 1; }

  // Norms and likeness of the candidates, of `num_keys` keys; nullptr: not wanted.
  void look(const Simd& simd, const HeadPages& head, int32_t candidates, int32_t num_keys,
            const T* pages, Part part, float* norms, float* likeness) {
    if (likeness) find_direction(simd, head, num_keys, pages, part);
    for (int32_t begin = 0; begin < candidates; begin += kTileKeys) {
      const int32_t count = load(simd, head, pages, part, begin, candidates);
      if (norms) {
        for (int32_t k = 0; k < count; ++k) norms[begin + k] = std::sqrt(squares_[k]);
      }
      if (!likeness) continue;
      simd.dots(direction_, 1, tile_.keys(), tile_.stride(), count, tile_.padded(),
                likeness + begin, 0);
      for (int32_t k = 0; k < count; ++k) likeness[begin + k] *= weights_[k];
    }
  }

  // The tile from key `begin` on, its squares and their inverse roots; returns how many keys.
  int32_t load(const Simd& simd, const HeadPages& head, const T* pages, Part part, int32_t begin,
               int32_t end) {
    const int32_t count = std::min<int32_t>(kTileKeys, end - begin);
    tile_.load(simd, head, pages, begin, count, part);
    simd.squares(tile_.keys(), tile_.stride(), count, tile_.padded(), squares_);
    for (int32_t k = 0; k < count; ++k) weights_[k] = inverse_norm(squares_[k]);
    return count;
  }

  // Sums every tile by itself first, which keeps the rounding of long heads small.
  void find_direction(const Simd& simd, const HeadPages& head, int32_t num_keys, const T* pages,
                      Part part) {
    const int64_t padded = tile_.padded();
    std::fill_n(static_cast<float*>(direction_), padded, 0.0f);
    for (int32_t begin = 0; begin < num_keys; begin += kTileKeys) {
      const int32_t count = load(simd, head, pages, part, begin, num_keys);
      for (int64_t d = 0; d < padded; d += kPanel) {
        float sum[kPanel];
        simd.gemm({weights_, 0, 1, tile_.keys() + d, tile_.stride(), sum, kPanel, 1, count, false});
        for (int lane = 0; lane < kPanel; ++lane) direction_[d + lane] += sum[lane];
      }
    }
    float square;
    simd.squares(direction_, padded, 1, padded, &square);
    simd.scale(direction_, padded, inverse_norm(square));
  }

  const Call& call_;
  KeyTile tile_;
  Scratch<float> direction_, squares_, weights_;
};

Tensor key_statistics(const Tensor& pages, const Tensor& block_table, const Tensor& seq_lens,
                      const Tensor& state_slot, const Tensor& num_pages, const Tensor& first_page,
                      const Tensor& covered, const std::optional<Tensor>& page_scales,
                      int64_t page_format, const Tensor& new_covered, const Tensor& page_start,
                      int64_t num_candidate_pages, int64_t channels) {
  const PagedRows rows = check_key_statistics(
      pages, block_table, seq_lens, state_slot, num_pages, first_page, covered, page_scales,
      page_format, new_covered, page_start, num_candidate_pages, channels);
  const int64_t num_requests = block_table.size(0), block_size = pages.size(1);
  const int64_t head_size = pages.size(2) / 2;
  check_head_size(head_size);
  Tensor out = torch::stable::new_zeros(
      pages, {count_channels(channels), num_candidate_pages, block_size}, ScalarType::Float);
  const Call call{rows,
                  new_covered.const_data_ptr<int32_t>(),
                  page_start.const_data_ptr<int64_t>(),
                  head_size,
                  channels,
                  num_candidate_pages * block_size};
  int64_t work = 0;
  for (int64_t r = 0; r < num_requests; ++r) {
    check_row_values(rows, r, rows.seq_lens[r], block_table.size(1), num_pages.size(0),
                     pages.size(0) / rows.slots);
    check_candidate_values(rows, r, call.new_covered[r], call.page_start[r], num_candidate_pages);
    work += int64_t{rows.seq_lens[r]} * rows.slots * head_size;
  }
  if (channels == 0) return out;
  float* result = out.mutable_data_ptr<float>();
  const Simd& best = simd();
  dispatch_cache_dtype(pages.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* keys = static_cast<const T*>(pages.const_data_ptr());
    parallel_items(num_requests * rows.slots, work, [&](const auto& next) {
      Runner<T> runner(call);
      for (int64_t i; (i = next()) >= 0;) {
        runner.run(best, i / rows.slots, i % rows.slots, keys, result);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("key_statistics", TORCH_BOX(&kvc::key_statistics));
}
