// SPDX-License-Identifier: Apache-2.0
// torch.ops.kvcompress_vllm.fit_scales and compact_pages on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../op_checks.h"
#include "codes.h"
#include "convert.h"
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
  const int32_t page_keys = call.rows.block_size * call.rows.page_blocks;
  const int64_t page_bytes = page_keys * call.key_bytes;
  const HeadPages head = head_pages(call.rows, request, static_cast<int32_t>(head_slot));
  const int32_t first = call.kept_first[index] - call.kept_first[request * slots];
  const int32_t* keys = call.kept_keys + int64_t{call.kept_first[index]} * page_keys;
  const int32_t* blocks = call.new_blocks + request * call.new_blocks_stride;
  for (int32_t j = 0; j < call.kept_pages[index]; ++j, keys += page_keys) {
    char* target = pages + packed_page_id(blocks, first + j, call.rows.slots) * page_bytes;
    for (int32_t i = 0, run; i < page_keys; i += run) {
      // Neighbours mostly survive together: one copy per run of keys within a page.
      const auto [page, offset] = head.place(keys[i]);
      const int32_t end = keys[i] < head.packed_keys() ? page_keys : call.rows.block_size;
      for (run = 1; i + run < page_keys && offset + run < end; ++run) {
        if (keys[i + run] != keys[i] + run) break;
      }
      const char* source = pages + head.page_id(page) * page_bytes;
      std::memcpy(target + i * call.key_bytes, source + offset * call.key_bytes,
                  run * call.key_bytes);
    }
  }
}

// One head's kept keys in fp32 as codes stand for them, wherever they are.
template <typename T>
class Reader {
 public:
  Reader(const Call& call, int64_t head_size)
      : call_(call), codes_(head_size), head_size_(head_size), numbers_(2 * head_size) {}

  const float* read(const Simd& simd, const HeadPages& head, const char* pages, int32_t key) {
    const auto [page, within] = head.place(key);
    const int64_t number = 2 * head_size_ * int64_t{sizeof(T)};
    const char* in = pages + head.page_id(page) * call_.rows.block_size * number;
    if (key < head.packed_keys()) {
      codes_.read(head, in + within * number / head.page_blocks, numbers_.data(),
                  numbers_.data() + head_size_, true);
    } else {
      to_float(simd, reinterpret_cast<const T*>(in + within * number), numbers_.data(),
               2 * head_size_);
      codes_.to_stored(call_.rows.page_blocks, numbers_.data());
    }
    return numbers_.data();
  }

  // The same, as codes of other scales, in the new packed blocks.
  void quantise_head(const Simd& simd, int64_t request, int64_t head_slot,
                     const uint16_t* new_scales, char* pages) {
    const PagedRows& rows = call_.rows;
    const int64_t slots = rows.slots, index = request * slots + head_slot;
    const int32_t page_keys = rows.block_size * rows.page_blocks;
    const int64_t page_bytes = rows.block_size * 2 * head_size_ * int64_t{sizeof(T)};
    const HeadPages head = head_pages(rows, request, static_cast<int32_t>(head_slot));
    const int32_t first = call_.kept_first[index] - call_.kept_first[request * slots];
    const int32_t* keys = call_.kept_keys + int64_t{call_.kept_first[index]} * page_keys;
    const int32_t* blocks = call_.new_blocks + request * call_.new_blocks_stride;
    for (int32_t j = 0; j < call_.kept_pages[index]; ++j, keys += page_keys) {
      char* target = pages + packed_page_id(blocks, first + j, rows.slots) * page_bytes;
      for (int32_t i = 0; i < page_keys; ++i) {
        codes_.write(rows.page_blocks, new_scales + index * rows.scales_size,
                     read(simd, head, pages, keys[i]), target + page_bytes / page_keys * i);
      }
    }
  }

  // Scales for the kept keys of a head.
  void fit_head(const Simd& simd, int64_t request, int64_t head_slot, const char* pages,
                uint16_t* scales) {
    const PagedRows& rows = call_.rows;
    const int64_t index = request * rows.slots + head_slot,
                  page_keys = rows.block_size * rows.page_blocks;
    const int64_t count = call_.kept_pages[index] * page_keys;
    if (count == 0) return;
    scales += index * rows.scales_size;
    const int32_t* keys = call_.kept_keys + int64_t{call_.kept_first[index]} * page_keys;
    const HeadPages head = head_pages(rows, request, static_cast<int32_t>(head_slot));
    const int32_t packed = head.packed_keys();
    std::vector<float> low(2 * head_size_, std::numeric_limits<float>::infinity());
    std::vector<float> high(2 * head_size_, -std::numeric_limits<float>::infinity());
    // Ascending: those of packed pages come first.
    const int32_t* fresh = std::lower_bound(keys, keys + count, packed);
    for (const int32_t* key = fresh; key < keys + count; ++key) {
      const float* numbers = read(simd, head, pages, *key);
      for (int64_t i = 0; i < 2 * head_size_; ++i) {
        low[i] = std::min(low[i], numbers[i]);
        high[i] = std::max(high[i], numbers[i]);
      }
    }
    const bool anew = fresh == keys;
    if (fresh == keys + count) {
      std::copy_n(head.scales, rows.scales_size, scales);
    } else if (rows.page_blocks == blocks_per_page(kFp8)) {
      for (int side = 0; side < 2; ++side) {
        float largest = 0.0f;
        for (int64_t i = side * head_size_; i < (side + 1) * head_size_; ++i) {
          largest = std::max({largest, std::fabs(low[i]), std::fabs(high[i])});
        }
        scales[side] = anew ? fit_fp8(largest) : widen_fp8(head.scales[side], largest);
      }
    } else {
      fit_channels(simd, head, pages, fresh, keys + count - fresh, fresh - keys, low, high, scales);
    }
  }

