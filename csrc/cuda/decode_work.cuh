// SPDX-License-Identifier: Apache-2.0
// A warp's stretch of decode work (decode_share.cuh), and how it loads it.
#pragma once

#include "decode_share.cuh"
#include "page_cursor.cuh"

namespace kvc::gpu {

// What one step of the pipeline computes; written beside the keys by the lane that loads them.
struct StepTask {
  int query_row, head;
  int visible;  // keys of the unit that the token sees
  int flags;
};
enum TaskFlags { kFirst = 1, kLast = 2, kWhole = 4, kBeginsHead = 8 };

// A warp's place on the line of units, loading side.
class WorkCursor {
 public:
  // Moves to unit `skip` of request r, with `share` units to go.
  __device__ __forceinline__ void seek(const DecodeParams& p, int r, int skip, int share) {
    left_ = share;
    policy_ = evict_first();
    enter_request(p, r);
    while (true) {
      const int units = lane_units_ * tokens_;
      const int up_to = lanes_inclusive_sum(units);
      const int total = __shfl_sync(kAllLanes, up_to, kWarp - 1);
      if (skip < total) {
        const int index = __popc(__ballot_sync(kAllLanes, up_to <= skip));
        skip -= __shfl_sync(kAllLanes, up_to - units, index);
        h_ = lane_base_ + index;
        break;
      }
      skip -= total;
      load_heads(p, lane_base_ + kWarp);
    }
    look_ahead(p, h_);
    enter_head(p);
    token_ = skip / units_;
    unit_ = skip % units_;
    enter_stretch(p);
  }

  __device__ __forceinline__ bool done() const { return left_ == 0; }

  // Copies the unit at hand to `stage` and moves on.
  template <int kHeadSize, int kStride, typename T>
  __device__ __forceinline__ void load(const DecodeParams& p, uint32_t stage) {
    constexpr int kPair = 2 * kHeadSize * sizeof(T);
    const int lane = threadIdx.x % kWarp, first = unit_ * kUnit;
    copy_keys<kUnit, kPair / 16, kStride, kPair, kWarp>(
        stage, static_cast<const char*>(p.pages), pages_, &ids_, first, num_keys_, lane, policy_);
    const bool last = unit_ + 1 == end_;
    if (lane == 0) {
      // In the padding of the first key: it travels with the stage and needs no room of its own.
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(stage + kPair),
                   "r"(query_row_ + token_), "r"(h_),
                   "r"(num_keys_ - (tokens_ - 1 - token_) - first),
                   "r"((unit_ == begin_ ? kFirst : 0) | (last ? kLast : 0) | stretch_)
                   : "memory");
    }
    --left_;
    ++unit_;
    if (last && left_ > 0) next_head(p);
  }

  // For the record of a cut head: the units of the head behind this stretch, once it is loaded.
  __device__ __forceinline__ int units_behind() const {
    return stretch_ == kBeginsHead ? units_ - end_ : 0;
  }
  __device__ __forceinline__ int query_row() const { return query_row_ + token_; }
  __device__ __forceinline__ int head() const { return h_; }

 private:
  __device__ __forceinline__ void enter_request(const DecodeParams& p, int r) {
    r_ = r;
    tokens_ = decode_tokens(p, r);
    query_row_ = p.query_start[r];
    load_heads(p, 0);
  }
  // Every lane looks up one head: the dependent loads are paid once per 32 heads.
  __device__ __forceinline__ void load_heads(const DecodeParams& p, int base) {
    lane_base_ = base;
    const int h = base + static_cast<int>(threadIdx.x % kWarp);
    lane_pages_ = head_pages(p.rows, r_, p.layer * p.num_heads + min(h, p.num_heads - 1));
    lane_keys_ = h < p.num_heads ? max(lane_pages_.num_keys(p.rows.seq_lens[r_]), 0) : 0;
    lane_units_ = ceil_div(lane_keys_, kUnit);
  }
  // The head among those that the lanes hold.
  __device__ __forceinline__ HeadPages held_head(const DecodeParams& p, int h) const {
    HeadPages head = lane_pages_;
    head.packed = __shfl_sync(kAllLanes, lane_pages_.packed, h - lane_base_);
    head.first = __shfl_sync(kAllLanes, lane_pages_.first, h - lane_base_);
    head.head_slot = p.layer * p.num_heads + h;
    return head;
  }
  // Starts to look up the first pages of head h.
  __device__ __forceinline__ void look_ahead(const DecodeParams& p, int h) {
    if (h >= min(p.num_heads, lane_base_ + kWarp)) return;
    next_ids_ =
        PageIds::look_up(held_head(p, h), __shfl_sync(kAllLanes, lane_keys_, h - lane_base_));
  }
  __device__ __forceinline__ void enter_head(const DecodeParams& p) {
    pages_ = held_head(p, h_);
    num_keys_ = __shfl_sync(kAllLanes, lane_keys_, h_ - lane_base_);
    units_ = ceil_div(num_keys_, kUnit);
    ids_.reset(pages_, num_keys_, next_ids_);
    look_ahead(p, h_ + 1);
  }
  // Into the L2 cache, some steps before the first product.
  __device__ __forceinline__ void prefetch_query(const DecodeParams& p) const {
    const int lane = threadIdx.x % kWarp, g = lane / 2, d = lane % 2 * 64;
    if (g < p.group && d < p.head_size) {
      const int64_t head = static_cast<int64_t>(h_) * p.group + g;
      const int64_t element =
          (query_row_ + token_) * p.query_stride_t + head * p.query_stride_h + d;
      prefetch(static_cast<const char*>(p.query) + element * p.element_size);
    }
  }
  __device__ __forceinline__ void enter_stretch(const DecodeParams& p) {
    prefetch_query(p);
    begin_ = unit_;
    end_ = min(units_, unit_ + left_);
    stretch_ = (begin_ == 0 ? kBeginsHead : 0) | (begin_ == 0 && end_ == units_ ? kWhole : 0);
  }
  __device__ __forceinline__ void next_head(const DecodeParams& p) {
    unit_ = 0;
    if (++token_ == tokens_) {
      token_ = 0;
      do {
        if (++h_ == p.num_heads) {
          h_ = 0;
          do {
            enter_request(p, r_ + 1);
          } while (tokens_ == 0);
          look_ahead(p, h_);
        } else if (h_ == lane_base_ + kWarp) {
          load_heads(p, h_);
          look_ahead(p, h_);
        }
        enter_head(p);
      } while (units_ == 0);
    }
    enter_stretch(p);
  }

  HeadPages lane_pages_, pages_;  // of head lane_base_ + lane, and of the head at hand
  PageIds ids_;
  uint64_t policy_;
  int next_ids_ = 0;  // first page ids of the head behind the one at hand
  int lane_base_, lane_keys_, lane_units_;
  int r_, h_, token_, tokens_, query_row_;
  int num_keys_, units_, unit_;  // of the head at hand
  int begin_, end_, stretch_;    // of this warp's stretch of it
  int left_;                     // units until the warp is done
};

}  // namespace kvc::gpu
