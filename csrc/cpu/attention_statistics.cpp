// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.attention_statistics on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../op_checks.h"
#include "key_tile.h"
#include "logits.h"
#include "rows.h"

namespace kvc {
namespace {

struct Call {
  PagedRows rows;
  const int32_t* observe_slot;                           // [R]
  const int32_t* num_queries;                            // [R]
  const int32_t* new_covered;                            // [R]
  const int64_t* page_start;                             // [R]
  int64_t ring_layer, ring_slot, ring_place, ring_head;  // strides in elements
  int64_t window, heads, group, head_size;               // W, H, G, D
  int64_t channels, query_stride;                        // bit mask; tokens between queries
  int64_t channel_size;                                  // output elements per channel
  Logits logits;                                         // with sinks of all layers
};

// One (request, layer, head) at a time. Two passes over the keys, maximum and sum first: keeping
// the logits of all keys would take G * W * 4 bytes per key, computing them twice takes little.
template <typename T>
class Runner {
 public:
  explicit Runner(const Call& call)
      : call_(call),
        max_panels_(ceil_div(call.window, kPanel)),
        tile_(call.head_size),
        queries_(call.group * max_panels_ * call.head_size * kPanel),
        logits_(call.group * max_panels_ * kTileKeys * kPanel),
        maximum_(call.group * max_panels_ * kPanel),
        inverse_(call.group * max_panels_ * kPanel),
        log2_inverse_(call.group * max_panels_ * kPanel),
        uniform_(max_panels_ * kPanel),
        seen_(max_panels_ * kPanel),
        visible_(max_panels_ * kPanel),
        row_(call.head_size) {}

  void run(const Simd& simd, int64_t request, int64_t head_slot, const T* ring, const T* pages,
           float* out) {
    const HeadPages head = head_pages(call_.rows, request, static_cast<int32_t>(head_slot));
    const int32_t new_covered = call_.new_covered[request];
    const int32_t num_keys = head.num_keys(call_.rows.seq_lens[request]);
    const int32_t candidates = head.candidate_pages(new_covered) * head.block_size;
    load_queries(simd, request, head_slot, num_keys, ring);
    sum_exponentials(simd, head, head_slot, num_keys, pages);
    out += (call_.page_start[request] + head.first_candidate(new_covered)) * head.block_size;
    for (int32_t begin = 0; begin < candidates; begin += kTileKeys) {
      const int32_t count = std::min<int32_t>(kTileKeys, candidates - begin);
      tile_.load(simd, head, pages, begin, count, Part::kKeys);
      for (int64_t i = 0; i < call_.group * panels_; ++i) logits(simd, i, count);
      for (int64_t q = 0; q < panels_ * kPanel; ++q) visible_[q] = seen_[q] - begin;
      StatisticsTile tile{logits_,
                          panels_ * kTileKeys * kPanel,
                          kTileKeys * kPanel,
                          call_.group,
                          panels_,
                          call_.num_queries[request],
                          count,
                          maximum_,
                          inverse_,
                          log2_inverse_,
                          uniform_,
                          visible_,
                          {}};
      float* result = out + begin;
      for (int channel = 0; channel < kNumAttentionChannels; ++channel) {
        if (!wants(channel)) continue;
        tile.out[channel] = result;
        result += call_.channel_size;
      }
      simd.statistics(tile);
    }
  }

 private:
  bool wants(int channel) const { return call_.channels >> channel & 1; }