 private:
  // Of every channel, of those that may be, the range with the least squared error: of `count` new
  // keys, and of what moving costs `kept` others.
  void fit_channels(const Simd& simd, const HeadPages& head, const char* pages, const int32_t* keys,
                    int64_t count, int64_t kept, const std::vector<float>& low,
                    const std::vector<float>& high, uint16_t* scales) {
    const int64_t channels = 2 * head_size_;
    std::vector<double> least(channels);
    std::vector<int64_t> squares(channels);
    const int apart = judged_apart(count), parts = parts_of_step(kept == 0);
    const int64_t judged = (count + apart - 1) / apart, others = kept * judged / count;
    const auto range = [&](int64_t i, int index) {
      if (kept == 0) return fit_int4(low[i], high[i], index);
      return widen_int4({head.scales[i], head.scales[channels + i]}, low[i], high[i], index);
    };
    std::vector<float> bounds(3 * channels);  // least and greatest of the codes, parts / scale
    for (int index = 0; index < kNumCuts; ++index) {
      std::fill(squares.begin(), squares.end(), 0);
      for (int64_t i = 0; i < channels; ++i) {
        const Int4Scale of = range(i, index);
        const float scale = scale_float(of.scale);
        bounds[i] = scale_float(of.zero) - 8.0f * scale;
        bounds[channels + i] = scale_float(of.zero) + 7.0f * scale;
        bounds[2 * channels + i] = inverse_scale(scale) * static_cast<float>(parts);
      }
      for (int64_t key = 0; index > 0 && key < count; key += apart) {
        const float* numbers = read(simd, head, pages, keys[key]);
        for (int64_t i = 0; i < channels; ++i) {
          const int64_t steps =
              steps_outside(numbers[i], bounds[i], bounds[channels + i], bounds[2 * channels + i]);
          squares[i] += steps * steps;
        }
      }
      const int64_t moved = kept > 0 && index == 1 ? 0 : others;
      for (int64_t i = 0; i < channels; ++i) {
        const Int4Scale of = range(i, index);
        const double error = error_int4(judged + moved, parts, squares[i], scale_float(of.scale));
        if (index > 0 && !(error < least[i])) continue;
        least[i] = error;
        scales[i] = of.scale;
        scales[channels + i] = of.zero;
      }
    }
  }

  const Call& call_;
  Codes codes_;
  int64_t head_size_;
  std::vector<float> numbers_;
};

// The kept pages follow each other, fit new_blocks, and name keys that the row holds.
void check_values(const Call& call, int64_t request, int64_t table_width, int64_t new_width,
                  int64_t num_states, int64_t num_blocks, int64_t num_kept) {
  const int64_t slots = call.rows.slots, block_size = call.rows.block_size;
  const int64_t page_keys = block_size * call.rows.page_blocks;
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
    const int32_t* keys = call.kept_keys + next * page_keys;
    int64_t last = -1;
    for (int64_t i = 0; i < count * page_keys; ++i) {
      KVC_CHECK(keys[i] >= 0, "kept_keys names key ", keys[i]);
      last = std::max<int64_t>(last, keys[i]);
    }
    // Tokens that the row must have for the head to hold its last kept key.
    const HeadPages head = head_pages(call.rows, request, static_cast<int32_t>(h));
    seq_len = std::max(seq_len, last + 1 - head.num_keys(0));
    next += count;
  }
  const int64_t used = ceil_div(next - base, slots);
  KVC_CHECK(!call.new_blocks || used <= new_width, "new_blocks has ", new_width,
            " blocks per row, row ", request, " needs ", used);
  if (slot >= 0) seq_len = std::max(seq_len, call.rows.covered[slot] * block_size);
  check_row_values(call.rows, request, seq_len, table_width, num_states, num_blocks);
  for (int64_t i = 0; call.new_blocks && i < used; ++i) {
    const int32_t block = call.new_blocks[request * call.new_blocks_stride + i];
    KVC_CHECK(block >= 0 && block < num_blocks, "new_blocks names block ", block, " in row ",
              request, ", outside the pool of ", num_blocks);
  }
}

