// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.echo_scores on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../op_checks.h"
#include "key_tile.h"
#include "logits.h"
#include "rows.h"

namespace kvc {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Segment {
  int32_t row, begin, end, token;
};
static_assert(sizeof(Segment) == 4 * sizeof(int32_t));

struct Call {
  PagedRows rows;
  const Segment* segments;          // [S]
  const float* rotation;            // [n, 2] cosine and sine
  int64_t query_token, query_head;  // strides in elements
  int32_t layer, heads;             // H
  int64_t group, head_size;         // G, D
  int64_t longest;                  // keys of the longest segment
  int64_t pairs;                    // n
  int32_t num_sinks;
  bool interleaved;
  Logits logits;
};

// One (segment, head) at a time: all of its keys stay in fp32, and 16 queries go over them side by
// side, first for the sum of their exponentials, then to raise the maxima of the keys.
template <typename T>
class Runner {
 public:
  explicit Runner(const Call& call)
      : call_(call),
        sinks_(call.head_size),
        tiles_(),
        read_(call.head_size * kPanel),
        repeated_(call.head_size * kPanel),
        echo_(call.longest * kPanel),
        scratch_(std::max<int64_t>(kTileKeys, call.longest) * kPanel),
        top_(call.longest * kPanel),
        row_(call.head_size),
        turned_(call.head_size) {
    const int64_t tiles = ceil_div(call.longest, kTileKeys);
    tiles_.reserve(tiles);
    for (int64_t i = 0; i < tiles; ++i) tiles_.push_back(std::make_unique<KeyTile>(call.head_size));
  }

  void run(const Simd& simd, const Segment& s, int32_t h, const T* query, const T* pages,
           float* scores) {
    const HeadPages head = head_pages(call_.rows, s.row, call_.layer * call_.heads + h);
    const int32_t n = s.end - s.begin;
    // Where the segment begins among the keys that the head holds.
    const int32_t first = head.num_keys(s.begin);
    const int32_t num_sinks = std::min(call_.num_sinks, first + n);
    for (int32_t begin = 0; begin < n; begin += kTileKeys) {
      tiles_[begin / kTileKeys]->load(simd, head, pages, first + begin, tile_keys(n, begin),
                                      Part::kKeys);
    }
    std::fill_n(static_cast<float*>(top_), n * kPanel, -kInfinity);
    const int32_t num_rows = n * static_cast<int32_t>(call_.group);
    query += s.token * call_.query_token + h * call_.group * call_.query_head;
    for (int32_t row = 0; row < num_rows; row += kPanel) {
      const int32_t live = std::min<int32_t>(kPanel, num_rows - row);
      int32_t visible[kPanel];
      for (int32_t i = 0; i < kPanel; ++i) {
        visible[i] = i < live ? (row + i) / static_cast<int32_t>(call_.group) + 1 : 0;
        if (i < live) load_query(simd, query, row + i, i);
      }
      float shift[kPanel];
      float maximum[kPanel];
      for (int32_t i = 0; i < kPanel; ++i) {
        maximum[i] = call_.logits.maximum(h * call_.group + (row + i) % call_.group);
      }
      find_shift(simd, head, pages, n, num_sinks, visible, live, maximum, shift);
      simd.raise(echo_, shift, n, top_);
    }
    for (int32_t k = 0; k < n; ++k) {
      const float* lanes = top_ + k * kPanel;
      float top = lanes[0];
      for (int i = 1; i < kPanel; ++i) {
        if (!(lanes[i] <= top) && top == top) top = lanes[i];  // a NaN stays
      }
      const auto [page, within] = head.place(first + k);
      scores[int64_t{head.page_id(page)} * head.page_blocks * head.block_size + within] =
          std::exp2(top);
    }
  }

 private:
  static int32_t tile_keys(int32_t n, int32_t begin) {
    return std::min<int32_t>(kTileKeys, n - begin);
  }

