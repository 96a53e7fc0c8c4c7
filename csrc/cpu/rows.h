// SPDX-License-Identifier: Apache-2.0
// Checks of the values in the row tensors. A CPU kernel can afford them, one comparison per page;
// they turn a scheduler bug into an error instead of a read outside the cache.
#pragma once

#include "../checks.h"

namespace kvc {

// The row's state slot exists, and its blocks up to seq_len are in the table and in the pool.
inline void check_row_values(const PagedRows& rows, int64_t request, int64_t seq_len,
                             int64_t table_width, int64_t num_states, int64_t num_blocks) {
  const int64_t slot = rows.state_slot[request];
  KVC_CHECK(slot < num_states, "state_slot of row ", request, " is ", slot, ", beyond ", num_states,
            " states");
  const int64_t num_used = (seq_len + rows.block_size - 1) / rows.block_size;
  KVC_CHECK(num_used <= table_width, "seq_lens of row ", request, " needs ", num_used,
            " blocks, block_table holds ", table_width);
  int64_t packed = 0, tail = 0;
  if (slot >= 0) {
    const int64_t last = (slot + 1) * rows.slots - 1;
    packed = (int64_t{rows.first_page[last]} + rows.num_pages[last] + rows.slots - 1) / rows.slots;
    tail = rows.covered[slot];
    KVC_CHECK(tail <= num_used, "covered of row ", request, " is ", tail, " blocks, seq_lens only ",
              num_used);
    KVC_CHECK(0 <= packed && packed <= tail, "num_pages of row ", request, " fill ", packed,
              " blocks, covered is ", tail);
  }
  const int32_t* row = rows.block_table + request * rows.block_table_stride;
  // Between the packed blocks and the tail stand null blocks, which nothing reads.
  for (int64_t i = 0; i < num_used; ++i) {
    KVC_CHECK((packed <= i && i < tail) || (row[i] >= 0 && row[i] < num_blocks),
              "block_table names block ", row[i], " in row ", request, ", outside the pool of ",
              num_blocks);
  }
}

// What candidates of the row the op is asked for: blocks that the row has, and output pages.
inline void check_candidate_values(const PagedRows& rows, int64_t request, int64_t new_covered,
                                   int64_t page_start, int64_t num_candidate_pages) {
  const int64_t slot = rows.state_slot[request], seq_len = rows.seq_lens[request];
  const int64_t covered = slot < 0 ? 0 : rows.covered[slot];
  KVC_CHECK(covered <= new_covered && new_covered * rows.block_size <= seq_len,
            "new_covered of row ", request, " is ", new_covered, " blocks, covered ", covered,
            ", seq_lens ", seq_len, " tokens");
  const HeadPages last = head_pages(rows, request, rows.slots - 1);
  const int32_t blocks = static_cast<int32_t>(new_covered);
  const int64_t end = page_start + last.first_candidate(blocks) + last.candidate_pages(blocks);
  KVC_CHECK(0 <= page_start && end <= num_candidate_pages, "page_start of row ", request,
            " leads to page ", end, " of num_candidate_pages ", num_candidate_pages);
}

}  // namespace kvc