void check_all(const Call& call, const Tensor& pages, const Tensor& block_table,
               const Tensor& num_pages, const Tensor& kept_keys, int64_t new_width) {
  for (int64_t r = 0; r < block_table.size(0); ++r) {
    check_values(call, r, block_table.size(1), new_width, num_pages.size(0),
                 pages.size(0) / call.rows.slots, kept_keys.size(0));
  }
}

Tensor fit_scales(const Tensor& pages, const Tensor& block_table, const Tensor& state_slot,
                  const Tensor& num_pages, const Tensor& first_page, const Tensor& covered,
                  const std::optional<Tensor>& page_scales, int64_t page_format,
                  const Tensor& kept_pages, const Tensor& kept_first, const Tensor& kept_keys) {
  const PagedRows rows =
      check_fit_scales(pages, block_table, state_slot, num_pages, first_page, covered, page_scales,
                       page_format, kept_pages, kept_first, kept_keys);
  const int64_t requests = block_table.size(0), head_size = pages.size(2) / 2;
  const Call call{rows,
                  kept_pages.const_data_ptr<int32_t>(),
                  kept_first.const_data_ptr<int32_t>(),
                  kept_keys.const_data_ptr<int32_t>(),
                  nullptr,
                  0,
                  0};
  check_all(call, pages, block_table, num_pages, kept_keys, -1);
  const int format = static_cast<int>(page_format);
  Tensor out =
      torch::stable::new_zeros(pages,
                               {requests, num_pages.size(1), num_pages.size(2), scales_rows(format),
                                scales_columns(format, static_cast<int>(head_size))},
                               ScalarType::BFloat16);
  uint16_t* scales = static_cast<uint16_t*>(out.mutable_data_ptr());
  const char* data = static_cast<const char*>(pages.const_data_ptr());
  const Simd& best = simd();
  dispatch_cache_dtype(pages.scalar_type(), [&](auto type) {
    using T = decltype(type);
    parallel_items(requests * rows.slots, kept_keys.numel() * 2 * head_size, [&](const auto& next) {
      Reader<T> reader(call, head_size);
      for (int64_t i; (i = next()) >= 0;) {
        reader.fit_head(best, i / rows.slots, i % rows.slots, data, scales);
      }
    });
  });
  return out;
}

void compact_pages(Tensor pages, const Tensor& block_table, const Tensor& state_slot,
                   const Tensor& num_pages, const Tensor& first_page, const Tensor& covered,
                   const std::optional<Tensor>& page_scales, int64_t page_format,
                   const Tensor& kept_pages, const Tensor& kept_first, const Tensor& kept_keys,
                   const Tensor& new_blocks, const std::optional<Tensor>& new_scales) {
  const bool codes = new_scales.has_value();
  const PagedRows rows = check_compact_pages(pages, block_table, state_slot, num_pages, first_page,
                                             covered, page_scales, page_format, kept_pages,
                                             kept_first, kept_keys, new_blocks, new_scales);
  const int64_t requests = block_table.size(0);
  const Call call{rows,
                  kept_pages.const_data_ptr<int32_t>(),
                  kept_first.const_data_ptr<int32_t>(),
                  kept_keys.const_data_ptr<int32_t>(),
                  new_blocks.const_data_ptr<int32_t>(),
                  new_blocks.stride(0),
                  pages.size(2) * static_cast<int64_t>(pages.element_size())};
  check_all(call, pages, block_table, num_pages, kept_keys, new_blocks.size(1));
  char* data = static_cast<char*>(pages.mutable_data_ptr());
  const int64_t work = kept_keys.numel() * call.key_bytes;
  if (!codes) {
    parallel_items(requests * rows.slots, work, [&](const auto& next) {
      for (int64_t i; (i = next()) >= 0;) compact_head(call, i / rows.slots, i % rows.slots, data);
    });
    return;
  }
  const uint16_t* scales = static_cast<const uint16_t*>(new_scales->const_data_ptr());
  const Simd& best = simd();
  dispatch_cache_dtype(pages.scalar_type(), [&](auto type) {
    using T = decltype(type);
    parallel_items(requests * rows.slots, work, [&](const auto& next) {
      Reader<T> reader(call, pages.size(2) / 2);
      for (int64_t i; (i = next()) >= 0;) {
        reader.quantise_head(best, i / rows.slots, i % rows.slots, scales, data);
      }
    });
  });
}

}  // namespace
}  // namespace kvc

STABLE_TORCH_LIBRARY_IMPL(kvcompress_vllm, CPU, m) {
  m.impl("fit_scales", TORCH_BOX(&kvc::fit_scales));
  m.impl("compact_pages", TORCH_BOX(&kvc::compact_pages));
}
