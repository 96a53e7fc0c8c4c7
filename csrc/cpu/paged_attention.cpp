// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.paged_attention on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../op_checks.h"
#include "attention_tile.h"
#include "logits.h"
#include "rows.h"

namespace kvc {
namespace {

// Rows per work item: enough to pay for converting the keys, few enough to stay in the L2 cache.
constexpr int64_t kTileRows = 128;
// Up to here, one row after the other is faster than a panel of 16 with idle lanes.
constexpr int64_t kMaxSingleRows = 8;

// Tokens [begin, end) of a request, for one KV head.
struct Item {
  int32_t request, head, begin, end;
};

struct Work {
  std::vector<Item> items;
  int64_t multiplications = 0;  // roughly
};

struct Call {
  PagedRows rows;
  const int32_t* query_start;                            // [R + 1]
  int64_t query_token, query_head, out_token, out_head;  // strides in elements
  int32_t layer, heads;                                  // H
  int64_t group, head_size;                              // G, D
  Logits logits;
};

template <typename T, typename Attention>
class Runner {
 public:
  Runner(const Call& call, int64_t max_rows, int64_t lane_stride)
      : call_(call),
        lane_stride_(lane_stride),
        attention_(max_rows, call.head_size),
        tile_(call.head_size),
        seen_(max_rows),
        row_(call.head_size) {}

  void run(const Simd& simd, const Item& item, const T* query, const T* pages, T* out) {
    const HeadPages head =
        head_pages(call_.rows, item.request, call_.layer * call_.heads + item.head);
    first_token_ = call_.query_start[item.request] + item.begin;
    first_head_ = item.head * call_.group;
    const int64_t num_rows = (item.end - item.begin) * call_.group;
    load_queries(simd, num_rows, query);
    // The last token of the request sees all keys, each one before it one less.
    const int32_t unseen = call_.query_start[item.request + 1] - 1 - first_token_;
    const int32_t seen_by_first = head.num_keys(call_.rows.seq_lens[item.request]) - unseen;
    for (int64_t row = 0; row < num_rows; ++row) {
      seen_[row] = std::max<int64_t>(0, seen_by_first + row / call_.group);
    }
    attention_.begin(num_rows);
    if (call_.logits.sinks) {
      for (int64_t row = 0; row < num_rows; ++row) {
        attention_.start_row(row, call_.logits.maximum(first_head_ + row % call_.group),
                             call_.logits.sum());
      }
    }
    const int32_t end = seen_[num_rows - 1];
    for (int32_t begin = 0; begin < end; begin += kTileKeys) {
      const int32_t count = std::min<int32_t>(kTileKeys, end - begin);
      tile_.load(simd, head, pages, begin, count, Part::kBoth);
      attention_.add(simd, tile_, {num_rows, seen_.data(), call_.logits.cap}, begin, count);
    }
    store(num_rows, out);
  }

 private:
  // The elements of one row of the item; U is const for the query.
  template <typename U>
  U* row_of(U* base, int64_t token_stride, int64_t head_stride, int64_t row) const {
    return base + (first_token_ + row / call_.group) * token_stride +
           (first_head_ + row % call_.group) * head_stride;
  }

  void load_queries(const Simd& simd, int64_t num_rows, const T* query) {
    for (int64_t row = 0; row < num_rows; ++row) {
      to_float(simd, row_of(query, call_.query_token, call_.query_head, row), row_.data(),
               call_.head_size);
      float* target = attention_.query(row);
      for (int64_t d = 0; d < call_.head_size; ++d)
        target[d * lane_stride_] = row_[d] * call_.logits.scale;
    }
  }

  // A row that sees no key, the token of a padded request, gives zeros.
  void store(int64_t num_rows, T* out) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const float factor = seen_[row] > 0 ? 1.0f / attention_.sum(row) : 0.0f;
      const float* result = attention_.out(row);
      T* target = row_of(out, call_.out_token, call_.out_head, row);
      for (int64_t d = 0; d < call_.head_size; ++d) target[d] = static_cast<T>(result[d] * factor);
    }
  }

  const Call& call_;
  int64_t lane_stride_;  // between the elements of a query
  int64_t first_token_ = 0, first_head_ = 0;
  Attention attention_;
  KeyTile tile_;
  std::vector<int32_t> seen_;  // keys that each row sees
  std::vector<float> row_;     // one query in fp32
};

