// SPDX-License-Identifier: Apache-2.0
// Checks of op arguments, shared by the CPU and CUDA launchers. Every message names the argument.
// They look at metadata only, never at values, so they cost no synchronisation on a GPU.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "channels.h"
#include "dispatch.h"
#include "paged_layout.h"

// Not STD_TORCH_CHECK: that formats with a stream, and torch exports parts of a libstdc++ of its
// own, with which a stream of ours ends the process where Python links another one. See message()
// below.
#define KVC_CHECK(condition, ...)                            \
  do {                                                       \
    if (!(condition)) {                                      \
      throw std::runtime_error(::kvc::message(__VA_ARGS__)); \
    }                                                        \
  } while (false)

#define KVC_CHECK_TENSOR(t, dtype, dim, like) ::kvc::check_tensor(t, #t, dtype, dim, like)
#define KVC_CHECK_CACHE_DTYPE(t)                      \
  KVC_CHECK(::kvc::is_cache_dtype((t).scalar_type()), \
            #t " must be float32, float16 or bfloat16, not ", (t).scalar_type())
#define KVC_CHECK_DENSE(t) KVC_CHECK((t).is_contiguous(), #t " must be contiguous")
#define KVC_CHECK_LAST_DENSE(t)                                             \
  KVC_CHECK((t).stride((t).dim() - 1) == 1 || (t).size((t).dim() - 1) <= 1, \
            "the last dimension of " #t " must be dense")
#define KVC_CHECK_SIZE(t, dim, expected)                                                         \
  KVC_CHECK((t).size(dim) == (expected), #t " must have size ", expected, " in dimension ", dim, \
            ", not ", (t).size(dim))

namespace kvc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Part>
void append(std::string& text, const Part& part) {
  if constexpr (std::is_same_v<Part, ScalarType>) {
    text += torch::headeronly::toString(part);
  } else if constexpr (std::is_arithmetic_v<Part>) {
    text += std::to_string(part);
  } else {
    text += part;
  }
}

// The parts of an error message, joined.
template <typename... Parts>
std::string message(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

inline void check_tensor(const Tensor& t, const char* name, ScalarType dtype, int64_t dim,
                         const Tensor& like) {
  KVC_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name,
            " is on another device than the other arguments");
  KVC_CHECK(t.scalar_type() == dtype, name, " must be ", dtype, ", not ", t.scalar_type());
  KVC_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, not ", t.dim());
}

// One number per request, [R] int32 (or int64), as a pointer.
template <typename T>
const T* check_per_request(const Tensor& t, const char* name, int64_t num_requests,
                           const Tensor& like) {
  check_tensor(t, name, sizeof(T) == 8 ? ScalarType::Long : ScalarType::Int, 1, like);
  KVC_CHECK(t.is_contiguous(), name, " must be contiguous");
  KVC_CHECK(t.size(0) == num_requests, name, " must have one element per request, ", num_requests,
            ", not ", t.size(0));
  return t.const_data_ptr<T>();
}
#define KVC_CHECK_PER_REQUEST(T, t, num_requests, like) \
  ::kvc::check_per_request<T>(t, #t, num_requests, like)

// The state part of PagedRows: state_slot [R], num_pages and first_page [U, L, H], covered [U].
// page_scales [U, L, H, A, S] is there unless page_format is auto.
inline PagedRows check_state(const Tensor& state_slot, const Tensor& num_pages,
                             const Tensor& first_page, const Tensor& covered,
                             const std::optional<Tensor>& page_scales, int64_t page_format,
                             int64_t num_requests, int64_t block_size, const Tensor& like) {
  KVC_CHECK_TENSOR(num_pages, ScalarType::Int, 3, like);
  KVC_CHECK_TENSOR(first_page, ScalarType::Int, 3, like);
  KVC_CHECK_TENSOR(covered, ScalarType::Int, 1, like);
  KVC_CHECK_DENSE(num_pages);
  KVC_CHECK_DENSE(first_page);
  KVC_CHECK_DENSE(covered);
  KVC_CHECK_SIZE(first_page, 0, num_pages.size(0));
  KVC_CHECK_SIZE(first_page, 1, num_pages.size(1));
  KVC_CHECK_SIZE(first_page, 2, num_pages.size(2));
  KVC_CHECK_SIZE(covered, 0, num_pages.size(0));
  PagedRows rows{};
  rows.state_slot = KVC_CHECK_PER_REQUEST(int32_t, state_slot, num_requests, like);
  rows.num_pages = num_pages.const_data_ptr<int32_t>();
  rows.first_page = first_page.const_data_ptr<int32_t>();
  rows.covered = covered.const_data_ptr<int32_t>();
  rows.slots = static_cast<int32_t>(num_pages.size(1) * num_pages.size(2));
  rows.block_size = static_cast<int32_t>(block_size);
  KVC_CHECK(rows.slots > 0, "num_pages must have at least one layer and one head");
  KVC_CHECK(0 <= page_format && page_format < kNumPageFormats,
            "page_format must be 0, 1 or 2 (auto, fp8 or int4), not ", page_format);
  rows.page_blocks = blocks_per_page(static_cast<int>(page_format));
  if (page_format == kAuto) return rows;
  KVC_CHECK(page_scales.has_value(), "page_format ", page_format, " needs page_scales");
  const Tensor& scales = *page_scales;
  check_tensor(scales, "page_scales", ScalarType::BFloat16, 5, like);
  KVC_CHECK(scales.is_contiguous(), "page_scales must be contiguous");
  for (int64_t d = 0; d < 3; ++d) {
    KVC_CHECK(scales.size(d) == num_pages.size(d), "page_scales must have size ", num_pages.size(d),
              " in dimension ", d, ", not ", scales.size(d));
  }
  KVC_CHECK(scales.size(3) == scales_rows(static_cast<int>(page_format)),
            "page_scales must have size ", scales_rows(static_cast<int>(page_format)),
            " in dimension 3 with page_format ", page_format, ", not ", scales.size(3));
  rows.page_scales = static_cast<const uint16_t*>(scales.const_data_ptr());
  rows.scales_size = static_cast<int32_t>(scales.size(3) * scales.size(4));
  return rows;
}

// The same with block_table [R, M], whose rows must be dense, and pages [P, B, 2 * D], which must
// be whole blocks. `codes`: packed pages hold what page_format says; else what is stored by key.
inline PagedRows check_rows(const Tensor& pages, const Tensor& block_table,
                            const Tensor& state_slot, const Tensor& num_pages,
                            const Tensor& first_page, const Tensor& covered,
                            const std::optional<Tensor>& page_scales, int64_t page_format,
                            bool codes = true) {
  KVC_CHECK_CACHE_DTYPE(pages);
  KVC_CHECK_TENSOR(pages, pages.scalar_type(), 3, pages);
  KVC_CHECK_DENSE(pages);
  KVC_CHECK(pages.size(1) > 0, "pages must hold at least one token each");
  KVC_CHECK_TENSOR(block_table, ScalarType::Int, 2, pages);
  KVC_CHECK_LAST_DENSE(block_table);
  PagedRows rows = check_state(state_slot, num_pages, first_page, covered, page_scales, page_format,
                               block_table.size(0), pages.size(1), pages);
  if (codes && page_format != kAuto) {
    const int format = static_cast<int>(page_format);
    const int64_t head_size = pages.size(2) / 2, multiple = head_size_multiple(format);
    KVC_CHECK(pages.scalar_type() != ScalarType::Float,
              "pages must be float16 or bfloat16 with page_format ", page_format);
    KVC_CHECK(pages.size(2) % (2 * multiple) == 0, "pages have a head size of ", head_size,
              "; page_format ", page_format, " needs a multiple of ", multiple);
    KVC_CHECK(page_scales->size(4) == scales_columns(format, static_cast<int>(head_size)),
              "page_scales must have size ", scales_columns(format, static_cast<int>(head_size)),
              " in dimension 4, not ", page_scales->size(4));
  }
  KVC_CHECK(pages.size(0) % rows.slots == 0, "pages must be whole blocks of ", rows.slots,
            " pages, not ", pages.size(0));
  rows.block_table = block_table.const_data_ptr<int32_t>();
  rows.block_table_stride = block_table.stride(0);
  return rows;
}

// How products of queries and keys become logits: the soft cap, 0 for none, and a sink for each of
// `heads` query heads, [heads] or [layers, heads]. Returns the sinks, nullptr without.
inline const float* check_logits(double soft_cap, const std::optional<Tensor>& sink_logits,
                                 std::optional<int64_t> layers, int64_t heads, const Tensor& like) {
  KVC_CHECK(0 <= soft_cap && soft_cap < std::numeric_limits<double>::infinity(),
            "soft_cap must be 0 (none) or positive, not ", soft_cap);
  if (!sink_logits.has_value()) return nullptr;
  const Tensor& sinks = *sink_logits;
  check_tensor(sinks, "sink_logits", ScalarType::Float, layers ? 2 : 1, like);
  KVC_CHECK(sinks.is_contiguous(), "sink_logits must be contiguous");
  KVC_CHECK(!layers || sinks.size(0) == *layers, "sink_logits must have size ", layers.value_or(0),
            " in dimension 0, not ", sinks.size(0));
  const int64_t last = sinks.dim() - 1;
  KVC_CHECK(sinks.size(last) == heads, "sink_logits must have size ", heads, " in dimension ", last,
            ", not ", sinks.size(last));
  return sinks.const_data_ptr<float>();
}

// A mask of channels that the op knows.
inline void check_channels(int64_t channels, int64_t known) {
  KVC_CHECK((channels & ~known) == 0, "channels is ", channels, ", not a mask of the bits ", known);
}

// Head sizes that the CPU kernels take.
inline void check_head_size(int64_t head_size) {
  KVC_CHECK(head_size > 0 && head_size % 8 == 0 && head_size <= 512,
            "head size must be a multiple of 8 up to 512, not ", head_size);
}

}  // namespace kvc