  // Row `row` of the segment (a query, a member of the group) as lane `lane`, read and repeated.
  void load_query(const Simd& simd, const T* query, int32_t row, int32_t lane) {
    to_float(simd,
             query + row / call_.group * call_.query_token + row % call_.group * call_.query_head,
             row_.data(), call_.head_size);
    turned_ = row_;
    for (int64_t i = 0; i < call_.pairs; ++i) {
      const int64_t x = call_.interleaved ? 2 * i : i,
                    y = x + (call_.interleaved ? 1 : call_.pairs);
      const float cos = call_.rotation[2 * i], sin = call_.rotation[2 * i + 1];
      // Rounded as the model's own rotation would be.
      turned_[x] = static_cast<float>(static_cast<T>(row_[x] * cos - row_[y] * sin));
      turned_[y] = static_cast<float>(static_cast<T>(row_[y] * cos + row_[x] * sin));
    }
    for (int64_t d = 0; d < call_.head_size; ++d) {
      read_[d * kPanel + lane] = row_[d] * call_.logits.scale;
      repeated_[d * kPanel + lane] = turned_[d] * call_.logits.scale;
    }
  }

  void multiply(const Simd& simd, KeyTile& tile, const float* queries, int32_t count, float* out) {
    simd.gemm({tile.keys(), tile.stride(), 1, queries, kPanel, out, kPanel, count, call_.head_size,
               false});
    if (call_.logits.cap != 0) simd.soft_cap(out, count * kPanel, call_.logits.cap);
  }

  // Leaves the logits of the repeated queries in echo_ and the logarithm of each lane's sum in
  // `shift`; lanes without a query get one that never raises anything. `maximum` begins with the
  // learnt sinks, which are no keys.
  void find_shift(const Simd& simd, const HeadPages& head, const T* pages, int32_t n,
                  int32_t num_sinks, const int32_t* visible, int32_t live, float* maximum,
                  float* shift) {
    float sum[kPanel], correction[kPanel];
    std::fill_n(sum, kPanel, call_.logits.sum());
    const auto add = [&](float* logits, int32_t count, const int32_t* seen) {
      simd.softmax_panel({logits, count, seen, maximum, sum, correction});
    };
    for (int32_t begin = 0; begin < num_sinks; begin += kTileKeys) {
      const int32_t count = tile_keys(num_sinks, begin);
      sinks_.load(simd, head, pages, begin, count, Part::kKeys);
      multiply(simd, sinks_, repeated_, count, scratch_);
      add(scratch_, count, nullptr);
    }
    for (int32_t begin = 0; begin < n; begin += kTileKeys) {
      multiply(simd, *tiles_[begin / kTileKeys], repeated_, tile_keys(n, begin),
               echo_ + begin * kPanel);
    }
    std::memcpy(scratch_, echo_, n * kPanel * sizeof(float));
    add(scratch_, n, nullptr);
    const int32_t last = visible[live - 1];
    for (int32_t begin = 0; begin < last; begin += kTileKeys) {
      const int32_t count = tile_keys(last, begin);
      int32_t seen[kPanel];
      for (int i = 0; i < kPanel; ++i) seen[i] = visible[i] - begin;
      multiply(simd, *tiles_[begin / kTileKeys], read_, count, scratch_);
      add(scratch_, count, seen);
    }
    for (int32_t i = 0; i < kPanel; ++i) {
      shift[i] = i < live ? maximum[i] + std::log2(sum[i]) : kInfinity;
    }
  }

