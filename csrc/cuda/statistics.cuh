// SPDX-License-Identifier: Apache-2.0
// attention_statistics: what the last queries of a request paid to each key. Two passes over K:
// the first takes maximum and sum of every query row over a share of the keys, the second merges
// them and turns logits into probabilities and those into statistics.
#pragma once

#include "mixed_tile.cuh"
#include "statistics_math.cuh"

namespace kvc::gpu {

struct StatisticsParams {
  PagedRows rows;
  const void* ring;             // [L, O, W, H * G, D]
  const void* pages;            // [P, B, 2 * D]
  const int32_t* observe_slot;  // [R]
  const int32_t* num_queries;   // [R] n
  const int32_t* new_covered;   // [R]
  const int64_t* page_start;    // [R]
  float2* partial;              // [R, L * H, splits, W * G] maximum (base 2) and sum
  float* out;                   // [selected channels, candidates, B]
  int64_t candidates;           // candidate pages
  int32_t num_heads;            // H
  int32_t group;                // G
  int64_t ring_layer, ring_slot, ring_place, ring_head;  // strides in 16 bytes
  int32_t window;                                        // W
  int32_t query_stride;  // tokens from one observed query to the next
  uint32_t channels;     // bit mask of Channel
  Logits logits;         // with sinks of all layers
  bool resident;         // all rows of queries fit in shared memory at once
};

template <typename T, int kHeadSize>
struct StatisticsShape {
  using Math = typename StatisticsMath<T, kHeadSize>::Type;
  static constexpr int kThreads = 128, kWarps = kThreads / kWarp;
  static constexpr int kStages = 2;
  static constexpr int kStage = Math::kKeys * Math::kStride;
  // Layout of shared memory, in this order; see statistics_kernel.
  static constexpr int kWeights = Math::kRows * (Math::kKeys + 8) * sizeof(float);
  static constexpr int query_bytes(int chunks) { return chunks * Math::kRows * Math::kStride; }
  static constexpr int state_bytes(int chunks) {
    return kWarps * chunks * Math::kRows * sizeof(float2);
  }
  static constexpr int threshold_bytes(int chunks) { return chunks * Math::kRows * sizeof(float); }
  static constexpr int head_bytes(int group) { return group * Math::kKeys * sizeof(float); }
};

// Query rows come in chunks of whole queries: row q * G + g of a chunk is query q, member g.
template <typename T, int kHeadSize>
__device__ __forceinline__ void load_queries(const StatisticsParams& p, char* shared, int r,
                                             int slot, int seq_len, int n, int first, int chunk) {
  using Math = typename StatisticsMath<T, kHeadSize>::Type;
  constexpr int kWords = kHeadSize * sizeof(T) / 16;
  const int layer = slot / p.num_heads, head = slot % p.num_heads;
  const uint4* base = static_cast<const uint4*>(p.ring) + layer * p.ring_layer +
                      p.observe_slot[r] * p.ring_slot + head * p.group * p.ring_head;
  for (int i = threadIdx.x; i < Math::kRows * kWords; i += blockDim.x) {
    const int row = i / kWords, word = i % kWords, q = first + row / p.group;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row / p.group < chunk && q < n) {
      const int position = seq_len - 1 - (n - 1 - q) * p.query_stride;
      const int place = position / p.query_stride % p.window;
      value = __ldg(base + place * p.ring_place + row % p.group * p.ring_head + word);
    }
    *reinterpret_cast<uint4*>(shared + row * Math::kStride + word * 16) = value;
  }
}

