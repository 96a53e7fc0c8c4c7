// SPDX-License-Identifier: Apache-2.0
// A warp's stretch of decode work (decode_share.cuh), and how it loads it.
#pragma once

#include "decode_share.cuh"
#include "page_cursor.cuh"

namespace kvc::gpu {

// What one step of the pipeline computes; written beside the keys by the lane that loads them.
struct StepTask {
  int query_row, head;
  int visible;  // keys of the unit that the first token of the pass sees
  int flags;    // and, from bit kTokensShift on, tokens of the pass

  __device__ __forceinline__ int tokens() const;
};
enum TaskFlags { kFirst = 1, kLast = 2, kWhole = 4, kBeginsHead = 8, kCodes = 16 };
constexpr int kTokensShift = 8;
__device__ __forceinline__ int StepTask::tokens() const { return flags >> kTokensShift; }

template <typename T>
__device__ __forceinline__ const T* query_rows(const DecodeParams& p, int query_row, int head) {
  return static_cast<const T*>(p.query) + query_row * p.query_stride_t +
         static_cast<int64_t>(head) * p.group * p.query_stride_h;
}

// The query head of column c, counted within its KV head.
__device__ __forceinline__ int column_head(const DecodeParams& p, int c) {
  return c - (c * p.of_columns >> 10) * p.group;
}

// Where column c of a tensor like the query begins, counted from its pass's first.
__device__ __forceinline__ int64_t column_offset(const DecodeParams& p, int c, int64_t stride_t,
                                                 int64_t stride_h) {
  const int token = c * p.of_columns >> 10;
  return token * stride_t + (c - token * p.group) * stride_h;
}

// The columns of a pass, [tokens * G, D], to shared memory.
template <int kHeadSize, typename T>
__device__ __forceinline__ void copy_query(const DecodeParams& p, int query_row, int head,
                                           int tokens, uint32_t shared) {
  const T* rows = query_rows<T>(p, query_row, head);
  const int columns = tokens * p.group;
  if (p.aligned) {
    constexpr int kWords = kHeadSize * sizeof(T) / 16, kPer = 16 / sizeof(T);
    for (int i = threadIdx.x % kWarp; i < columns * kWords; i += kWarp) {
      const int64_t at = column_offset(p, i / kWords, p.query_stride_t, p.query_stride_h);
      copy_async(shared + i * 16, rows + at + i % kWords * kPer, true);
    }
  } else {
    for (int i = threadIdx.x % kWarp; i < columns * kHeadSize / 2; i += kWarp) {
      const int d = i % (kHeadSize / 2) * 2;
      const int64_t at = column_offset(p, i / (kHeadSize / 2), p.query_stride_t, p.query_stride_h);
      asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(shared + i * 4),
                   "r"(load_pair(rows + at + d, false))
                   : "memory");
    }
  }
}

// Bytes of a stage for the scales of a head.
constexpr int decode_scale_bytes(int format, int head_size) {
  return format == kAuto ? 0 : format == kFp8 ? 16 : 8 * head_size;
}

// The scales of one KV head to shared memory.
template <int kHeadSize, int kFormat>
__device__ __forceinline__ void copy_scales(const uint16_t* scales, uint32_t shared) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kFormat == kFp8) {
    if (lane == 0) copy_async_word(shared, scales);
  } else {
    for (int i = lane; i < kHeadSize / 2; i += kWarp) {
      copy_async(shared + i * 16, scales + i * 8, true);
    }
  }
}

// Tokens of rows without any cache, which padding may have, become zero. The warps of the grid
// share the rows.
template <typename T>
__device__ __forceinline__ void fill_keyless(const DecodeParams& p, int64_t worker, int64_t workers,
                                             int head_size) {
  for (int64_t r = worker; r < p.num_requests; r += workers) {
    if (p.rows.seq_lens[r] > 0) continue;
    const int heads = p.num_heads * p.group;
    for (int token = p.query_start[r]; token < p.query_start[r + 1]; ++token) {
      for (int i = threadIdx.x % kWarp; i < heads * head_size; i += kWarp) {
        static_cast<T*>(
            p.out)[token * p.out_stride_t + i / head_size * p.out_stride_h + i % head_size] =
            from_float<T>(0.f);
      }
    }
  }
}