template <typename T>
void run_items(const Call& call, const Work& work, const T* query, const T* pages, T* out) {
  const Simd& best = simd();
  const int64_t max_rows = std::max(kTileRows, call.group);
  const std::vector<Item>& items = work.items;
  const int64_t num_items = static_cast<int64_t>(items.size());
  parallel_items(num_items, work.multiplications, [&](const auto& next) {
    // Made when first needed: a step is mostly all prefill or all decode.
    std::optional<Runner<T, PanelAttention>> panels;
    std::optional<Runner<T, RowAttention>> singles;
    for (int64_t i; (i = next()) >= 0;) {
      if ((items[i].end - items[i].begin) * call.group <= kMaxSingleRows) {
        if (!singles) singles.emplace(call, kMaxSingleRows, 1);
        singles->run(best, items[i], query, pages, out);
      } else {
        if (!panels) panels.emplace(call, max_rows, kPanel);
        panels->run(best, items[i], query, pages, out);
      }
    }
  });
}

// Checks the values of the rows, and cuts them into work items.
Work make_work(const Call& call, int64_t num_requests, int64_t num_tokens, int64_t table_width,
               int64_t num_states, int64_t num_blocks) {
  Work work;
  const int32_t tokens_per_tile =
      static_cast<int32_t>(std::max<int64_t>(1, kTileRows / call.group));
  for (int64_t r = 0; r < num_requests; ++r) {
    const int32_t length = call.query_start[r + 1] - call.query_start[r];
    KVC_CHECK(length >= 0 && call.query_start[r] >= 0 && call.query_start[r + 1] <= num_tokens,
              "query_start gives row ", r, " the tokens ", call.query_start[r], " to ",
              call.query_start[r + 1], " of ", num_tokens);
    if (length == 0) continue;  // the rest of a padded row may be garbage
    check_row_values(call.rows, r, call.rows.seq_lens[r], table_width, num_states, num_blocks);
    work.multiplications +=
        int64_t{length} * call.rows.seq_lens[r] * call.heads * call.group * call.head_size;
    // Last tokens first: they see most keys, and dynamic scheduling wants the long items early.
    for (int32_t end = length; end > 0; end -= tokens_per_tile) {
      for (int32_t head = 0; head < call.heads; ++head) {
        work.items.push_back(
            {static_cast<int32_t>(r), head, std::max(0, end - tokens_per_tile), end});
      }
    }
  }
  return work;
}

void paged_attention(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                     const Tensor& seq_lens, const Tensor& state_slot, const Tensor& num_pages,
                     const Tensor& first_page, const Tensor& covered,
                     const std::optional<Tensor>& page_scales, int64_t page_format,
                     const Tensor& query_start, int64_t layer, double scale, Tensor out,
                     double soft_cap, const std::optional<Tensor>& sink_logits,
                     int64_t decode_query_len) {
  check_decode_query_len(decode_query_len);  // all tokens of an item read its keys once, anyway
  const PagedRows rows =
      check_paged_attention(query, pages, block_table, seq_lens, state_slot, num_pages, first_page,
                            covered, page_scales, page_format, query_start, layer, out);
  const int64_t num_requests = block_table.size(0), heads = num_pages.size(2);
  const int64_t head_size = query.size(2);
  check_head_size(head_size);
  const float* sinks = check_logits(soft_cap, sink_logits, std::nullopt, query.size(1), pages);

  Call call{rows,
            query_start.const_data_ptr<int32_t>(),
            query.stride(0),
            query.stride(1),
            out.stride(0),
            out.stride(1),
            static_cast<int32_t>(layer),
            static_cast<int32_t>(heads),
            query.size(1) / heads,
            head_size,
            {scale, soft_cap, sinks}};
  const Work work = make_work(call, num_requests, std::min(query.size(0), out.size(0)),
                              block_table.size(1), num_pages.size(0), pages.size(0) / rows.slots);
  dispatch_cache_dtype(pages.scalar_type(), [&](auto type) {
    using T = decltype(type);
    run_items<T>(call, work, static_cast<const T*>(query.const_data_ptr()),
                 static_cast<const T*>(pages.const_data_ptr()),
                 static_cast<T*>(out.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&kvc::paged_attention));
}