// grid (splits, L * H, R); kCodes: packed pages hold codes.
template <typename T, int kHeadSize, bool kFirstPass, bool kCodes>
__global__ void __launch_bounds__(StatisticsShape<T, kHeadSize>::kThreads)
    statistics_kernel(StatisticsParams p) {
  using Shape = StatisticsShape<T, kHeadSize>;
  using Math = typename Shape::Math;
  constexpr int kKeys = Math::kKeys, kThreads = Shape::kThreads;
  const int r = blockIdx.z, slot = blockIdx.y, split = blockIdx.x, splits = gridDim.x;
  const int seq_len = p.rows.seq_lens[r], n = p.num_queries[r], group = p.group;
  const HeadPages head = head_pages(p.rows, r, slot);
  const int num_keys = head.num_keys(seq_len), new_covered = p.new_covered[r];
  const int counted = head.candidate_pages(new_covered) * head.block_size;
  const int tiles = ceil_div(max(kFirstPass ? num_keys : min(counted, num_keys), 0), kKeys);
  const int per_split = ceil_div(tiles, splits);
  const int tile_begin = min(split * per_split, tiles);
  const int tile_end = min(tile_begin + per_split, tiles);
  if (!kFirstPass && tile_begin == tile_end) return;

  const int chunk_queries = Math::kRows / group, chunks = ceil_div(max(n, 1), chunk_queries);
  extern __shared__ __align__(16) char shared[];
  char* queries = shared;
  char* ring = queries + Shape::query_bytes(p.resident ? chunks : 1);
  float* weights = reinterpret_cast<float*>(ring + Shape::kStages * Shape::kStage);
  float2* state = reinterpret_cast<float2*>(reinterpret_cast<char*>(weights) + Shape::kWeights);
  float* thresholds =
      reinterpret_cast<float*>(reinterpret_cast<char*>(state) + Shape::state_bytes(chunks));
  float* head_sums = thresholds + chunks * Math::kRows;

  PageIds ids;
  ids.reset(head, num_keys);
  const auto load = [&](int tile) {
    if (tile < tile_end) {
      constexpr int kKeyBytes = kHeadSize * sizeof(T);
      char* stage = ring + (tile - tile_begin) % Shape::kStages * Shape::kStage;
      const char* pages = static_cast<const char*>(p.pages);
      if constexpr (kCodes) {
        load_mixed_tile<T, kHeadSize, kKeys, Math::kStride, kThreads>(stage, pages, head,
                                                                      tile * kKeys, num_keys);
      } else {
        copy_keys<kKeys, kKeyBytes / 16, Math::kStride, 2 * kKeyBytes, kThreads>(
            shared_address(stage), pages, head, &ids, tile * kKeys, num_keys, threadIdx.x);
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < Shape::kStages - 1; ++i) load(tile_begin + i);

  const int rows = n * group, padded = chunks * Math::kRows;
  float2* partial =
      p.partial + (static_cast<int64_t>(r) * p.rows.slots + slot) * splits * p.window * group;
  // Row state: per warp maximum and sum so far in the first pass; maximum and 1 / sum, once, in
  // the second. Indexed by chunk and row of the chunk.
  for (int i = threadIdx.x; i < (kFirstPass ? Shape::kWarps : 1) * padded; i += kThreads) {
    // Rows without a query must come out as zero weights.
    float2 merged = make_float2(kFirstPass ? -kInfinity : 0.f, 0.f);
    const int q = i / Math::kRows * chunk_queries + i % Math::kRows / group;
    if (!kFirstPass && i % Math::kRows / group < chunk_queries && q < n) {
      merged.x = -kInfinity;
      const int g = i % Math::kRows % group;
      const float2* row = partial + q * group + g;
      for (int s = 0; s < splits; ++s) merged.x = fmaxf(merged.x, row[s * p.window * group].x);
      for (int s = 0; s < splits; ++s) {
        const float2 other = row[s * p.window * group];
        merged.y += other.y * rescale(other.x, merged.x);
      }
      const float* sinks = p.logits.of_head(slot, group);
      if (merged.y > 0.f) merged.y += sink_weight(sinks, g, merged.x);
      // A query older than every key that the head still has counts nowhere; what is no number
      // stays that, so that a policy's scores are refused rather than silently wrong.
      merged = merged.y == 0.f ? make_float2(0.f, 0.f) : make_float2(merged.x, 1.f / merged.y);
    }
    state[i] = merged;
  }
  if (!kFirstPass && has_channel(p.channels, kLowCount)) {
    for (int q = threadIdx.x; q < n; q += kThreads) {
      const int visible = max(num_keys - (n - 1 - q) * p.query_stride, 1);
      thresholds[q / chunk_queries * Math::kRows + q % chunk_queries] =
          low_threshold(visible, group);
    }
  }
  if (p.resident) {
    for (int c = 0; c < chunks; ++c) {
      load_queries<T, kHeadSize>(p, queries + Shape::query_bytes(c), r, slot, seq_len, n,
                                 c * chunk_queries, chunk_queries);
    }
  }

  const int64_t out_first =
      (p.page_start[r] + head.first_candidate(new_covered)) * static_cast<int64_t>(head.block_size);
  const int64_t plane = p.candidates * head.block_size;
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    copy_async_wait<Shape::kStages - 2>();
    __syncthreads();
    load(tile + Shape::kStages - 1);
    const char* keys = ring + (tile - tile_begin) % Shape::kStages * Shape::kStage;
    Math math;
    math.load_keys(keys);
    ChannelSums sums;
    for (int c = 0; c < chunks; ++c) {
      char* chunk = queries + Shape::query_bytes(p.resident ? c : 0);
      if (!p.resident) {
        __syncthreads();
        load_queries<T, kHeadSize>(p, chunk, r, slot, seq_len, n, c * chunk_queries, chunk_queries);
        __syncthreads();
      }
      const int first_query = c * chunk_queries;
      const ChunkRows view{group, num_keys - 1 - (n - 1 - first_query) * p.query_stride,
                           p.query_stride, min(chunk_queries, n - first_query), tile * kKeys};
      math.logits(chunk, p.logits, view);
      if constexpr (kFirstPass) {
        math.accumulate(state + (threadIdx.x / kWarp * chunks + c) * Math::kRows);
      } else {
        math.weights(state + c * Math::kRows, weights);
        __syncthreads();
        sums.add<Math::kRows, kKeys, kKeys + 8>(p.channels, weights, thresholds + c * Math::kRows,
                                                view, head_sums, c == 0, c + 1 == chunks);
        __syncthreads();
      }
    }
    if constexpr (!kFirstPass) {
      const int key = tile * kKeys + threadIdx.x % kKeys;
      const int64_t place = out_first + key;
      if (key < counted && place < plane) {
        sums.write<kKeys>(p.channels, p.out + place, plane, group);
      }
    }
  }
  if constexpr (kFirstPass) {
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += kThreads) {
      const int q = row / group;
      const int i = q / chunk_queries * Math::kRows + q % chunk_queries * group + row % group;
      float2 merged = make_float2(-kInfinity, 0.f);
      for (int w = 0; w < Shape::kWarps; ++w) {
        merged.x = fmaxf(merged.x, state[w * padded + i].x);
      }
      for (int w = 0; w < Shape::kWarps; ++w) {
        const float2 other = state[w * padded + i];
        merged.y += other.y * rescale(other.x, merged.x);
      }
      partial[split * p.window * group + row] = merged;
    }
  }
}

}  // namespace kvc::gpu
