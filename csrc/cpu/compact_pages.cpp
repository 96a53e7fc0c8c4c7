// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.compact_pages on the CPU.
#include <torch/csrc/stable/library.h>

#include "../op_checks.h"
#include "parallel.h"
#include "rows.h"

namespace kvc {
namespace {

struct Call {
  PagedRows rows;
  const int32_t* kept_pages;  // [R, L, H]
  const int32_t* kept_first;  // [R, L, H]
  const int32_t* kept_keys;   // [kept pages, B]
  const int32_t* new_blocks;  // [R, >= C]
  int64_t new_blocks_stride;
  int64_t key_bytes;  // of K and V of one key
};

// Reads from standard or packed pages, writes to packed pages that nobody else touches.
void compact_head(const Call& call, int64_t request, int64_t head_slot, char* pages) {
  const int64_t slots = call.rows.slots, index = request * slots + head_slot;
  const int32_t block_size = call.rows.block_size;
  const int64_t page_bytes = block_size * call.key_bytes;
  const HeadPages head = head_pages(call.rows, request, static_cast<int32_t>(head_slot));
  const int32_t first = call.kept_first[index] - call.kept_first[request * slots];
  const int32_t* keys = call.kept_keys + int64_t{call.kept_first[index]} * block_size;
  const int32_t* blocks = call.new_blocks + request * call.new_blocks_stride;
  for (int32_t j = 0; j < call.kept_pages[index]; ++j, keys += block_size) {
    char* target = pages + packed_page_id(blocks, first + j, call.rows.slots) * page_bytes;
    for (int32_t i = 0, run; i < block_size; i += run) {
      // Neighbours mostly survive together: one copy per run of keys within a page.
      const int32_t offset = keys[i] % block_size;
      for (run = 1; i + run < block_size && offset + run < block_size; ++run) {
        if (keys[i + run] != keys[i] + run) break;
      }
      const char* source = pages + head.page_id(keys[i] / block_size) * page_bytes;
      std::memcpy(target + i * call.key_bytes, source + offset * call.key_bytes,
                  run * call.key_bytes);
    }
  }
}

// The kept pages follow each other, fit new_blocks, and name keys that the row holds.
void check_values(const Call& call, int64_t request, int64_t table_width, int64_t new_width,
                  int64_t num_states, int64_t num_blocks, int64_t num_kept) {
  const int64_t slots = call.rows.slots, block_size = call.rows.block_size;
  const int64_t slot = call.rows.state_slot[request];
  KVC_CHECK(slot < num_states, "state_slot of row ", request, " is ", slot, ", beyond ", num_states,
            " states");
  int64_t next = call.kept_first[request * slots], seq_len = 0;
  const int64_t base = next;
  for (int64_t h = 0; h < slots; ++h) {
    const int64_t index = request * slots + h, count = call.kept_pages[index];
    KVC_CHECK(count >= 0 && call.kept_first[index] == next && next + count <= num_kept,
              "kept_first of row ", request,
              " must be the exclusive prefix sum of kept_pages, "
              "within the ",
              num_kept, " pages of kept_keys");
    const int32_t* keys = call.kept_keys + next * block_size;
    int64_t last = -1;
    for (int64_t i = 0; i < count * block_size; ++i) {
      KVC_CHECK(keys[i] >= 0, "kept_keys names key ", keys[i]);
      last = std::max<int64_t>(last, keys[i]);
    }
    // Tokens that the row must have for the head to hold its last kept key.
    const HeadPages head = head_pages(call.rows, request, static_cast<int32_t>(h));
    seq_len = std::max(seq_len, last + 1 - head.num_keys(0));
    next += count;
  }
  const int64_t used = ceil_div(next - base, slots);
  KVC_CHECK(used <= new_width, "new_blocks has ", new_width, " blocks per row, row ", request,
            " needs ", used);
  if (slot >= 0) seq_len = std::max(seq_len, call.rows.covered[slot] * block_size);
  check_row_values(call.rows, request, seq_len, table_width, num_states, num_blocks);
  for (int64_t i = 0; i < used; ++i) {
    const int32_t block = call.new_blocks[request * call.new_blocks_stride + i];
    KVC_CHECK(block >= 0 && block < num_blocks, "new_blocks names block ", block, " in row ",
              request, ", outside the pool of ", num_blocks);
  }
}

void compact_pages(Tensor pages, const Tensor& block_table, const Tensor& state_slot,
                   const Tensor& num_pages, const Tensor& first_page, const Tensor& covered,
                   const Tensor& kept_pages, const Tensor& kept_first, const Tensor& kept_keys,
                   const Tensor& new_blocks) {
  const PagedRows rows =
      check_compact_pages(pages, block_table, state_slot, num_pages, first_page, covered,
                          kept_pages, kept_first, kept_keys, new_blocks);
  const int64_t requests = block_table.size(0);
  const Call call{rows,
                  kept_pages.const_data_ptr<int32_t>(),
                  kept_first.const_data_ptr<int32_t>(),
                  kept_keys.const_data_ptr<int32_t>(),
                  new_blocks.const_data_ptr<int32_t>(),
                  new_blocks.stride(0),
                  pages.size(2) * static_cast<int64_t>(pages.element_size())};
  for (int64_t r = 0; r < requests; ++r) {
    check_values(call, r, block_table.size(1), new_blocks.size(1), num_pages.size(0),
                 pages.size(0) / rows.slots, kept_keys.size(0));
  }
  char* data = static_cast<char*>(pages.mutable_data_ptr());
  const int64_t work = kept_keys.numel() * call.key_bytes;
  parallel_items(requests * rows.slots, work, [&](const auto& next) {
    for (int64_t i; (i = next()) >= 0;) compact_head(call, i / rows.slots, i % rows.slots, data);
  });
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("compact_pages", TORCH_BOX(&kvc::compact_pages));
}