  const Call& call_;
  KeyTile sinks_;
  std::vector<std::unique_ptr<KeyTile>> tiles_;  // keys of the segment
  Scratch<float> read_, repeated_;               // [D, 16] queries, scaled
  Scratch<float> echo_;                          // [keys, 16] logits of the repeated queries
  Scratch<float> scratch_;                       // [keys, 16]
  Scratch<float> top_;                           // [keys, 16] highest logarithm of a probability
  std::vector<float> row_, turned_;              // one query in fp32
};

// Checks the values, and returns how many multiplications there are, roughly.
int64_t check_values(const Call& call, int64_t num_segments, int64_t num_tokens,
                     int64_t max_segment, int64_t num_requests, int64_t table_width,
                     int64_t num_states, int64_t num_blocks) {
  int64_t work = 0;
  for (int64_t i = 0; i < num_segments; ++i) {
    const auto [row, begin, end, token] = call.segments[i];
    KVC_CHECK(0 <= row && row < num_requests, "segments names row ", row, " of ", num_requests);
    const int64_t seq_len = call.rows.seq_lens[row];
    check_row_values(call.rows, row, seq_len, table_width, num_states, num_blocks);
    const int64_t slot = call.rows.state_slot[row];
    const int64_t covered = slot < 0 ? 0 : int64_t{call.rows.covered[slot]} * call.rows.block_size;
    KVC_CHECK(covered <= begin && begin < end && end <= seq_len, "segments has the positions ",
              begin, " to ", end, " of row ", row, ", which are not within its tokens ", covered,
              " to ", seq_len);
    KVC_CHECK(end - begin <= max_segment, "segments has the positions ", begin, " to ", end,
              ", more than max_segment, ", max_segment);
    KVC_CHECK(token >= 0 && token + end - begin <= num_tokens, "segments names the tokens ", token,
              " to ", token + end - begin, " of a query of ", num_tokens);
    work += 3 * int64_t{end - begin} * (end - begin) * call.heads * call.group * call.head_size;
  }
  return work;
}

void echo_scores(const Tensor& query, const Tensor& pages, const Tensor& block_table,
                 const Tensor& seq_lens, const Tensor& state_slot, const Tensor& num_pages,
                 const Tensor& first_page, const Tensor& covered,
                 const std::optional<Tensor>& page_scales, int64_t page_format,
                 const Tensor& segments, const Tensor& rotation, int64_t layer, int64_t max_segment,
                 int64_t num_sinks, bool interleaved, double scale, Tensor scores, double soft_cap,
                 const std::optional<Tensor>& sink_logits) {
  const PagedRows rows = check_echo_scores(
      query, pages, block_table, seq_lens, state_slot, num_pages, first_page, covered, page_scales,
      page_format, segments, rotation, layer, max_segment, num_sinks, scores);
  check_head_size(query.size(2));
  const float* sinks = check_logits(soft_cap, sink_logits, std::nullopt, query.size(1), pages);
  const int64_t num_segments = segments.size(0), heads = num_pages.size(2);
  Call call{rows,
            reinterpret_cast<const Segment*>(segments.const_data_ptr<int32_t>()),
            rotation.const_data_ptr<float>(),
            query.stride(0),
            query.stride(1),
            static_cast<int32_t>(layer),
            static_cast<int32_t>(heads),
            query.size(1) / heads,
            query.size(2),
            1,
            rotation.size(0),
            static_cast<int32_t>(std::min<int64_t>(num_sinks, INT32_MAX)),
            interleaved,
            {scale, soft_cap, sinks}};
  const int64_t work =
      check_values(call, num_segments, query.size(0), max_segment, block_table.size(0),
                   block_table.size(1), num_pages.size(0), pages.size(0) / rows.slots);
  for (int64_t i = 0; i < num_segments; ++i) {
    call.longest = std::max<int64_t>(call.longest, call.segments[i].end - call.segments[i].begin);
  }
  float* result = scores.mutable_data_ptr<float>();
  const Simd& best = simd();
  dispatch_cache_dtype(pages.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* queries = static_cast<const T*>(query.const_data_ptr());
    const T* keys = static_cast<const T*>(pages.const_data_ptr());
    parallel_items(num_segments * heads, work, [&](const auto& next) {
      Runner<T> runner(call);
      for (int64_t i; (i = next()) >= 0;) {
        runner.run(best, call.segments[i / heads], static_cast<int32_t>(i % heads), queries, keys,
                   result);
      }
    });
  });
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("echo_scores", TORCH_BOX(&kvc::echo_scores));
}
