// SPDX-License-Identifier: Apache-2.0
// The instructions that the kernels share: asynchronous copies, matrix tiles, warp reductions.
// Everything here exists from sm_80 on; nothing depends on torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kvc::gpu {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory; zeros where `live` is false, without reading.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool live) {
  const int bytes = live ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(global), "r"(bytes)
               : "memory");
}

// What is read once per step should be the first to leave the L2 cache: what every layer reads
// again (queries, block tables, state) then stays.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool live,
                                           uint64_t policy) {
  const int bytes = live ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;\n" ::"r"(shared),
      "l"(global), "r"(bytes), "l"(policy)
      : "memory");
}

// 4 bytes, as above.
__device__ __forceinline__ void copy_async_word(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// From sm_90 on, a kernel launched with programmatic stream serialization may start before the one
// in front of it is done, as soon as all of that one's blocks have called the first of these; it
// must call the second before it touches memory.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// A barrier of `kThreads` threads of the block, whole warps; `id` from 1 to 15.
template <int kThreads>
__device__ __forceinline__ void sync_threads(int id) {
  asm volatile("barrier.sync %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t shared) {
  uint32_t bits;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(bits) : "r"(shared) : "memory");
  return bits;
}

__device__ __forceinline__ uint32_t load_shared_half(uint32_t shared) {
  uint16_t bits;
  asm volatile("ld.shared.u16 %0, [%1];\n" : "=h"(bits) : "r"(shared) : "memory");
  return bits;
}

// Four 8x8 tiles of 16-bit elements; lane 8 i + j gives the address of row j of tile i.
__device__ __forceinline__ void load_tiles(uint32_t (&tiles)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ void load_tiles_transposed(uint32_t (&tiles)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(shared)
               : "memory");
}

// Transposes one 8x8 tile of 16-bit elements that a warp holds.
__device__ __forceinline__ uint32_t transpose_tile(uint32_t tile) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(tile));
  return result;
}

// c[16][8] += a[16][16] * b[16][8]. Lane i holds of c rows i / 4 and i / 4 + 8, columns
// 2 * (i % 4) and the next: {c[0], c[1]} and {c[2], c[3]}.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Two 16-bit numbers in a register, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  static_assert(sizeof(pair) == 4);
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// Two adjacent 16-bit numbers; one load where the pointer allows it.
template <typename T>
__device__ __forceinline__ uint32_t load_pair(const T* pointer, bool aligned) {
  if (aligned) return __ldg(reinterpret_cast<const uint32_t*>(pointer));
  uint16_t pair[2];
  memcpy(&pair[0], pointer, 2);
  memcpy(&pair[1], pointer + 1, 2);
  return pair[0] | static_cast<uint32_t>(pair[1]) << 16;
}

// The 16 / sizeof(T) numbers of a word, in fp32.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& word, float* x);
template <>
__device__ __forceinline__ void unpack<float>(const uint4& word, float* x) {
  x[0] = __uint_as_float(word.x), x[1] = __uint_as_float(word.y);
  x[2] = __uint_as_float(word.z), x[3] = __uint_as_float(word.w);
}
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(const uint4& word, float* x) {
  const uint32_t pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(pairs[i] << 16);
    x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}
template <>
__device__ __forceinline__ void unpack<__half>(const uint4& word, float* x) {
  const uint32_t pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __half2 pair;
    memcpy(&pair, &pairs[i], 4);
    const float2 both = __half22float2(pair);
    x[2 * i] = both.x, x[2 * i + 1] = both.y;
  }
}

// 2^x to 2 ulp; 2^0 is 1 exactly and 2^-inf is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// How products of queries and keys become logits in base 2.
struct Logits {
  float factor;        // of the products: scale * log2(e), or what soft_cap() takes
  float cap;           // in units of log 2, 0: none
  const float* sinks;  // [H * G] or [L, H * G] in units of 1, nullptr: none

  Logits(double scale, double soft_cap, const float* sink_logits)
      : factor(static_cast<float>(soft_cap == 0 ? scale : 2 * scale / soft_cap) * kLog2E),
        cap(static_cast<float>(soft_cap) * kLog2E),
        sinks(sink_logits) {}
  Logits() = default;

  // The sinks of one KV head, of H or L * H.
  __device__ __forceinline__ const float* of_head(int head, int group) const {
    return sinks == nullptr ? nullptr : sinks + static_cast<int64_t>(head) * group;
  }
};

// cap * tanh(z) for x = 2 z log2(e), within 2^-22 of the cap. One uniform branch around all logits
// of a thread decides whether there is a cap, so that without one nothing is computed.
__device__ __forceinline__ float soft_cap(float x, float cap) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(inverse) : "f"(1.f + exp2_fast(x)));
  return cap - 2.f * cap * inverse;
}

// What a head's sink adds to a sum of weights relative to `max`. Infinite, so that everything else
// vanishes, where the sink is that much higher.
__device__ __forceinline__ float sink_weight(const float* sinks, int g, float max) {
  return sinks == nullptr ? 0.f : exp2_fast(__ldg(sinks + g) * kLog2E - max);
}

// Weight of a sum that was taken relative to maximum `from`, when moved to maximum `to`.
__device__ __forceinline__ float rescale(float from, float to) {
  return from == -kInfinity ? 0.f : exp2_fast(from - to);
}

template <int kFrom = kWarp / 2, int kTo = 1>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int i = kFrom; i >= kTo; i /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, i));
  return x;
}

template <int kFrom = kWarp / 2, int kTo = 1>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int i = kFrom; i >= kTo; i /= 2) x += __shfl_xor_sync(kAllLanes, x, i);
  return x;
}

__device__ __forceinline__ int lanes_inclusive_sum(int x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 1; i < kWarp; i *= 2) {
    const int below = __shfl_up_sync(kAllLanes, x, i);
    if (lane >= i) x += below;
  }
  return x;
}

// Exclusive prefix sum over a block of `num_warps` warps; `warps` holds one int per warp and is
// free to reuse after the next __syncthreads().
__device__ __forceinline__ int block_exclusive_sum(int x, int num_warps, int* warps, int* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int inclusive = lanes_inclusive_sum(x);
  if (lane == kWarp - 1) warps[warp] = inclusive;
  __syncthreads();
  int below = 0, sum = 0;
#pragma unroll
  for (int i = 0; i < num_warps; ++i) {
    if (i < warp) below += warps[i];
    sum += warps[i];
  }
  *total = sum;
  return below + inclusive - x;
}

template <int kThreads>
__device__ __forceinline__ int block_exclusive_sum(int x, int* warps, int* total) {
  return block_exclusive_sum(x, kThreads / kWarp, warps, total);
}

}  // namespace kvc::gpu