  // Queries as columns, [G, panels, D, 16]; idle lanes see no key and count nowhere.
  void load_queries(const Simd& simd, int64_t request, int64_t head_slot, int32_t num_keys,
                    const T* ring) {
    const int64_t count = call_.num_queries[request];
    const int64_t layer = head_slot / call_.heads, head = head_slot % call_.heads;
    panels_ = ceil_div(count, kPanel);
    ring += layer * call_.ring_layer + call_.observe_slot[request] * call_.ring_slot;
    for (int64_t q = 0; q < panels_ * kPanel; ++q) {
      const int64_t unseen = (count - 1 - q) * call_.query_stride;
      seen_[q] = q < count ? static_cast<int32_t>(std::max<int64_t>(0, num_keys - unseen)) : 0;
      uniform_[q] = seen_[q] > 0 ? 1.0f / static_cast<float>(seen_[q]) : 0.0f;
      if (q >= count) continue;
      const int64_t position = call_.rows.seq_lens[request] - 1 - unseen;
      const int64_t place = position / call_.query_stride % call_.window;
      for (int64_t g = 0; g < call_.group; ++g) {
        to_float(simd, ring + place * call_.ring_place + (head * call_.group + g) * call_.ring_head,
                 row_.data(), call_.head_size);
        float* column =
            queries_ + (g * panels_ + q / kPanel) * call_.head_size * kPanel + q % kPanel;
        for (int64_t d = 0; d < call_.head_size; ++d)
          column[d * kPanel] = row_[d] * call_.logits.scale;
      }
    }
  }

  void logits(const Simd& simd, int64_t panel, int32_t count) {
    float* logits = logits_ + panel * kTileKeys * kPanel;
    simd.gemm({tile_.keys(), tile_.stride(), 1, queries_ + panel * call_.head_size * kPanel, kPanel,
               logits, kPanel, count, call_.head_size, false});
    if (call_.logits.cap != 0) simd.soft_cap(logits, count * kPanel, call_.logits.cap);
  }

  void sum_exponentials(const Simd& simd, const HeadPages& head, int64_t head_slot,
                        int32_t num_keys, const T* pages) {
    const int64_t of_member = panels_ * kPanel, lanes = call_.group * of_member;
    for (int64_t g = 0; g < call_.group; ++g) {
      std::fill_n(maximum_ + g * of_member, of_member,
                  call_.logits.maximum(head_slot * call_.group + g));
    }
    std::fill_n(static_cast<float*>(inverse_), lanes, call_.logits.sum());
    for (int32_t begin = 0; begin < num_keys; begin += kTileKeys) {
      const int32_t count = std::min<int32_t>(kTileKeys, num_keys - begin);
      tile_.load(simd, head, pages, begin, count, Part::kKeys);
      for (int64_t q = 0; q < panels_ * kPanel; ++q) visible_[q] = seen_[q] - begin;
      for (int64_t i = 0; i < call_.group * panels_; ++i) {
        logits(simd, i, count);
        float correction[kPanel];
        simd.softmax_panel({logits_ + i * kTileKeys * kPanel, count,
                            visible_ + i % panels_ * kPanel, maximum_ + i * kPanel,
                            inverse_ + i * kPanel, correction});
      }
    }
    for (int64_t i = 0; i < lanes; ++i) inverse_[i] = inverse_[i] != 0 ? 1.0f / inverse_[i] : 0.0f;
    if (!wants(kEntropy)) return;
    for (int64_t i = 0; i < lanes; ++i) log2_inverse_[i] = std::log2(inverse_[i]);
  }