// A warp's place on the line of units, loading side. With keys and values filling the memory
// system, a load takes as long as the whole ring: what leads to the keys is loaded ahead, the state
// slot two requests, the heads one request, the page ids one head before they are needed.
class WorkCursor {
 public:
  // Moves to unit `skip` of request r, with `share` units to go.
  __device__ __forceinline__ void seek(const DecodeParams& p, int r, int skip, int share) {
    left_ = share;
    policy_ = evict_first();
    next_request_ = look_up_request(p, r);
    next_ = look_up_heads(p, next_request_, r, 0);
    next_request_ = look_up_request(p, r + 1);
    enter_request(p);
    while (true) {
      const int units = ceil_div(here_.keys(p), kUnit) * ceil_div(tokens_, p.width);
      const int up_to = lanes_inclusive_sum(units);
      const int total = __shfl_sync(kAllLanes, up_to, kWarp - 1);
      if (skip < total) {
        const int index = __popc(__ballot_sync(kAllLanes, up_to <= skip));
        skip -= __shfl_sync(kAllLanes, up_to - units, index);
        h_ = here_.base + index;
        break;
      }
      skip -= total;
      load_more_heads(p);
    }
    next_ids_ = look_up_ids(p, here_, h_);
    enter_head(p);
    token_ = skip / units_ * p.width;
    unit_ = skip % units_;
    enter_stretch();
  }

  __device__ __forceinline__ bool done() const { return left_ == 0; }

