// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.select_pages on the CPU.
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <limits>
#include <tuple>
#include <vector>

#include "../op_checks.h"
#include "parallel.h"

namespace kvc {
namespace {

struct Call {
  PagedRows rows;
  const float* scores;
  const int64_t* page_start;   // [R]
  const int32_t* new_covered;  // [R]
  const int32_t* num_freed;    // [R, A]
  const int32_t* num_recent;   // [R]
  int64_t num_requests, groups, num_sinks, floor_pages;
  int32_t block_size, page_keys;  // B, T
};

// Candidates of one (request, layer, head): where they begin in pages of `scores`, and how many
// packed pages they are.
struct Candidates {
  int64_t first_page, num_pages, evictable;
};

// Unsigned integers in the order of the floats; -0.0 as 0.0, NaN as +inf.
uint32_t sortable(float score) {
  score = score != score ? std::numeric_limits<float>::infinity() : score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// What is sorted: a cost above, the tie-breaker below.
uint64_t ranked(uint32_t cost, int64_t tie) {
  return static_cast<uint64_t>(cost) << 32 | static_cast<uint64_t>(tie);
}

Candidates candidates_of(const Call& call, int64_t request, int64_t head_slot) {
  const HeadPages head = head_pages(call.rows, request, static_cast<int32_t>(head_slot));
  const int64_t units = head.candidate_pages(call.new_covered[request]), m = head.page_blocks;
  KVC_CHECK(units % m == 0, "new_covered and covered of request ", request, " leave a head ", units,
            " blocks of candidates, not whole pages of ", m);
  const int64_t count = units / m;
  return {call.page_start[request] + head.first_candidate(call.new_covered[request]), count,
          std::max<int64_t>(0, count - call.floor_pages)};
}

// Sorts the keys of one head that are not shielded ascending by (score, key), and prices its pages.
// The floor covers the shields, so nobody asks for what comes after.
void order_head(const Call& call, int64_t request, const Candidates& head,
                std::vector<uint64_t>* buffer, int32_t* order, uint32_t* price) {
  const int64_t count = head.num_pages * call.page_keys;
  const float* scores = call.scores + head.first_page * call.block_size;
  order += head.first_page * call.block_size;
  price += head.first_page;
  buffer->clear();
  for (int64_t key = call.num_sinks; key < count - call.num_recent[request]; ++key) {
    buffer->push_back(ranked(sortable(scores[key]), key));
  }
  std::sort(buffer->begin(), buffer->end());
  for (const uint64_t entry : *buffer) *order++ = static_cast<int32_t>(entry);
  for (int64_t e = 0; e < head.evictable; ++e) {
    price[e] = static_cast<uint32_t>((*buffer)[(e + 1) * call.page_keys - 1] >> 32);
  }
}

// Frees the cheapest pages of one group of heads: adds up `lost` per head of the request.
void free_group(const Call& call, int64_t request, int64_t group, const Candidates* heads,
                const uint32_t* price, std::vector<uint64_t>* buffer, int32_t* lost) {
  const int64_t size = call.rows.slots / call.groups, first = group * size;
  const int64_t wanted = call.num_freed[request * call.groups + group];
  buffer->clear();
  // Pages are numbered by (head, page) within the group: the tie-breaker.
  for (int64_t h = first; h < first + size; ++h) {
    for (int64_t e = 0; e < heads[h].evictable; ++e) {
      buffer->push_back(
          ranked(price[heads[h].first_page + e], static_cast<int64_t>(buffer->size())));
    }
  }
  const int64_t available = static_cast<int64_t>(buffer->size());
  KVC_CHECK(0 <= wanted && wanted <= available, "num_freed: request ", request, " is to free ",
            wanted, " pages of a group of heads that can free ", available);
  if (wanted == 0) return;
  std::nth_element(buffer->begin(), buffer->begin() + (wanted - 1), buffer->end());
  const uint64_t dearest = (*buffer)[wanted - 1];
  int64_t number = 0;
  for (int64_t h = first; h < first + size; ++h) {
    for (int64_t e = 0; e < heads[h].evictable; ++e, ++number) {
      lost[h] += ranked(price[heads[h].first_page + e], number) <= dearest;
    }
  }
}

// Writes the keys of one head that survive, ascending.
void keep_head(const Call& call, const Candidates& head, int64_t lost, const int32_t* order,
               std::vector<char>* freed, int32_t* kept_keys) {
  const int64_t count = head.num_pages * call.page_keys;
  order += head.first_page * call.block_size;
  freed->assign(static_cast<size_t>(count), 0);
  for (int64_t i = 0; i < lost * call.page_keys; ++i) (*freed)[order[i]] = 1;
  for (int64_t key = 0; key < count; ++key) {
    if (!(*freed)[key]) *kept_keys++ = static_cast<int32_t>(key);
  }
}

std::vector<Candidates> all_candidates(const Call& call, int64_t num_states, int64_t pages) {
  std::vector<Candidates> heads;
  heads.reserve(call.num_requests * call.rows.slots);
  for (int64_t r = 0; r < call.num_requests; ++r) {
    KVC_CHECK(call.rows.state_slot[r] < num_states, "state_slot of request ", r, " is ",
              call.rows.state_slot[r], ", beyond ", num_states, " states");
    KVC_CHECK(call.num_recent[r] >= 0 &&
                  call.floor_pages * call.page_keys >= call.num_sinks + call.num_recent[r],
              "floor_pages must cover num_sinks and num_recent, ", call.num_sinks, " and ",
              call.num_recent[r], " keys, not ", call.floor_pages, " pages");
    for (int64_t h = 0; h < call.rows.slots; ++h) {
      const Candidates head = candidates_of(call, r, h);
      KVC_CHECK(head.num_pages >= 0 && head.first_page >= 0 &&
                    head.first_page + head.num_pages * call.rows.page_blocks <= pages,
                "page_start and new_covered of request ", r, " name pages ", head.first_page,
                " to ", head.first_page + head.num_pages * call.rows.page_blocks, " of the ", pages,
                " in scores");
      heads.push_back(head);
    }
  }
  return heads;
}

void select(const Call& call, const std::vector<Candidates>& heads, int64_t num_kept_pages,
            int64_t num_score_pages, int32_t* kept_pages, int32_t* kept_first, int32_t* kept_keys) {
  const int64_t slots = call.rows.slots, num_heads = call.num_requests * slots;
  std::vector<int32_t> order(num_score_pages * call.block_size), lost(num_heads, 0);
  std::vector<uint32_t> price(num_score_pages);
  const int64_t work = num_score_pages * call.block_size * 16;  // comparisons to sort a key
  parallel_items(num_heads, work, [&](const auto& next) {
    std::vector<uint64_t> buffer;
    for (int64_t i; (i = next()) >= 0;) {
      order_head(call, i / slots, heads[i], &buffer, order.data(), price.data());
    }
  });
  std::vector<uint64_t> buffer;
  int64_t total = 0;
  for (int64_t r = 0; r < call.num_requests; ++r) {
    for (int64_t group = 0; group < call.groups; ++group) {
      free_group(call, r, group, &heads[r * slots], price.data(), &buffer, &lost[r * slots]);
    }
  }
  for (int64_t i = 0; i < num_heads; ++i) {
    kept_pages[i] = static_cast<int32_t>(heads[i].num_pages - lost[i]);
    kept_first[i] = static_cast<int32_t>(total);
    total += kept_pages[i];
  }
  KVC_CHECK(total == num_kept_pages, "num_freed leaves ", total, " pages, num_kept_pages is ",
            num_kept_pages);
  parallel_items(num_heads, work, [&](const auto& next) {
    std::vector<char> freed;
    for (int64_t i; (i = next()) >= 0;) {
      keep_head(call, heads[i], lost[i], order.data(), &freed,
                kept_keys + int64_t{kept_first[i]} * call.page_keys);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> select_pages(const Tensor& scores, const Tensor& page_start,
                                                const Tensor& state_slot, const Tensor& num_pages,
                                                const Tensor& first_page, const Tensor& covered,
                                                const std::optional<Tensor>& page_scales,
                                                int64_t page_format, const Tensor& new_covered,
                                                const Tensor& num_freed, const Tensor& num_recent,
                                                int64_t num_sinks, int64_t floor_pages,
                                                int64_t num_kept_pages) {
  const PagedRows rows = check_select_pages(
      scores, page_start, state_slot, num_pages, first_page, covered, page_scales, page_format,
      new_covered, num_freed, num_recent, num_sinks, floor_pages, num_kept_pages);
  const int64_t requests = num_freed.size(0), groups = num_freed.size(1);
  const Call call{rows,
                  scores.const_data_ptr<float>(),
                  page_start.const_data_ptr<int64_t>(),
                  new_covered.const_data_ptr<int32_t>(),
                  num_freed.const_data_ptr<int32_t>(),
                  num_recent.const_data_ptr<int32_t>(),
                  requests,
                  groups,
                  num_sinks,
                  floor_pages,
                  static_cast<int32_t>(scores.size(1)),
                  static_cast<int32_t>(scores.size(1)) * rows.page_blocks};
  const std::vector<Candidates> heads = all_candidates(call, num_pages.size(0), scores.size(0));
  const auto empty = [&scores](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(scores, size, ScalarType::Int);
  };
  Tensor kept_pages = empty({requests, num_pages.size(1), num_pages.size(2)});
  Tensor kept_first = empty({requests, num_pages.size(1), num_pages.size(2)});
  Tensor kept_keys = empty({num_kept_pages, call.page_keys});
  select(call, heads, num_kept_pages, scores.size(0), kept_pages.mutable_data_ptr<int32_t>(),
         kept_first.mutable_data_ptr<int32_t>(), kept_keys.mutable_data_ptr<int32_t>());
  return {kept_pages, kept_first, kept_keys};
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("select_pages", TORCH_BOX(&kvc::select_pages));
}
