// SPDX-License-Identifier: Apache-2.0
// Compiles simd_kernels.h for each instruction set. The extension itself is built for the oldest
// x86-64 (or any other architecture); only the functions below use more, after asking the CPU.
#include "simd.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#define KVC_X86 1
#endif

// Functions between these two may use the named instructions.
#define KVC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define KVC_BEGIN_TARGET(features) \
  KVC_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define KVC_END_TARGET KVC_PRAGMA(clang attribute pop)
#else
#define KVC_BEGIN_TARGET(features) KVC_PRAGMA(GCC push_options) KVC_PRAGMA(GCC target(features))
#define KVC_END_TARGET KVC_PRAGMA(GCC pop_options)
#endif

#define KVC_TABLE                                                     \
  {gemm,  dots,       squares, soft_cap,  softmax_panel, softmax_row, \
   scale, statistics, raise,   from_half, from_bfloat16}

namespace kvc {

// Vectors are passed between inlined functions only, so their calling convention is irrelevant.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace portable {
#define KVC_LANES 4
#include "simd_kernels.h"
#undef KVC_LANES
const Simd kTable = KVC_TABLE;
}  // namespace portable

#ifdef KVC_X86
KVC_BEGIN_TARGET("avx2,fma")
namespace avx2 {
#define KVC_LANES 8
#include "simd_kernels.h"
#undef KVC_LANES
}  // namespace avx2
KVC_END_TARGET
namespace avx2 {
const Simd kTable = KVC_TABLE;
}

KVC_BEGIN_TARGET("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
namespace avx512 {
#define KVC_LANES 16
#include "simd_kernels.h"
#undef KVC_LANES
}  // namespace avx512
KVC_END_TARGET
namespace avx512 {
const Simd kTable = KVC_TABLE;
}
#endif

namespace {

const Simd& choose() {
#ifdef KVC_X86
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const bool no_vectors = limit && std::strcmp(limit, "default") == 0;
  const bool no_avx512 = limit && std::strcmp(limit, "avx2") == 0;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (has_avx2 && has_avx512 && !no_vectors && !no_avx512) return avx512::kTable;
  if (has_avx2 && !no_vectors) return avx2::kTable;
#endif
  return portable::kTable;
}

}  // namespace

const Simd& simd() {
  static const Simd& chosen = choose();
  return chosen;
}

}  // namespace kvc