  // Copies the unit at hand to `stage`, the query behind it if it is a stretch's first, and moves
  // on.
  template <int kHeadSize, int kStride, typename T, int kFormat>
  __device__ __forceinline__ void load(const DecodeParams& p, uint32_t stage, int stage_bytes) {
    constexpr int kPair = 2 * kHeadSize * sizeof(T);
    const int lane = threadIdx.x % kWarp, first = unit_ * kUnit;
    copy_keys<kUnit, kPair / 16, kStride, kPair, kWarp>(
        stage, static_cast<const char*>(p.pages), pages_, &ids_, first, num_keys_, lane, policy_);
    if (unit_ == begin_ && p.query_bytes > 0) {
      copy_query<kHeadSize, T>(p, query_row(), h_, tokens(p), stage + stage_bytes);
    }
    const bool codes = kFormat != kAuto && first < pages_.packed * pages_.block_size;
    if (codes && unit_ == begin_) {
      copy_scales<kHeadSize, kFormat>(pages_.scales, stage + stage_bytes + p.query_bytes);
    }
    const bool last = unit_ + 1 == end_;
    if (lane == 0) {
      // In the padding of the first key: it travels with the stage and needs no room of its own.
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(stage + kPair),
                   "r"(query_row()), "r"(h_), "r"(num_keys_ - (tokens_ - 1 - token_) - first),
                   "r"((unit_ == begin_ ? kFirst : 0) | (last ? kLast : 0) | (codes ? kCodes : 0) |
                       stretch_ | tokens(p) << kTokensShift)
                   : "memory");
    }
    --left_;
    ++unit_;
    if (last && left_ > 0) next_head(p);
  }

  // Once all is loaded: the last head, and its units behind this worker's share.
  __device__ __forceinline__ int units_behind() const { return units_ - end_; }
  __device__ __forceinline__ int query_row() const { return here_.query_row + token_; }
  __device__ __forceinline__ int head() const { return h_; }
  // Of the pass at hand.
  __device__ __forceinline__ int tokens(const DecodeParams& p) const {
    return min(p.width, tokens_ - token_);
  }

 private:
  // Nothing below is computed from what was loaded before it is needed: a use waits for the load.
  struct Request {
    int slot, seq_len, start, end;
  };
  // Heads [base, base + 32) of a request, one per lane.
  struct Heads {
    int r, base, seq_len, query_row, query_end, slot;
    int covered, packed, first;

    __device__ __forceinline__ int tokens(const DecodeParams& p) const {
      const int tokens = query_end - query_row;
      return r < p.num_requests && tokens <= p.most_tokens && seq_len > 0 ? max(tokens, 0) : 0;
    }
    __device__ __forceinline__ int keys(const DecodeParams& p) const {
      const bool exists = base + static_cast<int>(threadIdx.x % kWarp) < p.num_heads;
      return exists ? max(of_lane(p, packed, first, 0).num_keys(seq_len), 0) : 0;
    }
    __device__ __forceinline__ int keys_of(const DecodeParams& p, int h) const {
      return __shfl_sync(kAllLanes, keys(p), h - base);
    }
    __device__ __forceinline__ HeadPages pages_of(const DecodeParams& p, int h) const {
      return of_lane(p, __shfl_sync(kAllLanes, packed, h - base),
                     __shfl_sync(kAllLanes, first, h - base), h);
    }

   private:
    __device__ __forceinline__ HeadPages of_lane(const DecodeParams& p, int packed_pages,
                                                 int first_page, int h) const {
      HeadPages head;
      head.row = p.rows.block_table + r * p.rows.block_table_stride;
      head.covered = covered;
      head.packed = packed_pages;
      head.first = first_page;
      head.head_slot = p.layer * p.num_heads + h;
      head.slots = p.rows.slots;
      head.block_size = p.rows.block_size;
      // In rows of a page, of which the 16 of a unit hold 16 or, in codes, 16 * m keys.
      head.page_blocks = 1;
      head.scales =
          p.rows.page_scales +
          (static_cast<int64_t>(slot) * p.rows.slots + head.head_slot) * p.rows.scales_size;
      return head;
    }
  };

  static __device__ __forceinline__ Request look_up_request(const DecodeParams& p, int r) {
    r = min(r, p.num_requests - 1);
    return {p.rows.state_slot[r], p.rows.seq_lens[r], p.query_start[r], p.query_start[r + 1]};
  }
  static __device__ __forceinline__ Heads look_up_heads(const DecodeParams& p,
                                                        const Request& request, int r, int base) {
    Heads heads{r, base, request.seq_len, request.start, request.end, request.slot, 0, 0, 0};
    // The slot of a padded row may be anything.
    if (request.slot >= 0 && request.end > request.start && request.seq_len > 0) {
      const int h = min(base + static_cast<int>(threadIdx.x % kWarp), p.num_heads - 1);
      const int64_t index =
          static_cast<int64_t>(request.slot) * p.rows.slots + p.layer * p.num_heads + h;
      heads.covered = p.rows.covered[request.slot];
      heads.packed = p.rows.num_pages[index];
      heads.first = p.rows.first_page[index];
    }
    return heads;
  }
  static __device__ __forceinline__ int look_up_ids(const DecodeParams& p, const Heads& heads,
                                                    int h) {
    return PageIds::look_up(heads.pages_of(p, h), heads.keys_of(p, h));
  }

  // To the request that was looked up ahead.
  __device__ __forceinline__ void enter_request(const DecodeParams& p) {
    here_ = next_;
    tokens_ = here_.tokens(p);
    next_ = look_up_heads(p, next_request_, here_.r + 1, 0);
    next_request_ = look_up_request(p, here_.r + 2);
  }
  // More than 32 heads: the next ones of this request.
  __device__ __forceinline__ void load_more_heads(const DecodeParams& p) {
    here_ = look_up_heads(p, look_up_request(p, here_.r), here_.r, here_.base + kWarp);
  }
  __device__ __forceinline__ void enter_head(const DecodeParams& p) {
    pages_ = here_.pages_of(p, h_);
    num_keys_ = here_.keys_of(p, h_);
    units_ = ceil_div(num_keys_, kUnit);
    ids_.reset(pages_, num_keys_, next_ids_);
    if (h_ + 1 == p.num_heads) {
      if (next_.tokens(p) > 0) next_ids_ = look_up_ids(p, next_, 0);
    } else if (h_ + 1 < here_.base + kWarp) {
      next_ids_ = look_up_ids(p, here_, h_ + 1);
    }
  }
  __device__ __forceinline__ void enter_stretch() {
    begin_ = unit_;
    end_ = min(units_, unit_ + left_);
    stretch_ = (begin_ == 0 ? kBeginsHead : 0) | (begin_ == 0 && end_ == units_ ? kWhole : 0);
  }
  __device__ __forceinline__ void next_head(const DecodeParams& p) {
    unit_ = 0;
    token_ += p.width;
    if (token_ >= tokens_) {
      token_ = 0;
      do {
        if (++h_ == p.num_heads) {
          h_ = 0;
          enter_request(p);
          if (tokens_ == 0) {
            do {
              enter_request(p);
            } while (tokens_ == 0);
            next_ids_ = look_up_ids(p, here_, 0);
          }
        } else if (h_ == here_.base + kWarp) {
          load_more_heads(p);
          next_ids_ = look_up_ids(p, here_, h_);
        }
        enter_head(p);
      } while (units_ == 0);
    }
    enter_stretch();
  }

  Request next_request_;  // behind next_
  Heads here_, next_;     // the request at hand, and the one behind it
  HeadPages pages_;       // of the head at hand
  PageIds ids_;
  uint64_t policy_;
  int next_ids_;                 // first page ids of the head behind the one at hand
  int h_, token_, tokens_;       // first token of the pass at hand, and tokens of the row
  int num_keys_, units_, unit_;  // of the head at hand
  int begin_, end_, stretch_;    // of this warp's stretch of it
  int left_;                     // units until the warp is done
};

}  // namespace kvc::gpu
