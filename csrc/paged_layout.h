// SPDX-License-Identifier: Apache-2.0
// The page arithmetic of the KV cache: the only place in C++ and CUDA that computes a page id.
// Python twin and drawing: kvcompress_vllm/cache/layout.py. Shape letters as there.
#pragma once

#include <cstdint>

#include "page_format.h"

namespace kvc {

// The tensors that describe the rows of a batch, as raw pointers.
struct PagedRows {
  const int32_t* block_table;   // [R, M] block ids, logical length
  int64_t block_table_stride;   // elements between rows
  const int32_t* seq_lens;      // [R] tokens in the cache
  const int32_t* state_slot;    // [R] row of the state tables, -1: not packed
  const int32_t* num_pages;     // [U, L, H] packed pages per head
  const int32_t* first_page;    // [U, L, H] exclusive prefix sum of num_pages over (L, H)
  const int32_t* covered;       // [U] F, full blocks covered by compression
  int32_t slots;                // L * H, pages in a block
  int32_t block_size;           // B
  int32_t page_blocks;          // m, blocks whose keys a packed page holds
  const uint16_t* page_scales;  // [U, L, H, A, S] bf16, nullptr with m = 1
  int32_t scales_size;          // A * S
};

// One (request, layer, head): where its keys are.
struct HeadPages {
  const int32_t* row;      // [M] the request's block ids
  int32_t covered;         // F
  int32_t packed;          // packed pages of this head
  int32_t first;           // first packed page of this head
  int32_t head_slot;       // l * H + h
  int32_t slots;           // L * H
  int32_t block_size;      // B
  int32_t page_blocks;     // m
  const uint16_t* scales;  // [A, S], nullptr: there are no codes

  // Page id of the head's j-th page. 32 bits hold every page id; byte offsets need 64.
  KVC_HOST_DEVICE int32_t page_id(int32_t j) const {
    if (j < packed) {
      const PackedPage page = packed_page(j);
      return row[page.block] * slots + page.slot;
    }
    return row[covered + j - packed] * slots + head_slot;
  }

  // Where page_id() finds packed page j: a block of the row, and a page of that block.
  struct PackedPage {
    int32_t block, slot;
  };
  KVC_HOST_DEVICE PackedPage packed_page(int32_t j) const {
    const uint32_t i = first + j, of = slots;
    return {static_cast<int32_t>(i / of), static_cast<int32_t>(i % of)};
  }

  // The tail alone, as if nothing were packed.
  KVC_HOST_DEVICE HeadPages tail() const {
    HeadPages head = *this;
    head.row += covered;
    head.covered = head.packed = head.first = 0;
    return head;
  }

  // K/V vectors the head holds for a request of seq_len tokens.
  KVC_HOST_DEVICE int32_t num_keys(int32_t seq_len) const {
    return (packed * page_blocks - covered) * block_size + seq_len;
  }

  // Keys of packed pages; key k from here on is key k - packed_keys() of the tail.
  KVC_HOST_DEVICE int32_t packed_keys() const { return packed * page_blocks * block_size; }

  // Where key `key` is: a page, and which of its keys. `page` is page_id()'s argument.
  struct Place {
    int32_t page, within;
  };
  KVC_HOST_DEVICE Place place(int32_t key) const {
    const int32_t page_keys = page_blocks * block_size, behind = key - packed_keys();
    if (behind < 0) return {key / page_keys, key % page_keys};
    return {packed + behind / block_size, behind % block_size};
  }

  // What a compression may choose from, up to block new_covered, in units of B keys.
  KVC_HOST_DEVICE int32_t candidate_pages(int32_t new_covered) const {
    return packed * page_blocks + new_covered - covered;
  }

  // First candidate of the head, counted within its request, in the same units.
  KVC_HOST_DEVICE int32_t first_candidate(int32_t new_covered) const {
    return first * page_blocks + head_slot * (new_covered - covered);
  }
};

KVC_HOST_DEVICE HeadPages head_pages(const PagedRows& rows, int64_t request, int32_t head_slot) {
  const int32_t slot = rows.state_slot[request];
  HeadPages head;
  head.row = rows.block_table + request * rows.block_table_stride;
  head.head_slot = head_slot;
  head.slots = rows.slots;
  head.block_size = rows.block_size;
  head.page_blocks = rows.page_blocks;
  head.scales = nullptr;
  head.covered = head.packed = head.first = 0;
  if (slot >= 0) {
    const int64_t index = static_cast<int64_t>(slot) * rows.slots + head_slot;
    head.covered = rows.covered[slot];
    head.packed = rows.num_pages[index];
    head.first = rows.first_page[index];
    if (rows.page_scales) head.scales = rows.page_scales + index * rows.scales_size;
  }
  return head;
}

// Page id of page i of a request's packed blocks.
KVC_HOST_DEVICE int32_t packed_page_id(const int32_t* blocks, int32_t i, int32_t slots) {
  return blocks[i / slots] * slots + i % slots;
}

}  // namespace kvc