  const Call& call_;
  int64_t max_panels_, panels_ = 0;  // panels of queries per member of the group
  KeyTile tile_;
  Scratch<float> queries_, logits_, maximum_, inverse_, log2_inverse_, uniform_;
  Scratch<int32_t> seen_, visible_;
  std::vector<float> row_;
};

// Multiplications for one request, roughly.
int64_t num_work(const Call& call, int64_t request) {
  return int64_t{call.rows.seq_lens[request]} * call.num_queries[request] * call.rows.slots *
         call.group * call.head_size;
}

// Rows with something to do; checks their values.
std::vector<int64_t> live_rows(const Call& call, int64_t num_requests, int64_t table_width,
                               int64_t num_states, int64_t num_blocks, int64_t num_slots,
                               int64_t num_candidate_pages) {
  std::vector<int64_t> live;
  for (int64_t r = 0; r < num_requests; ++r) {
    const int64_t n = call.num_queries[r], seq_len = call.rows.seq_lens[r];
    KVC_CHECK(0 <= n && n <= call.window, "num_queries of row ", r, " is ", n,
              ", the window of ring is ", call.window);
    if (n == 0) continue;  // its statistics stay zero
    check_row_values(call.rows, r, seq_len, table_width, num_states, num_blocks);
    KVC_CHECK((n - 1) * call.query_stride < seq_len, "num_queries of row ", r, " is ", n,
              " with query_stride ", call.query_stride, ", seq_lens ", seq_len);
    KVC_CHECK(0 <= call.observe_slot[r] && call.observe_slot[r] < num_slots, "observe_slot of row ",
              r, " is ", call.observe_slot[r], " of ", num_slots);
    check_candidate_values(call.rows, r, call.new_covered[r], call.page_start[r],
                           num_candidate_pages);
    live.push_back(r);
  }
  return live;
}

Tensor attention_statistics(const Tensor& ring, const Tensor& pages, const Tensor& block_table,
                            const Tensor& seq_lens, const Tensor& state_slot,
                            const Tensor& num_pages, const Tensor& first_page,
                            const Tensor& covered, const std::optional<Tensor>& page_scales,
                            int64_t page_format, const Tensor& observe_slot,
                            const Tensor& num_queries, const Tensor& new_covered,
                            const Tensor& page_start, int64_t num_candidate_pages, int64_t channels,
                            int64_t query_stride, double scale, double soft_cap,
                            const std::optional<Tensor>& sink_logits) {
  const PagedRows rows = check_attention_statistics(
      ring, pages, block_table, seq_lens, state_slot, num_pages, first_page, covered, page_scales,
      page_format, observe_slot, num_queries, new_covered, page_start, num_candidate_pages,
      channels, query_stride);
  const int64_t num_requests = block_table.size(0), heads = num_pages.size(2);
  const int64_t head_size = ring.size(4), block_size = pages.size(1);
  check_head_size(head_size);
  const float* sinks = check_logits(soft_cap, sink_logits, num_pages.size(1), ring.size(3), pages);
  Tensor out = torch::stable::new_zeros(
      ring, {count_channels(channels), num_candidate_pages, block_size}, ScalarType::Float);
  const Call call{rows,
                  observe_slot.const_data_ptr<int32_t>(),
                  num_queries.const_data_ptr<int32_t>(),
                  new_covered.const_data_ptr<int32_t>(),
                  page_start.const_data_ptr<int64_t>(),
                  ring.stride(0),
                  ring.stride(1),
                  ring.stride(2),
                  ring.stride(3),
                  ring.size(2),
                  heads,
                  ring.size(3) / heads,
                  head_size,
                  channels,
                  query_stride,
                  num_candidate_pages * block_size,
                  {scale, soft_cap, sinks}};
  const std::vector<int64_t> live =
      live_rows(call, num_requests, block_table.size(1), num_pages.size(0),
                pages.size(0) / rows.slots, ring.size(1), num_candidate_pages);
  if (channels == 0) return out;
  float* result = out.mutable_data_ptr<float>();
  const Simd& best = simd();
  dispatch_cache_dtype(pages.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* queries = static_cast<const T*>(ring.const_data_ptr());
    const T* keys = static_cast<const T*>(pages.const_data_ptr());
    const int64_t num_items = static_cast<int64_t>(live.size()) * rows.slots;
    int64_t work = 0;
    for (const int64_t r : live) work += num_work(call, r);
    parallel_items(num_items, work, [&](const auto& next) {
      Runner<T> runner(call);
      for (int64_t i; (i = next()) >= 0;) {
        runner.run(best, live[i / rows.slots], i % rows.slots, queries, keys, result);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("attention_statistics", TORCH_BOX(&kvc::attention_statistics));
}
